"""Where blocks lie, and how one is copied into another: on the host at once.

For CUDA devices both are in `gr_kernels.cuda.transfers`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Protocol

from gr_core.contracts import Arrivals


class Buffer(Protocol):
    """A piece of memory."""

    @property
    def address(self) -> int:
        """A multiple of the memory's alignment."""
        ...

    def free(self) -> None: ...


class Memory(Protocol):
    """What pieces are taken from. Addresses are used as they are, whatever they point to."""

    @property
    def alignment(self) -> int:
        """Of pieces and of blocks in them, in bytes."""
        ...

    @property
    def granularity(self) -> int:
        """Pieces are multiples of it, in bytes."""
        ...

    def allocate(self, size: int) -> Buffer | None:
        """A new piece; None if the system has no more."""
        ...


class Copies(Protocol):
    """Copies from block to block, in the order in which they are asked for."""

    def copy(self, to: int, of: int, size: int, layers: int) -> None:
        """Copies a block of ``layers`` parts of equal size."""
        ...

    def arrivals(self) -> Arrivals | None:
        """What to wait for before blocks are used; None if all copies are done."""
        ...


class Pages:
    """Anonymous memory of this process, filled with zeros at first, on pages touched when used.

    Raises OSError if the system has no more.
    """

    __slots__ = ("_memory", "address")
    granularity = mmap.PAGESIZE

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        probe = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(probe)
        del probe  # or the memory could not be given back

    def free(self) -> None:
        self._memory.close()


class HostMemory:
    """Implements `Memory` and `Copies`."""

    alignment = 64
    """A cache line, and a register of AVX-512."""
    granularity = Pages.granularity

    def allocate(self, size: int) -> Buffer | None:
        with contextlib.suppress(OSError):
            return Pages(size)
        return None

    def copy(self, to: int, of: int, size: int, layers: int) -> None:
        ctypes.memmove(to, of, size)

    def arrivals(self) -> None:
        return None


def view(address: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory of the host as bytes that can be read and written; it must outlive them."""
    return (ctypes.c_char * size).from_address(address)
