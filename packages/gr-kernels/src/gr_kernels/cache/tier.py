"""The file behind the memory: blocks that were evicted, found again by digest after a restart.

It holds data derived from users' behaviour: keys and values of their histories, and the content
that these were computed from. Only the owner of the process may read it (mode 0600).

Layout, all numbers little-endian, K and V as the machine has them:

    header                      magic, version, byte order, size and number of slabs, checksum
    slab 0 … n - 1              header: namespace digest, layout, checksum; then slots
    slot                        header of a block, its tokens' content, its K and V

A slot's header names the block (its digest, its parent's, position, owners) and has a checksum
over itself, its place and the namespace, and one over content, K and V. It is written after these
and erased before they change; what does not match is not there. So a crash at any point, a
truncated file and flipped bits lose blocks and nothing else.

The file is read and written by position, not mapped: both are a copy from or to the page cache,
but a mapped file kills the process when the disk is full or somebody truncates it (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gr_kernels.cache.arena import Block, Place, Slab
from gr_kernels.cache.digests import chain
from gr_kernels.cache.layout import Layout
from gr_kernels.cache.memory import view

if TYPE_CHECKING:
    from gr_kernels.cache.tree import Node, Tree

logger = logging.getLogger(__name__)

VERSION = 1
OWNER_BYTES = 16
_MAX_OWNERS = 8
_PAGE = 4096
_SMALLEST, _LARGEST = 1 << 16, 1 << 26
_PARTS = 16
_SUM_BYTES = 16
_MAGIC = b"GRKVFILE"
_FILE = struct.Struct("<8sIIQQ")
_SLAB = struct.Struct("<8s32sIQIQ")
_SLOT = struct.Struct(f"<8s32s32sQIIIB{OWNER_BYTES * _MAX_OWNERS}s")
_SLAB_MAGIC, _SLOT_MAGIC = b"GRKVSLAB", b"GRKVSLOT"
_SLOT_HEADER = 256
_ORDERS = {"little": 1, "big": 2}


class Slot(Place):
    """A place in the file."""

    __slots__ = ("checksum", "offset")

    def __init__(self, slab: Slab, offset: int) -> None:
        super().__init__(slab)
        self.offset = offset
        self.checksum = 0
        """Of content, K and V."""


class FileSlab(Slab):
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True, slots=True)
class Record:
    """A block that was found in the file when it was opened."""

    slot: Slot
    digest: bytes
    parent: bytes
    start: int
    tokens: int
    hits: int
    marks: frozenset[bytes]
    rows: bytes


class FileTier:
    """A bounded file of slots. Not thread-safe."""

    option = "file_bytes"
    outlives = True

    def __init__(self, path: str, size: int) -> None:
        """Opens or makes the file; what is in it and cannot be used is forgotten.

        Raises ValueError for a path that cannot be used, or that another process uses.
        """
        self.path = self.name = path
        room = size - _PAGE
        self._slab_bytes = min(max(size // _PARTS, _SMALLEST), _LARGEST) // _PAGE * _PAGE
        self._count = room // self._slab_bytes
        if self._count < 1:
            raise ValueError(
                f"file_bytes: {size}, expected at least {_SMALLEST + _PAGE}, or no file"
            )
        self.capacity = self._count * self._slab_bytes
        self._failed = False
        self._fd = _open(path)
        try:
            self._free = list(range(self._count - 1, -1, -1))
            self._start()
        except BaseException:
            os.close(self._fd)
            raise

    # ── Slabs ─────────────────────────────────────────────────────────────────────────────────

    def slab_for(self, tree: Tree) -> FileSlab | None:
        """A new slab for a tree's blocks."""
        layout = tree.layout
        if not self._free or not self.fits(tree):
            return None
        number = self._free[-1]
        if not self._write(self._offset(number), _seal(_slab_header(layout), _number(number))):
            return None
        self._free.pop()
        return self._slab(number, layout)

    def full(self, tree: Tree) -> bool:
        return not self._free and self.fits(tree)

    def give_back(self, slab: FileSlab) -> None:
        self._write(self._offset(slab.number), bytes(_SLAB.size))
        self._free.append(slab.number)

    def fits(self, tree: Tree) -> bool:
        """Whether a slab has room for a block."""
        return slot_bytes(tree.layout) <= self._slab_bytes - _PAGE

    def slabs(self) -> Iterator[tuple[FileSlab, Layout, list[Record]]]:
        """What a file that was opened holds; called once. Whatever does not match is left out."""
        for number in reversed(list(self._free)):
            raw = _unseal(self._read(self._offset(number), _PAGE), _SLAB.size, _number(number))
            if raw is None:
                continue
            magic, namespace, block_tokens, block_bytes, width, size = _SLAB.unpack(raw)
            layout = Layout(namespace, block_tokens, block_bytes, width)
            if magic != _SLAB_MAGIC or slot_bytes(layout) != size:
                continue
            self._free.remove(number)
            slab = self._slab(number, layout)
            found = (self._record(slot, layout) for slot in slab.places)
            yield slab, layout, [record for record in found if record is not None]

    def slot_bytes(self, layout: Layout) -> int:
        return slot_bytes(layout)

    def _slab(self, number: int, layout: Layout) -> FileSlab:
        slab = FileSlab(number)
        first, size = self._offset(number) + _PAGE, slot_bytes(layout)
        slab.places += [
            Slot(slab, first + i * size) for i in range((self._slab_bytes - _PAGE) // size)
        ]
        return slab

    def _offset(self, number: int) -> int:
        return _PAGE + number * self._slab_bytes

    # ── Slots ─────────────────────────────────────────────────────────────────────────────────

    def save(self, node: Node, slot: Slot) -> bool:
        """Writes a node's block; False if that failed, and then the slot is as good as empty."""
        assert node.block is not None
        assert node.rows is not None
        rows = node.rows.ljust(node.tree.layout.rows_bytes, b"\0")
        block = view(node.block.address, node.tree.layout.block_bytes)
        slot.checksum = zlib.crc32(block, zlib.crc32(rows))
        if not self._write(slot.offset + _SLOT_HEADER, rows, block):
            return False
        return self.describe(node, slot)

    def describe(self, node: Node, slot: Slot) -> bool:
        """Writes a node's header, e.g. when its owners changed."""
        assert node.parent is not None
        marks = sorted(node.marks)
        raw = _SLOT.pack(
            _SLOT_MAGIC,
            node.digest,
            node.parent.digest,
            node.start,
            node.tokens,
            node.hits,
            slot.checksum,
            len(marks),
            b"".join(mark.rjust(OWNER_BYTES, b"\0") for mark in marks),
        )
        return self._write(
            slot.offset, _seal(raw, node.tree.layout.namespace + _number(slot.offset))
        )

    def load(self, node: Node, slot: Slot, block: Block) -> bytes | None:
        """Reads a block into memory and returns its tokens' content; None if it is damaged."""
        rows = bytearray(node.tree.layout.rows_bytes)
        into = view(block.address, node.tree.layout.block_bytes)
        try:
            got = os.preadv(self._fd, [rows, into], slot.offset + _SLOT_HEADER)
        except OSError as error:
            self._complain("read", error)
            return None
        if got != len(rows) + len(into) or zlib.crc32(into, zlib.crc32(rows)) != slot.checksum:
            return None
        return self._genuine(node, bytes(rows))

    def rows(self, node: Node, slot: Slot) -> bytes | None:
        """The content of a block's tokens; None if it is damaged."""
        size = node.tree.layout.rows_bytes
        return self._genuine(node, self._read(slot.offset + _SLOT_HEADER, size))

    def erase(self, slot: Slot, tree: Tree, *, wipe: bool) -> None:
        """Forgets a block; with ``wipe`` its content, K and V are overwritten as well."""
        size = slot_bytes(tree.layout) if wipe else _SLOT_HEADER
        self._write(slot.offset, bytes(size))

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _record(self, slot: Place, layout: Layout) -> Record | None:
        assert isinstance(slot, Slot)
        raw = self._read(slot.offset, _SLOT_HEADER + layout.rows_bytes)
        header = _unseal(raw, _SLOT.size, layout.namespace + _number(slot.offset))
        if header is None:
            return None
        magic, digest, parent, start, tokens, hits, slot.checksum, count, owners = _SLOT.unpack(
            header
        )
        rows = raw[_SLOT_HEADER : _SLOT_HEADER + tokens * layout.width]
        if (
            magic != _SLOT_MAGIC
            or not 0 < tokens <= layout.block_tokens
            or count > _MAX_OWNERS
            or len(rows) != tokens * layout.width
            or chain(parent, rows) != digest
        ):
            return None
        marks = (owners[i * OWNER_BYTES : (i + 1) * OWNER_BYTES] for i in range(count))
        named = frozenset(b"" if mark == bytes(OWNER_BYTES) else mark for mark in marks)
        return Record(slot, digest, parent, start, tokens, hits, named, rows)

    def _genuine(self, node: Node, rows: bytes) -> bytes | None:
        assert node.parent is not None
        rows = rows[: node.tokens * node.tree.layout.width]
        return rows if chain(node.parent.digest, rows) == node.digest else None

    # ── The file ──────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        """Takes over the file as it is if its header is right, else begins anew."""
        raw = _FILE.pack(_MAGIC, VERSION, _ORDERS[sys.byteorder], self._slab_bytes, self._count)
        header = _seal(raw, b"")
        there = self._read(0, len(header))
        start = len(_MAGIC)
        if there[:start] != header[: len(there)][:start] and there[start:] != header[start:]:
            raise ValueError(
                f"file: {self.path} is something else; name another place, or delete it"
            )
        if there != header:
            if there:
                logger.warning(
                    "%s: of another version, size or machine, or damaged; the cache starts empty",
                    self.path,
                )
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, header, 0)
        # Sparse: it takes room as it fills.
        os.ftruncate(self._fd, _PAGE + self.capacity)

    def _read(self, offset: int, size: int) -> bytes:
        """Less than asked for where the file ends or cannot be read."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            self._complain("read", error)
            return b""

    def _write(self, offset: int, *parts: bytes | ctypes.Array[ctypes.c_char]) -> bool:
        try:
            written = os.pwritev(self._fd, parts, offset)
        except OSError as error:
            self._complain("written", error)
            return False
        return written == sum(map(len, parts))

    def _complain(self, verb: str, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("%s: cannot be %s, blocks are lost: %s", self.path, verb, error)


def _open(path: str) -> int:
    """A file descriptor, locked, of a regular file that nobody else may read."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise ValueError(
            f"file: {path}: {error.strerror}; expected a file in a folder that exists and that "
            "only this server writes to"
        ) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"file: {path} is not a regular file")
        if status.st_uid != os.geteuid():
            raise ValueError(f"file: {path} belongs to another user")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"file: {path} is in use by another process; give each process a file of its own"
            ) from None
        os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def slot_bytes(layout: Layout) -> int:
    return -(-(_SLOT_HEADER + layout.rows_bytes + layout.block_bytes) // 512) * 512


def _slab_header(layout: Layout) -> bytes:
    return _SLAB.pack(
        _SLAB_MAGIC,
        layout.namespace,
        layout.block_tokens,
        layout.block_bytes,
        layout.width,
        slot_bytes(layout),
    )


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _sum(raw: bytes, place: bytes) -> bytes:
    return hashlib.blake2b(raw + place, digest_size=_SUM_BYTES, person=b"gr.kv.file").digest()


def _seal(raw: bytes, place: bytes) -> bytes:
    """``raw`` with a checksum over it and what it belongs to."""
    return raw + _sum(raw, place)


def _unseal(data: bytes, size: int, place: bytes) -> bytes | None:
    """The first ``size`` bytes of sealed data; None if the checksum is not theirs."""
    raw, checksum = data[:size], data[size : size + _SUM_BYTES]
    return raw if checksum == _sum(raw, place) else None
