"""What every cache of blocks must do."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import random
import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from gr_core.contracts import BlockCache, BlockLease, BlockSpace, Rates
from gr_core.plugins.registry import Registry
from gr_core.testing.suite import Suite

MakeBlockCache = Callable[[int], BlockCache]

BLOCK_TOKENS = 8
TOKEN_BYTES = 512
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
CAPACITY = 1 << 20
"""256 blocks."""


def history(seed: int, tokens: int) -> npt.NDArray[np.uint8]:
    """Content, (tokens, 16). A longer one of the same seed begins with the shorter."""
    return np.random.default_rng(seed).integers(0, 256, (tokens, 16), np.uint8)


def state_of(salt: bytes, content: npt.NDArray[np.uint8]) -> list[bytes]:
    """What plays K and V of each token: a function of all tokens up to it."""
    digest, found = hashlib.blake2b(salt), []
    for row in content:
        digest.update(row.tobytes())
        found.append(digest.digest() * (TOKEN_BYTES // 64))
    return found


def serve(
    space: BlockSpace,
    content: npt.NDArray[np.uint8],
    salt: bytes = b"",
    owner: str = "",
    reusable: int | None = None,
    size: int = BLOCK_TOKENS,
) -> int:
    """A request: reused tokens are checked, the others written and committed. Tokens reused.

    ``size`` is that of the space's blocks, in tokens.
    """
    lease = space.acquire(salt, content, len(content) if reusable is None else reusable, owner)
    assert lease is not None, "no memory, although nobody holds any"
    try:
        states = state_of(salt, content)
        check(lease, states[: lease.reused], size)
        write(lease, states, size)
        lease.commit(len(content))
        return lease.reused
    finally:
        lease.release()


def address(lease: BlockLease, token: int, size: int) -> int:
    return int(lease.blocks[token // size]) + token % size * TOKEN_BYTES


def check(lease: BlockLease, states: list[bytes], size: int = BLOCK_TOKENS) -> None:
    for token, state in enumerate(states):
        found = ctypes.string_at(address(lease, token, size), TOKEN_BYTES)
        assert found == state, f"token {token} has another's state"


def write(lease: BlockLease, states: list[bytes], size: int = BLOCK_TOKENS) -> None:
    for token in range(lease.reused, len(states)):
        ctypes.memmove(address(lease, token, size), states[token], TOKEN_BYTES)


class BlockCacheSuite(Suite):
    """Subclass it with ``cache``, its name. Its factory is given a capacity and no options."""

    cache: ClassVar[str]

    @pytest.fixture
    def make(self, registry: Registry) -> MakeBlockCache:
        factory: MakeBlockCache = registry.caches[self.cache].resolve()
        return factory

    @staticmethod
    def space(
        cache: BlockCache, namespace: bytes = b"model/1", size: int = BLOCK_TOKENS
    ) -> BlockSpace:
        return cache.space(
            namespace,
            block_tokens=size,
            block_bytes=size * TOKEN_BYTES,
            token_cost=1.0,
            pair_cost=0.01,
        )

    def test_a_history_that_grew_reuses_its_prefix(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        assert serve(space, history(1, 32)) == 0
        assert serve(space, history(1, 48)) == 32
        assert serve(space, history(1, 48)) == 48
        cache.close()

    def test_whole_blocks_at_least_are_reused(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        assert serve(space, history(1, 29)) == 0
        assert 24 <= serve(space, history(1, 45)) <= 29

    def test_no_more_is_reused_than_may_be(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        serve(space, history(1, 32))
        for reusable in (31, 24, 17, 0):
            assert serve(space, history(1, 32), reusable=reusable) <= reusable

    def test_nothing_is_reused_after_a_change(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        content = history(1, 40)
        serve(space, content)
        changed = content.copy()
        changed[20] ^= 1
        assert 16 <= serve(space, changed) <= 20
        assert serve(space, content[::-1].copy()) == 0
        assert serve(space, content[8:].copy()) == 0

    def test_salts_and_namespaces_are_worlds_apart(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        serve(self.space(cache), history(1, 32))
        assert serve(self.space(cache), history(1, 32), salt=b"other") == 0
        assert serve(self.space(cache, b"model/2"), history(1, 32)) == 0
        assert serve(self.space(cache, size=4), history(1, 32), size=4) == 0

    def test_users_with_the_same_prefix_share_it(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        serve(space, history(1, 32), owner="ann")
        held = cache.statistics().bytes
        assert serve(space, history(1, 32), owner="bob") == 32
        assert cache.statistics().bytes == held

    def test_blocks_are_aligned_and_do_not_overlap(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        leases = [space.acquire(b"", history(seed, 20), 0) for seed in range(5)]
        assert all(leases)
        places = sorted(int(a) for lease in leases if lease for a in lease.blocks)
        assert len(places) == 15
        assert all(place % 64 == 0 for place in places)
        assert all(b - a >= BLOCK_BYTES for a, b in itertools.pairwise(places))

    def test_what_is_held_is_never_taken(self, make: MakeBlockCache) -> None:
        """Other sequences come and go in a full cache; what leases hold keeps its bytes."""
        space = self.space(make(CAPACITY))
        serve(space, history(0, 64))
        content = history(0, 80)
        lease = space.acquire(b"", content, 80)
        assert lease is not None
        states = state_of(b"", content)
        write(lease, states)
        for seed in range(1, 60):
            serve(space, history(seed, 64))
        check(lease, states)
        lease.commit(80)
        lease.release()
        assert serve(space, content) == 80

    def test_without_room_there_is_no_lease(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        assert space.acquire(b"", history(1, 257 * BLOCK_TOKENS), 0) is None
        leases: list[BlockLease] = []
        while (lease := space.acquire(b"", history(len(leases), 64), 0)) is not None:
            leases.append(lease)
            assert len(leases) <= 32
        assert len(leases) >= 24
        for lease in leases:
            lease.release()
        assert serve(space, history(1, 64)) == 0

    def test_it_never_holds_more_than_its_capacity(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        spaces = [self.space(cache), self.space(cache, b"model/2", 4)]
        for seed in range(100):
            size = (BLOCK_TOKENS, 4)[seed % 2]
            serve(spaces[seed % 2], history(seed, 40 + seed % 50), size=size)
            found = cache.statistics()
            assert 0 <= found.bytes <= found.capacity_bytes == CAPACITY
        assert cache.statistics().evictions > 0

    def test_what_is_not_committed_is_not_reused(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        lease = space.acquire(b"", history(1, 32), 32)
        assert lease is not None
        write(lease, state_of(b"", history(1, 32)))
        lease.commit(20)
        lease.release()
        lease.release()
        assert 16 <= serve(space, history(1, 32)) <= 20

    def test_two_that_computed_the_same(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space, content = self.space(cache), history(1, 30)
        states = state_of(b"", content)
        leases = [space.acquire(b"", content, 30) for _ in range(3)]
        for lease in leases:
            assert lease is not None
            write(lease, states)
            lease.commit(30)
            check(lease, states)
        for lease in leases:
            assert lease is not None
            lease.release()
        assert cache.statistics().entries == 4
        assert serve(space, content) >= 24

    def test_an_owner_can_be_dropped(self, make: MakeBlockCache) -> None:
        """What is shared with another stays for the other."""
        cache = make(CAPACITY)
        space = self.space(cache)
        serve(space, history(1, 32), owner="ann")
        serve(space, history(2, 32), owner="ann")
        serve(space, history(2, 16), owner="bob")
        serve(space, history(3, 32))
        assert cache.evict("nobody") == 0
        assert cache.evict("ann") == 4 + 2
        assert cache.evict("ann") == 0
        assert serve(space, history(1, 32)) == 0
        assert serve(space, history(2, 32)) == 16
        assert serve(space, history(3, 32)) == 32
        assert cache.evict("") == 0

    def test_a_dropped_owner_publishes_nothing(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        lease = space.acquire(b"", history(1, 32), 32, "ann")
        assert lease is not None
        cache.evict("ann")
        write(lease, state_of(b"", history(1, 32)))
        lease.commit(32)
        lease.release()
        assert cache.statistics().entries == 0

    def test_it_can_be_cleared(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        serve(space, history(1, 32), owner="ann")
        cache.clear()
        assert cache.statistics().entries == cache.statistics().bytes == 0
        assert cache.evict("ann") == 0
        assert serve(space, history(1, 32)) == 0
        assert serve(space, history(1, 32)) == 32

    def test_it_counts_tokens(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        space = self.space(cache)
        serve(space, history(1, 32))
        serve(space, history(1, 40))
        found = cache.statistics()
        assert (found.hits, found.misses, found.entries) == (32, 32 + 8, 5)
        assert found.bytes >= 5 * BLOCK_BYTES

    def test_a_closed_space_gives_its_memory_back(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        old = self.space(cache)
        lease = old.acquire(b"", history(0, 64), 0)
        for seed in range(1, 40):
            serve(old, history(seed, 64))
        old.close()
        old.close()
        assert lease is not None
        write(lease, state_of(b"", history(0, 64)))
        check(lease, state_of(b"", history(0, 64)))
        lease.commit(64)
        lease.release()
        assert cache.statistics().bytes == 0
        new = self.space(cache, b"model/2", 4)
        for seed in range(20):
            serve(new, history(seed, 64), size=4)
        assert serve(new, history(19, 64), size=4) == 64
        cache.close()
        cache.close()

    def test_blocks_on_the_host_are_there_at_once(self, make: MakeBlockCache) -> None:
        """Also where it is known what is worth loading."""
        space = self.space(make(CAPACITY))
        space.set_rates(Rates(bytes_per_second=1e9, costs_per_second=1e9))
        serve(space, history(1, 32))
        lease = space.acquire(b"", history(1, 48), 32)
        assert lease is not None
        assert lease.arrivals is None
        assert lease.reused == 32
        lease.release()

    def test_the_content_must_be_bytes(self, make: MakeBlockCache) -> None:
        space = self.space(make(CAPACITY))
        with pytest.raises(ValueError, match="content"):
            space.acquire(b"", np.zeros((4, 2), np.int64), 0)

    def test_an_empty_sequence_needs_nothing(self, make: MakeBlockCache) -> None:
        cache = make(CAPACITY)
        assert serve(self.space(cache), history(1, 0), owner="ann") == 0
        assert cache.statistics().entries == 0

    def test_it_is_thread_safe(self, make: MakeBlockCache) -> None:
        """Threads with growing histories in a cache that is too small never see wrong state."""
        cache = make(CAPACITY // 4)
        spaces = [self.space(cache), self.space(cache, b"model/2", 4)]
        failures: list[str] = []
        reused = [0] * 4

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                for _ in range(150):
                    seed = rng.randrange(8)
                    content = history(seed, rng.randrange(1, 60))
                    salt = bytes([seed % 2])
                    lease = spaces[seed % 2].acquire(salt, content, len(content), f"u{seed}")
                    if lease is None:
                        continue
                    size, states = (BLOCK_TOKENS, 4)[seed % 2], state_of(salt, content)
                    check(lease, states[: lease.reused], size)
                    write(lease, states, size)
                    reused[number] += lease.reused
                    if rng.random() < 0.9:
                        lease.commit(len(content))
                    lease.release()
                    if rng.random() < 0.05:
                        cache.evict(f"u{seed}")
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[:3]
        assert min(reused) > 0
        cache.clear()
        assert cache.statistics().bytes == 0, "nothing leaks"

    @pytest.mark.parametrize("capacity", [0, -1])
    def test_a_capacity_below_one_is_refused(self, make: MakeBlockCache, capacity: int) -> None:
        with pytest.raises(ValueError, match="capacity"):
            make(capacity)
