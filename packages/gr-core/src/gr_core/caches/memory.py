"""A least-recently-used cache in this process's memory, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from gr_core.contracts import CacheStatistics


@dataclass(frozen=True, slots=True)
class _Entry:
    value: Any
    size: int
    owner: str


class MemoryCache:
    """Implements `gr_core.contracts.EntryCache`. An entry counts its own size plus its key's."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: {capacity_bytes}, expected at least 1")
        self._capacity = capacity_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._by_owner: dict[str, set[bytes]] = {}
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: bytes) -> Any | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: bytes, value: Any, size: int, owner: str = "") -> None:
        size += len(key)
        with self._lock:
            self._remove(key)
            if size > self._capacity:
                return
            while self._bytes + size > self._capacity:
                self._remove(next(iter(self._entries)))
                self._evictions += 1
            self._entries[key] = _Entry(value, size, owner)
            self._bytes += size
            if owner:
                self._by_owner.setdefault(owner, set()).add(key)

    def evict(self, owner: str) -> int:
        with self._lock:
            keys = list(self._by_owner.get(owner, ()))
            for key in keys:
                self._remove(key)
            return len(keys)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._by_owner.clear()
            self._bytes = 0

    def close(self) -> None:
        self.clear()

    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._entries),
                bytes=self._bytes,
                capacity_bytes=self._capacity,
            )

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._bytes -= entry.size
        if entry.owner:
            keys = self._by_owner[entry.owner]
            keys.discard(key)
            if not keys:
                del self._by_owner[entry.owner]
