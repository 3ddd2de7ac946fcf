"""The paged cache against a naive model, and its rules one by one.

K and V of a token are played by bytes that are a function of the namespace, the salt and the
content of all tokens up to there, written by whoever holds a lease. Reused bytes must be those.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gr_core.testing import BlockCacheSuite
from gr_kernels.cache.paged import PagedCache, PagedLease, PagedSpace
from gr_kernels.cache.tree import MAX_MARKS, Node

WIDTH = 3
Content = npt.NDArray[np.uint8]


def content_of(items: list[int]) -> Content:
    return np.array([[n, n // 2, 7] for n in items], np.uint8).reshape(-1, WIDTH)


class Client:
    """Uses a space as an engine would: writes K and V of new tokens, and checks reused ones."""

    def __init__(
        self, cache: PagedCache, name: bytes, block_tokens: int, token_bytes: int, cost: float = 1.0
    ) -> None:
        self.name = name
        self.block_tokens = block_tokens
        self.token_bytes = token_bytes
        self.space: PagedSpace = cache.space(
            name,
            block_tokens=block_tokens,
            block_bytes=block_tokens * token_bytes,
            token_cost=cost,
            pair_cost=cost / 100,
        )

    def truth(self, salt: bytes, content: Content) -> list[bytes]:
        """K and V of each token."""
        state = hashlib.blake2b(repr((self.name, self.block_tokens, salt)).encode())
        found = []
        for row in content:
            state.update(row.tobytes())
            word = state.digest()
            found.append((word * (self.token_bytes // len(word) + 1))[: self.token_bytes])
        return found

    def address(self, lease: PagedLease, token: int) -> int:
        block, offset = divmod(token, self.block_tokens)
        return int(lease.blocks[block]) + offset * self.token_bytes

    def write(self, lease: PagedLease, truth: list[bytes], tokens: int) -> None:
        for i in range(lease.reused, tokens):
            ctypes.memmove(self.address(lease, i), truth[i], self.token_bytes)

    def check(self, lease: PagedLease, truth: list[bytes], tokens: int) -> None:
        for i in range(tokens):
            found = ctypes.string_at(self.address(lease, i), self.token_bytes)
            assert found == truth[i], f"token {i} of {len(truth)}, {lease.reused} reused"

    def serve(
        self, salt: bytes, items: list[int], owner: str = "", reusable: int | None = None
    ) -> int:
        """One request from beginning to end; how many tokens it reused."""
        content = content_of(items)
        lease = self.space.acquire(
            salt, content, len(items) if reusable is None else reusable, owner
        )
        assert lease is not None
        truth = self.truth(salt, content)
        self.check(lease, truth, lease.reused)
        self.write(lease, truth, len(items))
        lease.commit(len(items))
        self.check(lease, truth, len(items))
        lease.release()
        return lease.reused


def audit(cache: PagedCache) -> None:
    """Everything that must hold of the nodes, the pools and the marks, at any time."""
    store = cache._store
    reserved = 0
    marked: dict[bytes, set[Node]] = {}
    pins: dict[Node, int] = {}
    for holder in store.holders:
        pins[holder.node] = pins.get(holder.node, 0) + 1
    for tree in store.trees.values():
        nodes = list(tree.index.values())
        reached = [n for root in tree.roots.values() for n in root.descendants() if not n.is_root]
        assert set(reached) == set(nodes), "all nodes hang on roots"
        assert len(reached) == len(nodes)
        for root in tree.roots.values():
            assert root.count or root.pins
        share = store.memory.shares[tree]
        own = {b for h in store.holders if h.tree is tree for b in h.own}  # type: ignore[attr-defined]
        places = [place for slab in share.slabs for place in slab.places]
        used = {n.block for n in nodes if n.block is not None}
        assert len(places) == share.places
        assert len(set(places)) == len(share.free) + len(used) + len(own), "free + used = all"
        assert set(places) == set(share.free) | used | own
        for place in places:
            assert place.leased == (place in own)
            assert (place.node is not None) == (place in used)
            assert place.address % 64 == 0  # type: ignore[attr-defined]
        reserved += sum(slab.bytes for slab in share.slabs)  # type: ignore[attr-defined]
        if store.file is not None:
            slots = store.file.shares[tree]
            there = [place for slab in slots.slabs for place in slab.places]
            taken = {n.slot for n in nodes if n.slot is not None}
            assert len(there) == slots.places == len(slots.free) + len(taken)
            assert set(there) == set(slots.free) | taken
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert node.pins == pins.get(node, 0)
            assert node.start == parent.start + parent.tokens
            assert node.start % tree.layout.block_tokens == 0
            assert 0 < node.tokens <= tree.layout.block_tokens
            children = [n for bucket in node.children.values() for n in bucket]
            assert node.count == len(children)
            assert node.in_memory == sum(n.block is not None for n in children)
            assert not children or node.tokens == tree.layout.block_tokens
            assert node.block is not None or node.slot is not None
            assert node.block is None or parent.is_root or parent.block is not None
            assert node.block is not None or not node.pins
            assert (node.rows is None) == (node.block is None)
            assert node.marks or node.count or node.pins, "nobody needs this leaf"
            assert len(node.marks) <= MAX_MARKS
            for mark in node.marks - {b""}:
                marked.setdefault(mark, set()).add(node)
            free = node.block is not None and not node.pins and not node.in_memory
            assert (node in share.queue) == free
            if store.file is not None:
                slots = store.file.shares[tree]
                in_use = node.block is None and (node.count or node.pins)
                assert (node in slots.queue) == (node.slot is not None and not in_use)
        assert set(share.queue) <= set(nodes)
    assert marked == store.owners
    assert reserved == store.arena.reserved <= store.arena.capacity
    told = cache.statistics()
    assert 0 <= told.bytes <= told.capacity_bytes
    assert told.entries == sum(
        n.block is not None for t in store.trees.values() for n in t.index.values()
    )


users = st.sampled_from(["ada", "bob", "eve", ""])
LAYOUTS = ((b"one", 4, 100), (b"two", 3, 64), (b"three", 5, 300))


class PagedMachine(RuleBasedStateMachine):
    """Users' histories grow, change and shrink; the cache is tiny, and sometimes has a file."""

    folder: Path
    file = False

    @initialize(blocks=st.integers(8, 60), file_slabs=st.integers(1, 3))
    def make(self, blocks: int, file_slabs: int) -> None:
        self.capacity = blocks * 1024
        self.options: dict[str, Any] = {}
        if self.file:
            path = self.folder / "kv"
            path.unlink(missing_ok=True)
            self.options = {"file": str(path), "file_bytes": 4096 + file_slabs * 65536}
        self.open()
        self.histories: dict[tuple[str, bytes], list[int]] = {}
        self.next_item = 0
        # (namespace, salt, prefix) that was ever committed: nothing else may be reused.
        self.known: set[tuple[bytes, bytes, bytes]] = set()
        self.hits = self.reused_max = 0

    def open(self) -> None:
        self.cache = PagedCache(self.capacity, **self.options)
        self.clients: list[Client | None] = [Client(self.cache, *layout) for layout in LAYOUTS]
        self.held: list[tuple[int, PagedLease, bytes, Content, list[bytes], int]] = []
        self.asked = 0

    def fresh(self, count: int) -> list[int]:
        self.next_item += count
        return [(self.next_item - i) % 251 for i in range(count)]

    def begin(self, which: int, salt: bytes, items: list[int], owner: str, less: int) -> None:
        client = self.clients[which]
        if client is None:
            client = self.clients[which] = Client(self.cache, *LAYOUTS[which])
        content = content_of(items)
        limit = max(0, len(items) - less)
        lease = client.space.acquire(salt, content, limit, owner)
        if lease is None:
            assert self.held or len(items) * client.token_bytes > self.capacity // 4, "no memory"
            return
        assert len(lease.blocks) == -(-len(items) // client.block_tokens)
        assert 0 <= lease.reused <= limit
        if lease.reused:
            prefix = content[: lease.reused].tobytes()
            assert (client.name, salt, prefix) in self.known
        self.hits += lease.reused
        truth = client.truth(salt, content)
        client.check(lease, truth, lease.reused)
        self.held.append((which, lease, salt, content, truth, lease.reused))

    salts = st.sampled_from([b"", b"x"])
    layouts = st.sampled_from(range(len(LAYOUTS)))

    @rule(which=layouts, salt=salts, user=users, more=st.integers(0, 9), less=st.integers(0, 2))
    def grow(self, which: int, salt: bytes, user: str, more: int, less: int) -> None:
        items = self.histories.setdefault((user, salt), [])
        items += self.fresh(more)
        del items[40:]
        self.begin(which, salt, items, user, less)

    @rule(which=layouts, salt=salts, user=users, data=st.data())
    def edit(self, which: int, salt: bytes, user: str, data: st.DataObject) -> None:
        items = self.histories.setdefault((user, salt), self.fresh(6))
        if items:
            place = data.draw(st.integers(0, len(items) - 1))
            items[place : place + 1] = self.fresh(data.draw(st.integers(0, 2)))
        self.begin(which, salt, items, user, 0)

    @rule(which=layouts, salt=salts, user=users, data=st.data())
    def truncate(self, which: int, salt: bytes, user: str, data: st.DataObject) -> None:
        items = self.histories.setdefault((user, salt), self.fresh(9))
        del items[data.draw(st.integers(0, len(items))) :]
        self.begin(which, salt, items, user, 0)

    @rule(which=layouts, salt=salts, user=users, data=st.data())
    def reorder(self, which: int, salt: bytes, user: str, data: st.DataObject) -> None:
        items = self.histories.setdefault((user, salt), self.fresh(9))
        items[:] = data.draw(st.permutations(items))
        self.begin(which, salt, items, user, 0)

    @rule(which=layouts, salt=salts, user=users, other=users, more=st.integers(0, 3))
    def imitate(self, which: int, salt: bytes, user: str, other: str, more: int) -> None:
        """Another user with the same history, or nearly so."""
        items = list(self.histories.get((other, salt), [])) + self.fresh(more)
        self.histories[user, salt] = items
        self.begin(which, salt, items, user, 0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.held) - 1))
        which, lease, salt, content, truth, done = self.held[place]
        client = self.clients[which]
        tokens = data.draw(st.integers(done, len(content)))
        assert client is not None
        client.write(lease, truth, tokens)
        lease.commit(tokens)
        for i in range(tokens + 1):
            self.known.add((client.name, salt, content[:i].tobytes()))
        self.held[place] = (which, lease, salt, content, truth, tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), finish=st.booleans())
    def release(self, data: st.DataObject, finish: bool) -> None:
        place = data.draw(st.integers(0, len(self.held) - 1))
        which, lease, salt, content, truth, done = self.held[place]
        client = self.clients[which]
        if finish and client is not None:
            client.write(lease, truth, len(content))
            lease.commit(len(content))
            done = len(content)
            for i in range(done + 1):
                self.known.add((client.name, salt, content[:i].tobytes()))
        if client is not None:
            client.check(lease, truth, done)
        lease.release()
        lease.release()
        del self.held[place]

    @rule(user=st.sampled_from(["ada", "bob", "eve"]))
    def evict(self, user: str) -> None:
        assert self.cache.evict(user) >= 0
        assert self.cache.evict(user) == 0

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.known.clear()
        if not self.held:
            assert self.cache.statistics().entries == self.cache.statistics().bytes == 0

    @rule(which=layouts)
    def close_space(self, which: int) -> None:
        client = self.clients[which]
        if client is not None and not any(held[0] == which for held in self.held):
            client.space.close()
            client.space.close()
            assert client.space.acquire(b"", content_of([1]), 1) is None
            self.clients[which] = None
            if not self.file:
                self.known = {entry for entry in self.known if entry[0] != client.name}

    @rule()
    def reopen(self) -> None:
        for _, lease, *_ in self.held:
            lease.release()
        self.cache.close()
        self.cache.close()
        assert self.cache._store.arena.reserved == 0
        if not self.file:
            self.known.clear()
        self.open()

    @invariant()
    def it_is_whole(self) -> None:
        if hasattr(self, "cache"):
            audit(self.cache)
            for which, lease, _, _, truth, done in self.held:
                client = self.clients[which]
                assert client is not None
                client.check(lease, truth, done)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for _, lease, *_ in self.held:
            lease.release()
        audit(self.cache)
        self.cache.clear()
        assert self.cache._store.arena.reserved == 0, "nothing leaks"
        assert not self.cache._store.owners
        self.cache.close()


STEPS = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestInMemory = PagedMachine.TestCase
TestInMemory.settings = STEPS


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    PagedMachine.folder = tmp_path_factory.mktemp("machine")


class FileMachine(PagedMachine):
    """The same with a file, which remembers over a restart."""

    file = True


TestWithFile = FileMachine.TestCase
TestWithFile.settings = STEPS


class TestPaged(BlockCacheSuite):
    cache = "paged"
