"""Histories of answered requests, kept so that a returning user sends only what is new.

An answer carries a handle of the history that it was computed from. A later request may give the
handle, and in ``history`` only the behaviours since then; it is answered as if it had brought the
stored history with the new behaviours appended. What is stored are the behaviours as they came, not
what a model made of them, so the answer is that of the whole history by construction.

A handle is a keyed digest, with a secret that the process draws when it starts, of the user, the
models with their versions, and a hash chain over the behaviours. It tells nothing to who holds it
and cannot be made up. For another user, another model or version, and in another process it is as
unknown as one that was never given.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import CacheStatistics
from gr_core.errors import InvalidRequest, UnknownHistory, Violation
from gr_core.types import FloatArray, History, ItemIds, item_id_array
from gr_core.validation import Limits

CAPACITY_BYTES = 64 << 20
"""What a store holds unless it is told otherwise."""

HANDLE_BYTES = 24

_ENTRY_BYTES = 1536
_COLUMN_BYTES = 256
"""What Python needs for an entry and for each of its columns beside their values, rounded up."""

_KEPT_PER_OWNER = 4
"""Histories of one user for the same models: the newest, and some for what overlaps or is tried
again. Without this bound, users whose clients send whole histories would fill the store."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a handle is for: a user, and the models that answer, in their versions."""

    user_id: str
    digest: bytes

    @staticmethod
    def of(user_id: str, models: Sequence[tuple[str, str]]) -> Owner:
        """``models`` are names and versions, in the order of the stages."""
        digest = hashlib.blake2b(digest_size=32, person=b"gr-owner")
        for text in (user_id, *(part for model in models for part in model)):
            digest.update(_framed(text.encode("utf-8", "surrogatepass")))
        return Owner(user_id, digest.digest())


@dataclass(frozen=True, slots=True)
class StoredHistory:
    """A whole history with its place in the hash chain."""

    handle: bytes
    owner: Owner
    history: History
    chain: bytes = field(repr=False)
    size: int
    """Bytes that it takes in the store."""


class HistoryStore:
    """Bounded memory of histories; what was used longest ago goes first.

    All methods are to be called on one event loop, but `extended`, which touches nothing of the
    store and may run on any thread.
    """

    def __init__(self, capacity_bytes: int, limits: Limits | None = None) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: {capacity_bytes}, expected at least 1")
        self._capacity = capacity_bytes
        self._limits = limits or Limits()
        self._secret = secrets.token_bytes(32)
        self._entries: OrderedDict[bytes, StoredHistory] = OrderedDict()
        """From what goes first to what goes last, as are the handles of each user."""
        self._by_user: dict[str, OrderedDict[bytes, bool]] = {}
        """With whether it was extended already."""
        self._drops = 0
        self._bytes = self._hits = self._misses = self._evictions = 0

    @property
    def drops(self) -> int:
        """How often `drop` was called, see `keep`."""
        return self._drops

    def find(self, handle: bytes, owner: Owner) -> StoredHistory:
        """The history of a handle. Raises `UnknownHistory`, for whatever reason it is of no use."""
        entry = self._entries.get(handle)
        if entry is None or not hmac.compare_digest(entry.owner.digest, owner.digest):
            self._misses += 1
            raise UnknownHistory
        self._hits += 1
        self._move(entry, last=True)
        return entry

    def extended(
        self, owner: Owner, new: History, stored: StoredHistory | None = None
    ) -> StoredHistory:
        """A stored history with new behaviours appended, or a new one of its own.

        Only the newest `Limits.max_history` behaviours are kept, so that a client may append for
        ever. Costs time in proportion to the length. Raises `InvalidRequest` for more signals in
        all than a request may have.
        """
        if stored is not None and not len(new):
            return stored
        history = _owned(new) if stored is None else self._joined(stored.history, new)
        chain = hashlib.blake2b(key=self._secret, digest_size=32, person=b"gr-chain")
        chain.update(b"" if stored is None else stored.chain)
        chain.update(content_digest(new))
        handle = hashlib.blake2b(key=self._secret, digest_size=HANDLE_BYTES, person=b"gr-handle")
        handle.update(owner.digest + chain.digest())
        return StoredHistory(
            handle.digest(), owner, history, chain.digest(), _size(history, owner.user_id)
        )

    def keep(self, entry: StoredHistory, extends: StoredHistory | None, drops: int) -> bytes:
        """Stores a history and returns its handle; empty if it was not stored.

        What it ``extends`` is the first to go from now on, unless that is extended more than once:
        it serves those who ask twice. ``drops`` is what `drops` was when the request began: where
        users were dropped since, nothing is stored, because this may be one of them.
        """
        if drops != self._drops or entry.size > self._capacity:
            return b""
        if extends is not None and extends is not entry and extends.handle in self._entries:
            handles = self._by_user[extends.owner.user_id]
            self._move(extends, last=handles[extends.handle])
            handles[extends.handle] = True
        if entry.handle not in self._entries:
            self._entries[entry.handle] = entry
            self._by_user.setdefault(entry.owner.user_id, OrderedDict())[entry.handle] = False
            self._bytes += entry.size
            self._make_room(entry)
        else:
            self._move(entry, last=True)
        return entry.handle

    def drop(self, user_id: str) -> int:
        """Forgets a user and returns how many histories there were."""
        self._drops += 1
        handles = list(self._by_user.get(user_id, ()))
        for handle in handles:
            self._remove(handle)
        return len(handles)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            entries=len(self._entries),
            bytes=self._bytes,
            capacity_bytes=self._capacity,
        )

    def _joined(self, old: History, new: History) -> History:
        names = sorted({*old.signals, *new.signals})
        if len(names) > self._limits.max_features:
            problem = (
                f"{len(names)} given, those of the stored history among them, "
                f"expected at most {self._limits.max_features}"
            )
            raise InvalidRequest([Violation("history.signals", problem)])
        newest = slice(-self._limits.max_history, None)
        times = np.concatenate([old.timestamps_ms, new.timestamps_ms])
        signals = {}
        for name in names:
            parts = [h.signals.get(name, _missing(len(h))) for h in (old, new)]
            signals[name] = _frozen(np.concatenate(parts)[newest])
        ids = _joined_ids(old.item_ids, new.item_ids)
        return History(_frozen(ids[newest]), _frozen(times[newest]), signals)

    def _make_room(self, added: StoredHistory) -> None:
        """Removes what is too much, of the same owner and of all, but not what was just added."""
        owners = self._by_user[added.owner.user_id]
        same = [h for h in owners if self._entries[h].owner.digest == added.owner.digest]
        for handle in same[:-_KEPT_PER_OWNER]:
            self._remove(handle)
            self._evictions += 1
        while self._bytes > self._capacity:
            self._remove(next(iter(self._entries)))
            self._evictions += 1

    def _move(self, entry: StoredHistory, *, last: bool) -> None:
        self._entries.move_to_end(entry.handle, last)
        self._by_user[entry.owner.user_id].move_to_end(entry.handle, last)

    def _remove(self, handle: bytes) -> None:
        entry = self._entries.pop(handle)
        self._bytes -= entry.size
        handles = self._by_user[entry.owner.user_id]
        del handles[handle]
        if not handles:
            del self._by_user[entry.owner.user_id]


def content_digest(history: History) -> bytes:
    """32 bytes that differ where histories differ in anything that counts.

    A signal that no behaviour has counts as one that is not there.
    """
    ids = history.item_ids
    digest = hashlib.blake2b(digest_size=32, person=b"gr-history")
    if ids.dtype.kind in "iu":
        digest.update(_framed(ids.dtype.str.encode()) + _framed(ids.tobytes()))
    else:
        texts = [str(i).encode("utf-8", "surrogatepass") for i in ids.tolist()]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        digest.update(_framed(b"text") + _framed(lengths.tobytes()) + _framed(b"".join(texts)))
    digest.update(_framed(np.asarray(history.timestamps_ms, np.int64).tobytes()))
    for name in sorted(history.signals):
        column = np.asarray(history.signals[name], np.float32)
        if not np.isnan(column).all():
            digest.update(_framed(name.encode("utf-8", "surrogatepass")))
            digest.update(_framed(column.tobytes()))
    return digest.digest()


def _framed(data: bytes) -> bytes:
    """With its length before it, so that no two sequences of parts read the same."""
    return len(data).to_bytes(8, "little") + data


def _joined_ids(old: ItemIds, new: ItemIds) -> ItemIds:
    """Where one has integers and the other texts, all are texts, as in a list of both."""
    if not len(new):
        return old
    if not len(old):
        return new
    if old.dtype == new.dtype:
        return np.concatenate([old, new])
    return item_id_array(old.tolist() + new.tolist())


def _missing(n: int) -> FloatArray:
    return np.full(n, np.nan, np.float32)


def _owned(history: History) -> History:
    """A copy: the arrays of a request are views of its message, or the caller's to change."""
    return History(
        _frozen(history.item_ids),
        _frozen(history.timestamps_ms),
        {name: _frozen(column) for name, column in history.signals.items()},
    )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that nobody can change, and that keeps no larger array alive."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _size(history: History, user_id: str) -> int:
    ids = history.item_ids
    size = _ENTRY_BYTES + sys.getsizeof(user_id) + ids.nbytes + history.timestamps_ms.nbytes
    if ids.dtype.kind == "O":
        size += sum(map(sys.getsizeof, ids.tolist()))
    for name, column in history.signals.items():
        size += _COLUMN_BYTES + sys.getsizeof(name) + column.nbytes
    return size
