"""The memory cache against a naive model of itself, and under threads; caches by configuration."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gr_core import CacheDescriptor
from gr_core.caches import open_caches
from gr_core.caches.memory import MemoryCache
from gr_core.config import CacheSection
from gr_core.contracts import CacheKind
from gr_core.errors import ConfigurationError
from gr_core.plugins.registry import Registry

keys = st.integers(0, 7).map(lambda n: b"%d" % n)
owners = st.sampled_from(["", "ada", "bob"])


class CacheMachine(RuleBasedStateMachine):
    """Entries as a list, least recently used first."""

    @initialize(capacity=st.integers(1, 60))
    def make(self, capacity: int) -> None:
        self.capacity = capacity
        self.cache = MemoryCache(capacity)
        self.entries: list[tuple[bytes, int, int, str]] = []
        self.hits = self.misses = self.evictions = self.puts = 0

    def drop(self, key: bytes) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != key]

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size, _ in self.entries)

    @rule(key=keys, size=st.integers(0, 40), owner=owners)
    def put(self, key: bytes, size: int, owner: str) -> None:
        self.puts += 1
        self.cache.put(key, self.puts, size, owner)
        size += len(key)
        self.drop(key)
        if size > self.capacity:
            return
        while self.bytes + size > self.capacity:
            self.entries.pop(0)
            self.evictions += 1
        self.entries.append((key, self.puts, size, owner))

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        found = [entry for entry in self.entries if entry[0] == key]
        assert self.cache.get(key) == (found[0][1] if found else None)
        self.drop(key)
        self.entries += found
        self.hits += len(found)
        self.misses += 1 - len(found)

    @rule(owner=st.sampled_from(["ada", "bob", "eve"]))
    def evict(self, owner: str) -> None:
        gone = [entry for entry in self.entries if entry[3] == owner]
        assert self.cache.evict(owner) == len(gone)
        self.entries = [entry for entry in self.entries if entry[3] != owner]

    @rule()
    def evict_nobody(self) -> None:
        assert self.cache.evict("") == 0, "what has no owner belongs to nobody"

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.entries = []

    @invariant()
    def statistics_are_true(self) -> None:
        told = self.cache.statistics()
        assert (told.hits, told.misses, told.evictions) == (self.hits, self.misses, self.evictions)
        assert (told.entries, told.bytes) == (len(self.entries), self.bytes)
        assert told.bytes <= told.capacity_bytes == self.capacity


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=50, stateful_step_count=30)


def test_a_value_larger_than_the_cache_replaces_nothing_but_its_own_key() -> None:
    cache = MemoryCache(100)
    cache.put(b"a", "old", 10)
    cache.put(b"b", "kept", 10)
    cache.put(b"a", "huge", 1000)
    assert cache.get(b"a") is None, "never the old value for a new put"
    assert cache.get(b"b") == "kept"


def test_what_was_used_last_stays_longest() -> None:
    cache = MemoryCache(33)
    for key in (b"a", b"b", b"c"):
        cache.put(key, key, 10)
    assert cache.get(b"a") == b"a"
    cache.put(b"d", b"d", 10)
    assert [cache.get(key) for key in (b"a", b"b", b"c", b"d")] == [b"a", None, b"c", b"d"]
    assert cache.statistics().evictions == 1


def test_a_cache_without_room_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="capacity_bytes: 0, expected at least 1"):
        MemoryCache(0)


def test_threads_leave_it_whole() -> None:
    cache = MemoryCache(2_000)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(1_000):
                key = b"%d" % ((n * 7 + number) % 50)
                value = cache.get(key)
                assert value is None or value == key
                cache.put(key, key, 30, owner=str(n % 5))
                if n % 50 == 0:
                    cache.evict(str(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    told = cache.statistics()
    assert told.bytes <= told.capacity_bytes
    assert told.hits + told.misses == 4_000
    for owner in map(str, range(5)):
        cache.evict(owner)
    assert cache.statistics().bytes == 0


def test_a_cache_is_found_by_what_it_holds_and_can_be_off():
    registry = Registry.of(
        CacheDescriptor(
            name="entries", factory="gr_core.caches.memory:MemoryCache", kinds=("results",)
        ),
        CacheDescriptor(
            name="blocks", factory="gr_core.caches.memory:MemoryCache", kinds=("user_kv",)
        ),
    )
    assert set(open_caches({}, registry)) == {CacheKind.USER_KV}, "made without being asked"
    assert open_caches({CacheKind.USER_KV: CacheSection(cache="off")}, registry) == {}
    asked = {CacheKind.RESULTS: CacheSection(capacity_bytes=512)}
    assert open_caches(asked, registry)[CacheKind.RESULTS].statistics().capacity_bytes == 512
    with pytest.raises(ConfigurationError, match="no installed plugin offers a cache of embed"):
        open_caches({CacheKind.EMBEDDINGS: CacheSection()}, registry)
