"""The paged cache on devices: blocks that come late, go to the host's memory and come back.

Without a GPU on a device that is played (`late_copies`), which is stricter than a real one: what is
not waited for is not there.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gr_core.contracts import Rates
from gr_kernels.cache import arena
from gr_kernels.cache.paged import PagedCache, PagedLease
from gr_kernels.cache.rates import most_saving
from gr_kernels.cuda import transfers
from gr_kernels.cuda.transfers import Transfers, measure_copies
from gr_kernels.engine.scratch import Scratch

from .cache_client import Content, audit, content_of
from .late_copies import LateCache, LateStream
from .test_cache import SALTS, USERS, World

MAX_HELD = 4


class Access(Protocol):
    """Reads and writes memory of a device, as what it computes would."""

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class HostAccess:
    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))


class CudaAccess:
    """On the stream that is current, where a device computes."""

    def read(self, address: int, size: int) -> bytes:
        found = np.empty(size, np.uint8)
        self._copy(found.ctypes.data, address, size)
        return found.tobytes()

    def write(self, address: int, data: bytes) -> None:
        given = np.frombuffer(data, np.uint8)
        self._copy(address, given.ctypes.data, len(data))

    def _copy(self, to: int, of: int, size: int) -> None:
        stream = torch.cuda.current_stream()
        one, other = (np.array([address], np.uintp) for address in (to, of))
        transfers._cuda_runtime().copy(one, other, size, stream.cuda_stream)
        stream.synchronize()


@dataclass(frozen=True)
class Kind:
    """A model, and where it runs."""

    name: bytes
    block_tokens: int
    layers: int
    token_bytes: int
    """Of a layer."""
    device: str


@dataclass(eq=False)
class Held:
    client: LayeredClient
    lease: PagedLease
    salt: bytes
    content: Content
    truth: list[list[bytes]]


class LayeredClient:
    """Uses a space as an engine on a device would, layer by layer; checks what is reused."""

    def __init__(
        self, cache: PagedCache, kind: Kind, access: Access | None = None, cost: float = 1.0
    ) -> None:
        self.kind = kind
        self.access = access or HostAccess()
        self.part = kind.block_tokens * kind.token_bytes
        self.space = cache.space(
            kind.name,
            block_tokens=kind.block_tokens,
            block_bytes=self.part * kind.layers,
            token_cost=cost,
            pair_cost=cost / 100,
            device=kind.device,
            layers=kind.layers,
        )

    def truth(self, salt: bytes, content: Content) -> list[list[bytes]]:
        """K and V of each layer and token."""
        state = hashlib.blake2b(repr((self.kind.name, self.kind.block_tokens, salt)).encode())
        found: list[list[bytes]] = [[] for _ in range(self.kind.layers)]
        for row in content:
            state.update(row.tobytes())
            for layer, tokens in enumerate(found):
                word = hashlib.blake2b(state.digest() + bytes([layer])).digest()
                tokens.append((word * (self.kind.token_bytes // 64 + 1))[: self.kind.token_bytes])
        return found

    def acquire(
        self, salt: bytes, items: list[int], reusable: int | None = None, owner: str = ""
    ) -> Held | None:
        content = content_of(items)
        limit = len(items) if reusable is None else reusable
        lease = self.space.acquire(salt, content, limit, owner)
        if lease is None:
            return None
        assert len(lease.blocks) == -(-len(items) // self.kind.block_tokens)
        assert 0 <= lease.reused <= limit
        return Held(self, lease, salt, content, self.truth(salt, content))

    def address(self, lease: PagedLease, layer: int, token: int) -> int:
        block, offset = divmod(token, self.kind.block_tokens)
        return int(lease.blocks[block]) + layer * self.part + offset * self.kind.token_bytes

    def check(self, held: Held, layer: int, tokens: int) -> None:
        for i in range(tokens):
            found = self.access.read(self.address(held.lease, layer, i), self.kind.token_bytes)
            assert found == held.truth[layer][i], (
                f"layer {layer}, token {i} of {len(held.content)}, {held.lease.reused} reused"
            )

    def write(self, held: Held, layer: int) -> None:
        for i in range(held.lease.reused, len(held.content)):
            self.access.write(self.address(held.lease, layer, i), held.truth[layer][i])

    def serve(
        self, items: list[int], salt: bytes = b"", owner: str = "", reusable: int | None = None
    ) -> int:
        """One request from beginning to end; how many tokens it reused."""
        held = self.acquire(salt, items, reusable, owner)
        assert held is not None
        compute([held])
        held.lease.commit(len(items))
        held.lease.release()
        return held.lease.reused


def wait(held: Held, layer: int) -> None:
    if held.lease.arrivals is not None:
        held.lease.arrivals.wait(layer)


def compute(batch: Sequence[Held]) -> None:
    """All layers of a batch: each reads what is reused and writes what is new, and nothing else."""
    for layer in range(max((held.client.kind.layers for held in batch), default=0)):
        now = [held for held in batch if layer < held.client.kind.layers]
        for held in now:
            wait(held, layer)
        for held in now:
            held.client.check(held, layer, held.lease.reused)
            held.client.write(held, layer)
    for held in batch:
        for layer in range(held.client.kind.layers):
            held.client.check(held, layer, len(held.content))


KINDS = (
    Kind(b"one", 4, 3, 32, "late:0"),
    Kind(b"two", 3, 2, 40, "late:0"),
    Kind(b"three", 5, 1, 300, "late:0"),
    Kind(b"one", 4, 3, 32, "late:1"),
    Kind(b"one", 4, 3, 32, "cpu"),
)


class DeviceWorld(World):
    """As on the host, on several devices; what is held is computed later, together, or never."""

    def __init__(self, device_bytes: int, host_bytes: int, seed: int | None) -> None:
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.rng = None if seed is None else random.Random(seed)
        super().__init__(1 << 20, None)

    def open(self) -> None:
        self.cache = LateCache(self.device_bytes, self.host_bytes, self.rng)
        self.layered: list[LayeredClient | None] = [None] * len(KINDS)
        self.batch: list[Held] = []

    def client(self, which: int) -> LayeredClient:
        which %= len(KINDS)
        client = self.layered[which]
        if client is None:
            client = self.layered[which] = LayeredClient(self.cache, KINDS[which])
            if which % 2:  # a single block is not worth it, several are
                bytes_per_second = client.part * client.kind.layers / client.kind.block_tokens
                client.space.set_rates(Rates(1.2 * bytes_per_second, 1.0, 1.5))
        return client

    def key(self, held: Held, tokens: int) -> tuple[bytes, bytes, bytes]:
        prefix = held.content[:tokens].tobytes()
        return repr(held.client.kind).encode(), held.salt, prefix

    def begin(self, which: int, user: int, salt: int, less: int) -> None:
        if len(self.batch) >= MAX_HELD:
            self.end(0, True)
        items = self.history(user, salt)
        del items[40:]
        limit = max(0, len(items) - less)
        client = self.client(which)
        held = client.acquire(SALTS[salt % 2], items, limit, USERS[user % 4])
        if held is None:
            # What several leases hold can be more than there is; what one needs cannot.
            bytes_needed = len(items) * client.kind.token_bytes * client.kind.layers
            assert self.batch or bytes_needed * 4 > self.device_bytes
            self.seen["refused"] += 1
            return
        reused = held.lease.reused
        assert not reused or self.key(held, reused) in self.known
        self.seen["reused"] += reused
        self.seen["late"] += held.lease.arrivals is not None
        self.batch.append(held)

    def end(self, place: int, finish: bool) -> None:
        """Computes what is held from ``place`` on, together; else one ends half waited for."""
        if not self.batch:
            return
        place %= len(self.batch)
        if finish:
            chosen = self.batch[place:]
            compute(chosen)
            for held in chosen:
                held.lease.commit(len(held.content))
                for i in range(len(held.content) + 1):
                    self.known.add(self.key(held, i))
        else:
            chosen = [self.batch[place]]
            for layer in range(len(chosen[0].content) % (chosen[0].client.kind.layers + 1)):
                wait(chosen[0], layer)
            self.seen["abandoned"] += 1
        for held in chosen:
            held.lease.release()
            held.lease.release()
            self.batch.remove(held)

    def clear(self) -> None:
        self.cache.clear()
        if not self.batch:
            self.known.clear()
            told = self.cache.statistics()
            assert told.entries == told.bytes == 0

    def close_space(self, which: int) -> None:
        which %= len(KINDS)
        client = self.layered[which]
        if client is None:
            return
        while places := [i for i, held in enumerate(self.batch) if held.client is client]:
            self.end(places[0], len(self.batch[places[0]].content) % 2 == 0)
        client.space.close()
        assert client.space.acquire(b"", content_of([1]), 1) is None
        self.layered[which] = None

    def reopen(self) -> None:
        self.count()
        for held in self.batch:
            held.lease.release()
        self.cache.close()
        self.cache.close()
        self.nothing_is_left()
        self.known.clear()
        self.open()

    def nothing_is_left(self) -> None:
        for stream in self.cache.streams.values():
            assert stream.device.taken == stream.host.taken == 0
            assert stream.device.most <= self.device_bytes
            assert stream.host.most <= self.host_bytes
            stream.synchronize()
            assert not stream.device.pieces
            assert not stream.host.pieces

    def count(self) -> None:
        told = self.cache.statistics()
        self.seen["evicted"] += told.evictions
        if "host" in told.tiers:
            self.seen["copied back"] += told.tiers["host"].hits
            self.seen["evicted from the host"] += told.tiers["host"].evictions

    def check(self) -> None:
        audit(self.cache)

    def finish(self) -> None:
        self.count()
        for held in self.batch:
            held.lease.release()
        audit(self.cache)
        self.cache.clear()
        for store in self.cache._stores.values():
            assert store.arena.reserved == 0, "nothing leaks"
            assert not store.owners
        self.cache.close()
        self.nothing_is_left()


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny caches have several, and spaces take them from each other."""
    monkeypatch.setattr(arena, "_SMALLEST", 2048)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize(
    "seed", [0, 5, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 13))]
)
def test_thousands_of_requests(seed: int, host: bool) -> None:
    """Odd seeds do copies at any time, even ones only when they are waited for."""
    rng = random.Random(seed)
    sizes = rng.choice([20, 32]) * 1024, rng.choice([12, 48]) * 1024
    world = DeviceWorld(sizes[0], sizes[1] * host, seed if seed % 2 else None)
    actions: list[tuple[Callable[[], None], float]] = [
        (lambda: world.grow(n(), n(), n() % 10), 3),
        (lambda: world.edit(n(), n(), n(), n() % 3), 0.5),
        (lambda: world.truncate(n(), n(), n()), 0.5),
        (lambda: world.swap(n(), n(), n(), n()), 0.3),
        (lambda: world.imitate(n(), n(), n()), 0.5),
        (lambda: world.begin(n(), n(), n(), n() % 3), 8),
        (lambda: world.end(n(), n() % 4 > 0), 4),
        (lambda: world.evict(n()), 0.1),
        (lambda: world.clear(), 0.02),
        (lambda: world.close_space(n()), 0.1),
        (lambda: world.reopen(), 0.04),
    ]

    def n() -> int:
        return rng.randrange(1000)

    for action in rng.choices([a for a, _ in actions], [w for _, w in actions], k=1_500):
        action()
        world.check()
    world.finish()
    assert world.seen["reused"] > 1_000, world.seen
    assert world.seen["evicted"] > 100, world.seen
    assert world.seen["abandoned"] > 20, world.seen
    if host:
        assert world.seen["late"] > 100, world.seen
        assert world.seen["copied back"] > 100, world.seen


numbers = st.integers(0, 60)
few = st.integers(0, 4)


class DeviceMachine(RuleBasedStateMachine):
    """The same steps, drawn by hypothesis: a failure comes with the shortest way to it."""

    @initialize(
        blocks=st.integers(12, 40),
        host=st.sampled_from([0, 8, 30]),
        seed=st.none() | st.integers(0, 99),
    )
    def make(self, blocks: int, host: int, seed: int | None) -> None:
        self.world = DeviceWorld(blocks * 512, host * 512, seed)

    @rule(which=few, user=few, salt=few, more=st.integers(1, 20))
    def serve(self, which: int, user: int, salt: int, more: int) -> None:
        self.world.grow(user, salt, more)
        self.world.begin(which, user, salt, 0)
        self.world.end(len(self.world.batch) - 1, True)

    @rule(which=few, user=few, salt=few, less=st.integers(0, 2))
    def begin(self, which: int, user: int, salt: int, less: int) -> None:
        self.world.begin(which, user, salt, less)

    @rule(place=few, finish=st.booleans())
    def end(self, place: int, finish: bool) -> None:
        self.world.end(place, finish)

    @rule(user=few, salt=few, place=numbers, count=st.integers(0, 2))
    def edit(self, user: int, salt: int, place: int, count: int) -> None:
        self.world.edit(user, salt, place, count)

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
        elif what > 8:
            self.world.reopen()
        elif what > 4:
            self.world.evict(number)

    @invariant()
    def it_is_whole(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


def test_machine() -> None:
    steps = settings(
        max_examples=40,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(DeviceMachine, settings=steps)


# ── Copies ────────────────────────────────────────────────────────────────────────────────────

places = st.integers(0, 2)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["save", "load", "copy"] * 4 + ["issue", "wait"]), places, places
        ),
        min_size=6,
        max_size=30,
    ),
    seed=st.integers(0, 999),
)
def test_copies_are_as_if_done_one_after_another(
    steps: list[tuple[str, int, int]], seed: int
) -> None:
    """Whatever is done together, and in whatever order that is."""
    stream = LateStream(random.Random(seed))
    copies = Transfers(stream)
    pieces = {"device": copies.device.allocate(1024), "host": copies.host.allocate(1024)}
    address: dict[tuple[str, int], int] = {}
    truth: dict[tuple[str, int], bytes] = {}
    for name, piece in pieces.items():
        assert piece is not None
        for i in range(3):
            address[name, i] = piece.address + i * 256
            truth[name, i] = f"{name} {i}".encode().ljust(96, b".")
            ctypes.memmove(address[name, i], truth[name, i], 96)
    for step, i, j in steps:
        to, of = {"save": (("host", i), ("device", j)), "load": (("device", i), ("host", j))}.get(
            step, (("device", i), ("device", j))
        )
        if step == "issue":
            copies.issue()
        elif step == "wait":
            if (arrivals := copies.arrivals()) is not None:
                arrivals.wait(2)
                assert all(
                    ctypes.string_at(address[place], 96) == content
                    for place, content in truth.items()
                )
        elif to != of:
            if step == "save":
                copies.save(address[to], address[of], 96)
            else:
                copies.copy(address[to], address[of], 96, 3)
            truth[to] = truth[of]
    copies.synchronize()
    for place, content in truth.items():
        assert ctypes.string_at(address[place], 96) == content
    assert copies.arrivals() is None


MODEL = Kind(b"model", 4, 4, 64, "late:0")
BLOCK = 4 * 4 * 64


def items_of(user: int, tokens: int = 30) -> list[int]:
    return [user, *range(tokens - 1)]


def fill(client: LayeredClient, users: int) -> None:
    for user in range(users):
        assert client.serve(items_of(user), owner=f"user {user}") == 0


def stream_of(cache: PagedCache) -> LateStream:
    assert isinstance(cache, LateCache)
    return cache.streams["late:0"]


def test_evicted_blocks_come_back_layer_by_layer() -> None:
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    stream = stream_of(cache)
    held = client.acquire(b"", items_of(0))
    assert held is not None
    assert held.lease.reused == 30
    arrivals = held.lease.arrivals
    assert arrivals is not None
    arrivals.start()
    reader = client.access.read
    for layer in range(4):
        here = client.address(held.lease, layer, 0)
        assert reader(here, 64) != held.truth[layer][0], "it comes only when it is waited for"
        arrivals.wait(layer)
        client.check(held, layer, 30)
    assert not stream.pending
    held.lease.release()
    told = cache.statistics()
    assert told.evictions > 0
    assert told.bytes <= told.capacity_bytes
    assert set(told.tiers) == {"host"}
    assert told.tiers["host"].hits == 30
    assert told.tiers["host"].entries > 40
    assert told.tiers["host"].bytes <= told.tiers["host"].capacity_bytes == 200 * BLOCK
    audit(cache)


def test_a_batch_is_copied_together() -> None:
    """All that its leases need, a layer at a time: a few launches, whatever its size."""
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    stream = stream_of(cache)
    stream.synchronize()
    before = stream.calls
    batch = [client.acquire(b"", items_of(user)) for user in (0, 1, 2)]
    assert stream.calls == before, "nothing is copied before it is known what all need"
    found = [held for held in batch if held is not None]
    assert len({id(held.lease.arrivals) for held in found}) == 1
    compute(found)
    assert stream.calls == before + 1 + MODEL.layers, "what is saved, and each layer"
    assert sum(held.lease.reused for held in found) == 90


def test_two_leases_share_blocks_that_are_on_their_way() -> None:
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    one, other = (client.acquire(b"", items_of(0)) for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.lease.blocks.tolist() == other.lease.blocks.tolist()
    assert cache.statistics().tiers["host"].hits == 30
    one.lease.release()
    compute([other])


def test_what_nobody_waited_for_is_waited_for_by_the_next() -> None:
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    for started in (False, True):
        held = client.acquire(b"", items_of(int(started)))
        assert held is not None
        assert held.lease.arrivals is not None
        if started:
            held.lease.arrivals.start()
        held.lease.release()
        again = client.acquire(b"", items_of(int(started)))
        assert again is not None
        assert again.lease.reused == 30
        assert again.lease.arrivals is not None, "its blocks are still coming"
        compute([again])
        again.lease.release()
    done = client.acquire(b"", items_of(1))
    assert done is not None
    assert done.lease.arrivals is None, "all is there"


def test_a_new_block_waits_until_what_was_in_it_is_saved() -> None:
    cache = LateCache(8 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    assert client.serve(list(range(32))) == 0
    held = client.acquire(b"", list(range(100, 132)))
    assert held is not None
    assert held.lease.reused == 0
    assert held.lease.arrivals is not None
    compute([held])
    held.lease.release()
    assert client.serve(list(range(32))) == 32


def test_a_part_of_a_block_is_copied() -> None:
    client = LayeredClient(LateCache(32 * BLOCK), MODEL)
    assert client.serve(list(range(30))) == 0
    assert client.serve([*range(29), 200, 201]) == 29
    assert client.serve(list(range(32))) == 30


def test_devices_and_the_host_are_worlds_apart(tmp_path: Path) -> None:
    cache = LateCache(32 * BLOCK, 40 * BLOCK)
    clients = [
        LayeredClient(cache, Kind(b"model", 4, 4, 64, device))
        for device in ("late:0", "late:1", "cpu")
    ]
    for client in clients:
        assert client.serve(items_of(0), owner="ada") == 0
        assert client.serve(items_of(0), owner="ada") == 30
        audit(cache)
    told = cache.statistics()
    assert (told.hits, told.misses, told.entries) == (90, 90, 24)
    assert told.capacity_bytes == (1 << 20) + 2 * 32 * BLOCK
    assert told.tiers["host"].capacity_bytes == 2 * 40 * BLOCK
    assert cache.evict("ada") == 24
    assert cache.statistics().bytes == 0
    assert not any(client.serve(items_of(0)) for client in clients)
    cache.clear()
    assert cache.statistics().entries == 0
    cache.close()
    assert clients[0].acquire(b"", items_of(0)) is None
    with pytest.raises(ValueError, match="expected cpu, cuda or cuda:N"):
        PagedCache(1 << 20).space(
            b"m", block_tokens=4, block_bytes=64, token_cost=1, pair_cost=0, device="late:0"
        )


def test_an_owner_is_dropped_from_the_hosts_memory_too() -> None:
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    assert cache.evict("user 3") == 8
    assert client.serve(items_of(3)) == 0
    assert client.serve(items_of(4)) == 30
    audit(cache)
    cache.clear()
    assert cache.statistics().tiers["host"].entries == 0
    audit(cache)


def test_a_closed_space_is_warm_when_it_is_opened_again() -> None:
    cache = LateCache(32 * BLOCK, 200 * BLOCK)
    client = LayeredClient(cache, MODEL)
    client.serve(items_of(0))
    client.space.close()
    assert cache.statistics().bytes == 0
    assert LayeredClient(cache, MODEL).serve(items_of(0)) == 30


def test_without_memory_of_the_host_nothing_comes_back() -> None:
    cache = LateCache(32 * BLOCK)
    client = LayeredClient(cache, MODEL)
    fill(client, 10)
    assert client.serve(items_of(9)) == 30
    assert client.serve(items_of(0)) == 0
    assert not cache.statistics().tiers


def test_a_device_that_has_less_than_it_may_take() -> None:
    """It makes do with what it got, for all models, and asks again when there may be more."""
    cache = LateCache(64 * BLOCK, 64 * BLOCK)
    client, other = (
        LayeredClient(cache, MODEL),
        LayeredClient(cache, Kind(b"b", 5, 2, 70, "late:0")),
    )
    stream = stream_of(cache)
    stream.device.limit = stream.host.limit = 16 * BLOCK
    for turn in range(60):
        client.serve(items_of(turn % 2))
        other.serve(items_of(turn % 2))
        audit(cache)
    assert stream.device.most <= 16 * BLOCK
    assert stream.host.most <= 16 * BLOCK
    assert cache.statistics().hits > 100


def test_threads() -> None:
    rng = random.Random(0)
    cache = LateCache(60 * BLOCK, 100 * BLOCK, rng)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        try:
            client = LayeredClient(cache, MODEL if seed % 2 else Kind(b"b", 5, 2, 70, "late:0"))
            for _ in range(60):
                client.serve(items_of(mine.randrange(12), mine.randrange(1, 40)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    audit(cache)
    assert cache.statistics().tiers["host"].hits > 0


# ── What is worth loading ─────────────────────────────────────────────────────────────────────

seconds = st.floats(0, 10)


@given(
    saved=st.lists(seconds, max_size=12),
    block=seconds,
    latency=seconds,
    instead=st.just(0.0) | seconds,
)
def test_the_best_number_of_blocks(
    saved: list[float], block: float, latency: float, instead: float
) -> None:
    def value(count: int) -> float:
        return sum(saved[:count]) - count * block - latency if count else instead

    best = most_saving(saved, block, latency, instead)
    assert value(best) >= max(value(count) for count in range(len(saved) + 1)) - 1e-9


@pytest.mark.parametrize("tokens", [32, 30, 5, 3])
@pytest.mark.parametrize("latency", [0.0, 1.0, 20.0, 1000.0])
@pytest.mark.parametrize("block_seconds", [0.5, 4.2, 4.7, 10.0])
def test_a_hit_never_costs_more_than_it_saves(
    tokens: int, latency: float, block_seconds: float
) -> None:
    """Against all that could have been loaded; token i costs 1 + i / 100."""
    for others in range(2, 10):
        cache = LateCache(16 * BLOCK, 400 * BLOCK)
        client = LayeredClient(cache, MODEL, cost=1.0)
        client.serve(items_of(0, tokens))
        for user in range(1, others):
            client.serve(items_of(user, 9))
        [tree] = [tree for tree in cache._stores["late:0"].trees.values() if tree.index]
        mine = [n for n in tree.index.values() if n.first == content_of([0])[0].tobytes()]
        path = sorted((n for first in mine for n in first.descendants()), key=lambda n: n.start)
        there = sum(n.tokens for n in path if n.block is not None)
        ends = sorted(n.start + n.tokens for n in path if n.block is None)

        def value(end: int, there: int = there) -> float:
            cost = sum(1 + i / 100 for i in range(there, end))
            loaded = -(-end // 4) - -(-there // 4)
            return cost - loaded * block_seconds - latency if loaded else 0.0

        client.space.set_rates(Rates(BLOCK / block_seconds, 1.0, latency))
        held = client.acquire(b"", items_of(0, tokens))
        assert held is not None
        assert held.lease.reused in [there, *ends]
        best = max(value(end) for end in [there, *ends])
        assert value(held.lease.reused) == pytest.approx(best)
        compute([held])
        held.lease.commit(tokens)
        held.lease.release()
        audit(cache)
        assert client.serve(items_of(0, tokens)) == tokens


def test_what_is_there_is_better_than_a_little_more_from_afar() -> None:
    """Of a block that differs, three tokens in memory rather than four that have to come."""
    cache = LateCache(16 * BLOCK, 100 * BLOCK)
    client = LayeredClient(cache, MODEL)
    client.serve([1, 2, 3, 4])
    for user in range(10, 20):
        client.serve(items_of(user, 9))
    client.serve([1, 2, 3, 9], reusable=0)
    client.space.set_rates(Rates(BLOCK / 3.0, 1.0))
    assert client.serve([1, 2, 3, 4, 5], reusable=4) == 3
    client.space.set_rates(Rates(BLOCK / 0.5, 1.0))
    for user in range(10, 20):
        client.serve(items_of(user, 9))
    client.serve([1, 2, 3, 9], reusable=0)
    assert client.serve([1, 2, 3, 4, 6], reusable=4) == 4


def test_rates_that_cannot_be() -> None:
    for rates, problem in (
        ((0.0, 1.0), "bytes_per_second: 0.0, expected more than 0"),
        ((1.0, float("nan")), "costs_per_second: nan, expected more than 0"),
        ((1.0, 1.0, -1.0), "latency_seconds: -1.0, expected at least 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            Rates(*rates)


# ── Options ───────────────────────────────────────────────────────────────────────────────────


def test_options_that_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="device_bytes: 'much', expected a number of bytes"):
        PagedCache(1 << 20, device_bytes="much")
    with pytest.raises(ValueError, match="host_bytes: -1, expected a number of bytes"):
        PagedCache(1 << 20, host_bytes=-1)
    with pytest.raises(ValueError, match="device_bytes: 0, expected more for blocks on late:0"):
        LayeredClient(LateCache(0), MODEL)
    with pytest.raises(ValueError, match="block_bytes: 1024, expected a multiple of 3 layers"):
        PagedCache(1 << 20).space(
            b"m", block_tokens=4, block_bytes=1024, token_cost=1, pair_cost=0, layers=3
        )
    client = LayeredClient(LateCache(100), MODEL)
    assert client.acquire(b"", [1]) is None
    assert "raise device_bytes" in caplog.text
    client = LayeredClient(LateCache(8 * BLOCK, 600), MODEL)
    assert client.serve(list(range(32))) == 0
    assert client.serve(list(range(40, 72))) == 0
    assert "raise host_bytes" in caplog.text


def test_scratch_is_aligned_and_used_again() -> None:
    scratch = Scratch(4, 1000)
    leases = [scratch.lease(tokens) for tokens in (0, 1, 400)]
    blocks = sorted(int(block) for lease in leases for block in lease.blocks)
    assert len(blocks) == 101
    assert all(block % 64 == 0 for block in blocks)
    assert all(after - before >= 1000 for before, after in pairwise(blocks))
    for lease in leases:
        assert lease.arrivals is None
        lease.release()
        lease.release()
    again = scratch.lease(404)
    assert sorted(again.blocks.tolist()) == blocks


# ── On a GPU ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(transfers.CudaMemory, "granularity", 512)


@pytest.mark.gpu
def test_on_a_gpu(small_pieces: None) -> None:
    """Histories that grow, in memory that is too small: saved, loaded, shared and copied."""
    rng = random.Random(0)
    cache = PagedCache(1 << 20, device_bytes=200_000, host_bytes=400_000)
    kinds = [Kind(b"one", 8, 4, 256, "cuda"), Kind(b"two", 4, 2, 512, "cuda:0")]
    clients = [LayeredClient(cache, kind, CudaAccess()) for kind in kinds]
    histories = [[user] for user in range(20)]
    with torch.cuda.stream(torch.cuda.Stream()):
        for turn in range(300):
            batch = []
            for history in rng.sample(histories, 3):
                history += [rng.randrange(250) for _ in range(rng.randrange(8))]
                del history[60:]
                if (held := clients[turn % 2].acquire(b"", history)) is not None:
                    batch.append(held)
            if turn % 7:
                compute(batch)
                for held in batch:
                    held.lease.commit(len(held.content))
            for held in batch:
                held.lease.release()
            audit(cache)
    told = cache.statistics()
    assert told.evictions > 100
    assert told.tiers["host"].hits > 100
    cache.close()


@pytest.mark.gpu
def test_copies_are_measured() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert 1e9 < measure_copies("cuda") < 1e13


@pytest.mark.gpu
def test_scratch_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lease = Scratch(4, 1000, "cuda").lease(9)
    access = CudaAccess()
    for i, block in enumerate(lease.blocks):
        assert block % 256 == 0
        access.write(int(block), bytes([i]) * 1000)
    for i, block in enumerate(lease.blocks):
        assert access.read(int(block), 1000) == bytes([i]) * 1000
