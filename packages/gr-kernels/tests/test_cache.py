"""The paged cache against a naive model, and its rules one by one."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gr_core.testing import BlockCacheSuite
from gr_kernels.cache import arena, tier
from gr_kernels.cache.paged import PagedCache, PagedLease

from .cache_client import Client, Content, audit, content_of

USERS = ("ada", "bob", "eve", "")
SALTS = (b"", b"x")
LAYOUTS = ((b"one", 4, 100), (b"two", 3, 64), (b"three", 5, 300))
MAX_HELD = 3


@dataclass
class Held:
    which: int
    lease: PagedLease
    salt: bytes
    content: Content
    truth: list[bytes]
    done: int
    """Tokens that are written."""


class World:
    """Users whose histories grow, change and shrink, and a cache that is too small for them.

    Numbers choose what happens, so that hypothesis or a random generator may draw them.
    """

    def __init__(self, capacity: int, file: Path | None, file_bytes: int = 0) -> None:
        self.capacity = capacity
        self.options = {"file": str(file), "file_bytes": file_bytes} if file else {}
        self.histories: dict[tuple[str, bytes], list[int]] = {}
        self.next_item = 0
        self.known: set[tuple[bytes, bytes, bytes]] = set()
        """(namespace, salt, prefix) that were committed: nothing else may be reused."""
        self.seen: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        self.cache = PagedCache(self.capacity, **self.options)  # type: ignore[arg-type]
        self.clients: list[Client | None] = [None] * len(LAYOUTS)
        self.held: list[Held] = []

    def fresh(self, count: int) -> list[int]:
        self.next_item += count
        return [(self.next_item - i) % 251 for i in range(count)]

    def history(self, user: int, salt: int) -> list[int]:
        return self.histories.setdefault((USERS[user % 4], SALTS[salt % 2]), [])

    def begin(self, which: int, user: int, salt: int, less: int) -> None:
        """A request of a user; ``less`` tokens at the end may not be reused."""
        if len(self.held) >= MAX_HELD:
            self.end(0, True)
        which %= len(LAYOUTS)
        client = self.clients[which]
        if client is None:
            client = self.clients[which] = Client(self.cache, *LAYOUTS[which])
        owner, word = USERS[user % 4], SALTS[salt % 2]
        items = self.history(user, salt)
        del items[40:]
        content = content_of(items)
        limit = max(0, len(items) - less)
        lease = client.space.acquire(word, content, limit, owner)
        if lease is None:
            # What three leases hold can be more than there is; what one needs cannot.
            assert self.held or len(items) * client.token_bytes * 4 > self.capacity
            self.seen["refused"] += 1
            return
        assert len(lease.blocks) == -(-len(items) // client.block_tokens)
        assert 0 <= lease.reused <= limit
        prefix = content[: lease.reused].tobytes()
        assert not prefix or (client.name, word, prefix) in self.known
        self.seen["reused"] += lease.reused
        truth = client.truth(word, content)
        client.check(lease, truth, lease.reused)
        self.held.append(Held(which, lease, word, content, truth, lease.reused))

    def commit(self, place: int, tokens: int) -> None:
        if not self.held:
            return
        held = self.held[place % len(self.held)]
        client = self.clients[held.which]
        assert client is not None
        done = held.done + tokens % (len(held.content) - held.done + 1)
        client.write(held.lease, held.truth, done)
        held.lease.commit(done)
        held.done = done
        for i in range(done + 1):
            self.known.add((client.name, held.salt, held.content[:i].tobytes()))

    def end(self, place: int, finish: bool) -> None:
        if not self.held:
            return
        held = self.held[place % len(self.held)]
        if finish:
            self.commit(place, len(held.content) - held.done)
        client = self.clients[held.which]
        assert client is not None
        client.check(held.lease, held.truth, held.done)
        held.lease.release()
        held.lease.release()
        self.held.remove(held)

    def grow(self, user: int, salt: int, more: int) -> None:
        self.history(user, salt).extend(self.fresh(more))

    def edit(self, user: int, salt: int, place: int, count: int) -> None:
        items = self.history(user, salt)
        place %= len(items) + 1
        items[place : place + 1] = self.fresh(count)

    def truncate(self, user: int, salt: int, count: int) -> None:
        items = self.history(user, salt)
        del items[count % (len(items) + 1) :]

    def swap(self, user: int, salt: int, one: int, other: int) -> None:
        items = self.history(user, salt)
        if items:
            one, other = one % len(items), other % len(items)
            items[one], items[other] = items[other], items[one]

    def imitate(self, user: int, salt: int, other: int) -> None:
        self.histories[USERS[user % 4], SALTS[salt % 2]] = list(self.history(other, salt))

    def evict(self, user: int) -> None:
        owner = USERS[user % 3]
        self.seen["dropped"] += self.cache.evict(owner)
        assert self.cache.evict(owner) == 0

    def clear(self) -> None:
        self.cache.clear()
        if not self.held:  # what is held may be found until it is released
            self.known.clear()
            assert self.cache.statistics().entries == self.cache.statistics().bytes == 0

    def close_space(self, which: int) -> None:
        which %= len(LAYOUTS)
        client = self.clients[which]
        if client is None:
            return
        while places := [i for i, held in enumerate(self.held) if held.which == which]:
            self.end(places[0], which == 0)
        client.space.close()
        client.space.close()
        assert client.space.acquire(b"", content_of([1]), 1) is None
        self.clients[which] = None
        if not self.options:
            self.known = {entry for entry in self.known if entry[0] != client.name}

    def reopen(self) -> None:
        self.count()
        for held in self.held:
            held.lease.release()
        self.cache.close()
        self.cache.close()
        assert self.cache._store.arena.reserved == 0
        if not self.options:
            self.known.clear()
        self.open()

    def count(self) -> None:
        told = self.cache.statistics()
        self.seen["evicted"] += told.evictions
        if told.tiers:
            self.seen["copied back"] += told.tiers["file"].hits
            self.seen["evicted from the file"] += told.tiers["file"].evictions

    def check(self) -> None:
        audit(self.cache)
        for held in self.held:
            client = self.clients[held.which]
            assert client is not None
            client.check(held.lease, held.truth, held.done)

    def finish(self) -> None:
        self.count()
        for held in self.held:
            held.lease.release()
        audit(self.cache)
        self.cache.clear()
        store = self.cache._store
        assert store.arena.reserved == 0, "nothing leaks"
        assert not store.owners
        assert not any(tree.index or tree.roots for tree in store.trees.values())
        self.cache.close()


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny caches have several, and spaces take them from each other."""
    monkeypatch.setattr(arena, "_SMALLEST", 4096)
    monkeypatch.setattr(tier, "_SMALLEST", 16384)


@pytest.mark.parametrize(
    "seed", [0, 111, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 118))]
)
@pytest.mark.parametrize("with_file", [False, True])
def test_thousands_of_requests(tmp_path: Path, seed: int, with_file: bool) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([24, 48, 96]) * 1024
    world = World(capacity, tmp_path / "kv" if with_file else None, rng.choice([80, 160]) * 1024)
    actions: list[tuple[Callable[[], None], float]] = [
        (lambda: world.grow(n(), n(), n() % 10), 3),
        (lambda: world.edit(n(), n(), n(), n() % 3), 0.5),
        (lambda: world.truncate(n(), n(), n()), 0.5),
        (lambda: world.swap(n(), n(), n(), n()), 0.3),
        (lambda: world.imitate(n(), n(), n()), 0.5),
        (lambda: world.begin(n(), n(), n(), n() % 3), 6),
        (lambda: world.commit(n(), n()), 2),
        (lambda: world.end(n(), n() % 4 > 0), 3),
        (lambda: world.evict(n()), 0.1),
        (lambda: world.clear(), 0.02),
        (lambda: world.close_space(n()), 0.1),
        (lambda: world.reopen(), 0.04),
    ]

    def n() -> int:
        return rng.randrange(1000)

    chosen = rng.choices([a for a, _ in actions], [weight for _, weight in actions], k=2_500)
    for action in chosen:
        action()
        world.check()
    world.finish()
    assert world.seen["reused"] > 1_000, world.seen
    assert world.seen["evicted"] > 100, world.seen
    assert world.seen["dropped"] > 10, world.seen
    if with_file:
        assert world.seen["copied back"] > 100, world.seen
        assert world.seen["evicted from the file"] > 10, world.seen


numbers = st.integers(0, 60)
few = st.integers(0, 3)


class PagedMachine(RuleBasedStateMachine):
    """The same steps, drawn by hypothesis: a failure comes with the shortest way to it."""

    folder: Path
    with_file = False

    @initialize(blocks=st.integers(8, 40), file_slabs=st.integers(1, 4))
    def make(self, blocks: int, file_slabs: int) -> None:
        path = self.folder / "kv"
        path.unlink(missing_ok=True)
        size = 4096 + file_slabs * 16384
        self.world = World(blocks * 1024, path if self.with_file else None, size)

    @rule(which=few, user=few, salt=few, more=st.integers(1, 20))
    def serve(self, which: int, user: int, salt: int, more: int) -> None:
        """The usual request: a history that grew a little."""
        self.world.grow(user, salt, more)
        self.world.begin(which, user, salt, 0)
        self.world.end(len(self.world.held) - 1, True)

    @rule(which=few, user=few, salt=few, less=st.integers(0, 2))
    def begin(self, which: int, user: int, salt: int, less: int) -> None:
        self.world.begin(which, user, salt, less)

    @rule(place=few, tokens=numbers)
    def commit(self, place: int, tokens: int) -> None:
        self.world.commit(place, tokens)

    @rule(place=few, finish=st.booleans())
    def end(self, place: int, finish: bool) -> None:
        self.world.end(place, finish)

    @rule(user=few, salt=few, place=numbers, count=st.integers(0, 2))
    def edit(self, user: int, salt: int, place: int, count: int) -> None:
        self.world.edit(user, salt, place, count)

    @rule(user=few, salt=few, count=numbers)
    def truncate(self, user: int, salt: int, count: int) -> None:
        self.world.truncate(user, salt, count)

    @rule(user=few, salt=few, one=numbers, other=numbers)
    def swap(self, user: int, salt: int, one: int, other: int) -> None:
        self.world.swap(user, salt, one, other)

    @rule(user=few, salt=few, other=few)
    def imitate(self, user: int, salt: int, other: int) -> None:
        self.world.imitate(user, salt, other)

    @rule(what=st.integers(0, 12), number=few)
    def upset(self, what: int, number: int) -> None:
        """What is rare."""
        if what == 12:
            self.world.clear()
        elif what > 9:
            self.world.close_space(number)
        elif what > 7:
            self.world.reopen()
        elif what > 3:
            self.world.evict(number)

    @invariant()
    def it_is_whole(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


class FileMachine(PagedMachine):
    """The same with a file, which remembers over a restart."""

    with_file = True


@pytest.mark.parametrize("machine", [PagedMachine, FileMachine])
def test_machine(machine: type[PagedMachine], tmp_path: Path) -> None:
    machine.folder = tmp_path
    steps = settings(
        max_examples=60,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=steps)


class TestPaged(BlockCacheSuite):
    cache = "paged"


# ── One by one ────────────────────────────────────────────────────────────────────────────────


def test_a_part_of_a_block_is_reused_by_token() -> None:
    client = Client(PagedCache(1 << 20), b"m", 32, 100)
    items = list(range(100))
    assert client.serve(b"", items[:50]) == 0
    assert client.serve(b"", items[:58]) == 50
    assert client.serve(b"", items[:58]) == 58
    assert client.serve(b"", items[:55], reusable=54) == 54
    assert client.serve(b"", [*items[:40], 200, 201]) == 40
    assert client.serve(b"", items) == 58
    assert client.serve(b"", items, reusable=70) == 70


def test_extending_in_place_takes_no_more_memory() -> None:
    cache = PagedCache(1 << 20)
    client = Client(cache, b"m", 32, 100)
    items = list(range(96))
    places = set()
    for tokens in range(8, 33, 4):
        content = content_of(items[:tokens])
        lease = client.space.acquire(b"", content, tokens, "ada")
        assert lease is not None
        assert lease.reused == (tokens - 4 if tokens > 8 else 0)
        client.write(lease, client.truth(b"", content), tokens)
        lease.commit(tokens)
        places.add(int(lease.blocks[0]))
        lease.release()
        assert cache.statistics().entries == 1
    assert len(places) == 1
    audit(cache)


def test_two_that_extend_the_same_do_not_disturb_each_other() -> None:
    """The second leaves the block that the first writes to alone; both publish the truth."""
    cache = PagedCache(1 << 20)
    client = Client(cache, b"m", 32, 100)
    client.serve(b"", list(range(40)))
    one, other = content_of([*range(40), 100, 101]), content_of([*range(40), 200, 201, 202])
    leases = [client.space.acquire(b"", content, 42) for content in (one, other)]
    truths = [client.truth(b"", content) for content in (one, other)]
    assert [lease and lease.reused for lease in leases] == [40, 32]
    for lease, truth in zip(leases, truths, strict=True):
        assert lease is not None
        client.check(lease, truth, lease.reused)
        client.write(lease, truth, len(truth))
    for lease, truth in zip(leases, truths, strict=True):
        assert lease is not None
        client.check(lease, truth, len(truth))
        lease.commit(len(truth))
        lease.release()
    audit(cache)
    assert client.serve(b"", [*range(40), 100, 101]) == 42
    assert client.serve(b"", [*range(40), 200, 201, 202]) == 43


def test_a_block_that_another_reads_is_not_extended_in_place() -> None:
    client = Client(PagedCache(1 << 20), b"m", 32, 100)
    client.serve(b"", list(range(10)))
    reader = client.space.acquire(b"", content_of(list(range(10))), 10)
    writer = client.space.acquire(b"", content_of(list(range(12))), 12)
    assert reader is not None
    assert writer is not None
    assert reader.reused == writer.reused == 10
    assert reader.blocks[0] != writer.blocks[0]


def test_a_block_being_extended_that_another_published_too() -> None:
    """It cannot give way to a third's longer one, as the other needs it: it just stays."""
    cache = PagedCache(1 << 20)
    client = Client(cache, b"m", 32, 100)
    client.serve(b"", list(range(5)))
    short, long = content_of(list(range(5))), content_of(list(range(8)))
    truth = client.truth(b"", long)
    extends = client.space.acquire(b"", long, 8)
    same = client.space.acquire(b"", short, 0)
    longer = client.space.acquire(b"", long, 0)
    assert extends is not None
    assert same is not None
    assert longer is not None
    assert extends.reused == 5
    for lease, tokens in ((same, 5), (longer, 8), (extends, 8)):
        client.write(lease, truth, tokens)
        lease.commit(tokens)
        audit(cache)
    for lease, tokens in ((same, 5), (longer, 8), (extends, 8)):
        client.check(lease, truth, tokens)
        lease.release()
        audit(cache)
    assert client.serve(b"", list(range(8))) == 8


def test_a_block_goes_only_after_those_behind_it() -> None:
    cache = PagedCache(40 * 1024)
    client = Client(cache, b"m", 4, 256)
    for seed in range(60):
        client.serve(b"%d" % (seed % 7), [seed % 7, *range(seed % 11, 30)])
        audit(cache)  # every node in memory has its parent there
    assert cache.statistics().evictions > 50


def test_what_is_used_often_stays() -> None:
    cache = PagedCache(40 * 1024)
    client = Client(cache, b"m", 4, 256)
    hot = list(range(16))
    for seed in range(200):
        assert client.serve(b"", hot) == (16 if seed else 0)
        client.serve(b"", [100 + seed % 150, *range(20)])


def test_what_costs_more_to_compute_stays_longer() -> None:
    """Of two models that take turns, the blocks of the costlier one are kept."""
    cache = PagedCache(256 * 1024)
    cheap = Client(cache, b"cheap", 4, 256, cost=1.0)
    costly = Client(cache, b"costly", 4, 256, cost=50.0)
    reused = [0, 0]
    for turn in range(1_200):
        items = [turn % 40, *range(23)]
        reused[0] += cheap.serve(b"", items)
        reused[1] += costly.serve(b"", items)
    audit(cache)
    assert reused[1] > 2 * reused[0]


def test_a_new_space_gets_memory_that_an_idle_one_has() -> None:
    cache = PagedCache(256 * 1024)
    old, new = Client(cache, b"old", 4, 256), Client(cache, b"new", 8, 160)
    for seed in range(100):
        old.serve(b"", [seed, *range(30)])
    for seed in range(100):
        new.serve(b"", [seed, *range(30)])
    assert sum(new.serve(b"", [seed, *range(30)]) for seed in range(80, 100)) == 20 * 31
    audit(cache)


def test_a_block_of_many_owners_is_nobodys() -> None:
    cache = PagedCache(1 << 20)
    client = Client(cache, b"m", 4, 100)
    for number in range(50):
        client.serve(b"", list(range(8)), owner=f"user {number}")
    audit(cache)
    assert not cache._store.owners, "owners of what everybody shares are not all remembered"
    assert cache.evict("user 3") == 0
    assert client.serve(b"", list(range(8))) == 8


def test_an_owner_is_remembered_when_the_end_of_a_history_is_gone() -> None:
    dropped = []
    for others in range(30):
        cache = PagedCache(40 * 1024)
        # Where nothing costs anything, what was used first goes first, last blocks before others.
        client = Client(cache, b"m", 4, 256, cost=0.0)
        client.serve(b"", list(range(32)), owner="ada")
        for seed in range(others):
            client.serve(b"", [100 + seed, *range(31)])
        held = cache.statistics().entries
        dropped.append(cache.evict("ada"))
        assert cache.statistics().entries == held - dropped[-1]
        audit(cache)
    assert dropped[0] == 8
    assert dropped[-1] == 0
    assert any(0 < count < 8 for count in dropped)


def test_long_histories_take_no_recursion() -> None:
    cache = PagedCache(64 << 20)
    client = Client(cache, b"m", 2, 64)
    items = [i % 251 for i in range(10_000)]
    assert client.serve(b"", items, owner="ada") == 0
    assert client.serve(b"", items) == 10_000
    other = Client(cache, b"other", 1, 1 << 20)
    other.serve(b"", list(range(63)))
    cache.clear()
    cache.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"file": "x"}, "file: 'x' and file_bytes: 0, expected both or neither"),
        ({"file_bytes": "1GiB"}, "expected both or neither"),
        ({"file": "x", "file_bytes": "much"}, "file_bytes: 'much', expected a number of bytes"),
        ({"file": "x", "file_bytes": 100}, "file_bytes: 100, expected at least"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PagedCache(1 << 20, **options)  # type: ignore[arg-type]


def test_sizes_that_cannot_be() -> None:
    cache = PagedCache(1 << 20)
    facts = {"block_tokens": 4, "block_bytes": 64, "token_cost": 1.0, "pair_cost": 0.0}
    for name in facts:
        with pytest.raises(ValueError, match=f"{name}: -1, expected at least"):
            cache.space(b"m", **(facts | {name: -1}))  # type: ignore[arg-type]
    space = cache.space(b"m", **facts)  # type: ignore[arg-type]
    lease = space.acquire(b"", content_of([1, 2]), 2)
    assert lease is not None
    with pytest.raises(ValueError, match="tokens: 3, expected 0 to 2"):
        lease.commit(3)
    lease.release()
    with pytest.raises(ValueError, match="content: width 2, expected 3 as before"):
        space.acquire(b"", content_of([1])[:, :2].copy(), 1)


def test_a_block_larger_than_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(PagedCache(8192), b"m", 4, 4096)
    assert client.space.acquire(b"", content_of([1]), 1) is None
    assert "raise capacity_bytes" in caplog.text


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    """Measured from outside: what the process has resident grows by the capacity at most."""
    code = """
import os, resource
import numpy as np
from gr_kernels.cache.paged import PagedCache
import ctypes
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
cache = PagedCache(64 << 20)
spaces = [cache.space(b"%d" % i, block_tokens=32, block_bytes=b, token_cost=1, pair_cost=0)
    for i, b in enumerate((131072, 200000))]
rng = np.random.default_rng(0)
before, most = resident(), 0
for turn in range(100):
    content = rng.integers(0, 256, (512, 48), np.uint8)
    lease = spaces[turn // 10 % 2].acquire(b"", content, 512)
    for block in lease.blocks:
        ctypes.memset(int(block), 1, 131072)
    lease.commit(512)
    lease.release()
    most = max(most, resident() - before)
print(most)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 48 << 20 < int(result.stdout) < (64 + 6) << 20
