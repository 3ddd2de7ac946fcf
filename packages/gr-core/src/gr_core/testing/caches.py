"""What every cache of entries must do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import ClassVar

import pytest

from gr_core.contracts import EntryCache
from gr_core.plugins.registry import Registry
from gr_core.testing.suite import Suite

MakeCache = Callable[[int], EntryCache]


class CacheSuite(Suite):
    """Subclass it with ``cache``, its name. Values are bytes of the size that is said."""

    cache: ClassVar[str]

    @pytest.fixture
    def make(self, registry: Registry) -> MakeCache:
        factory: MakeCache = registry.caches[self.cache].resolve()
        return factory

    def test_what_is_put_is_got(self, make: MakeCache) -> None:
        cache = make(10_000)
        assert cache.get(b"a") is None
        cache.put(b"a", b"one", 3)
        cache.put(b"b", b"two", 3)
        assert cache.get(b"a") == b"one"
        assert cache.get(b"b") == b"two"

    def test_a_second_value_replaces_the_first(self, make: MakeCache) -> None:
        cache = make(10_000)
        cache.put(b"a", b"x" * 100, 100, owner="ann")
        cache.put(b"a", b"new", 3, owner="bob")
        assert cache.get(b"a") == b"new"
        assert cache.statistics().entries == 1
        assert cache.statistics().bytes < 100
        assert cache.evict("ann") == 0
        assert cache.evict("bob") == 1

    def test_it_never_holds_more_than_its_capacity(self, make: MakeCache) -> None:
        cache, rng = make(10_000), random.Random(0)
        for step in range(2_000):
            size = rng.choice([1, 10, 100, 1_000, 9_000])
            cache.put(str(rng.randrange(200)).encode(), b"x" * size, size, rng.choice(["", "u"]))
            found = cache.statistics()
            assert 0 <= found.bytes <= found.capacity_bytes == 10_000, f"step {step}"
        assert cache.statistics().evictions > 0

    def test_what_is_larger_than_it_is_not_kept(self, make: MakeCache) -> None:
        cache = make(1_000)
        cache.put(b"small", b"x" * 10, 10)
        cache.put(b"large", b"x" * 1_001, 1_001)
        assert cache.get(b"large") is None
        assert cache.get(b"small") is not None, "nothing has to make way for it"

    def test_a_stale_value_never_outlives_a_larger_one(self, make: MakeCache) -> None:
        cache = make(1_000)
        cache.put(b"a", b"old", 3)
        cache.put(b"a", b"x" * 1_001, 1_001)
        assert cache.get(b"a") is None

    def test_a_hot_entry_survives_cold_ones(self, make: MakeCache) -> None:
        cache = make(10_000)
        cache.put(b"hot", b"x" * 100, 100)
        for i in range(1_000):
            assert cache.get(b"hot") is not None, f"after {i} cold entries"
            cache.put(f"cold-{i}".encode(), b"x" * 100, 100)

    def test_an_owner_can_be_dropped(self, make: MakeCache) -> None:
        cache = make(10_000)
        for i in range(4):
            cache.put(f"a{i}".encode(), b"x", 1, owner="ann")
        cache.put(b"b", b"x", 1, owner="bob")
        cache.put(b"c", b"x", 1)
        before = cache.statistics().bytes
        assert cache.evict("ann") == 4
        assert cache.evict("ann") == 0
        assert cache.evict("nobody") == 0
        assert [cache.get(f"a{i}".encode()) for i in range(4)] == [None] * 4
        assert cache.get(b"b") == cache.get(b"c") == b"x"
        assert cache.statistics().bytes < before

    def test_evicted_entries_no_longer_count_for_their_owner(self, make: MakeCache) -> None:
        cache = make(1_000)
        for i in range(100):
            cache.put(f"a{i}".encode(), b"x" * 100, 100, owner="ann")
        held = cache.statistics().entries
        assert 0 < held < 100
        assert cache.evict("ann") == held
        assert cache.statistics().entries == cache.statistics().bytes == 0

    def test_it_can_be_cleared(self, make: MakeCache) -> None:
        cache = make(1_000)
        cache.put(b"a", b"x", 1, owner="ann")
        cache.clear()
        assert cache.get(b"a") is None
        assert cache.statistics().entries == cache.statistics().bytes == 0
        assert cache.evict("ann") == 0
        cache.put(b"a", b"y", 1)
        assert cache.get(b"a") == b"y"

    def test_it_counts(self, make: MakeCache) -> None:
        cache = make(10_000)
        cache.put(b"a", b"x" * 50, 50)
        cache.get(b"a")
        cache.get(b"a")
        cache.get(b"b")
        found = cache.statistics()
        assert (found.hits, found.misses, found.entries) == (2, 1, 1)
        assert found.bytes >= 50
        assert found.capacity_bytes == 10_000

    def test_it_is_thread_safe(self, make: MakeCache) -> None:
        """Threads that put, get and drop never see another key's value or an overfull cache."""
        cache = make(5_000)
        failures: list[str] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(2_000):
                    number = rng.randrange(50)
                    key, owner = f"k{number}".encode(), f"u{number % 5}"
                    chance = rng.random()
                    if chance < 0.6:
                        value = cache.get(key)
                        if value is not None and value[:4] != number.to_bytes(4, "big"):
                            failures.append(f"{key!r} gave another key's value")
                    elif chance < 0.97:
                        size = rng.randrange(4, 600)
                        cache.put(key, number.to_bytes(4, "big") + b"x" * (size - 4), size, owner)
                    else:
                        cache.evict(owner)
                    if cache.statistics().bytes > 5_000:
                        failures.append("overfull")
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[:3]

    @pytest.mark.parametrize("capacity", [0, -1])
    def test_a_capacity_below_one_is_refused(self, make: MakeCache, capacity: int) -> None:
        with pytest.raises(ValueError, match="capacity"):
            make(capacity)
