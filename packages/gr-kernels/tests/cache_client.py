"""Uses the paged cache as an engine would, with bytes that play K and V, and looks inside it.

K and V of a token are a function of the namespace, the salt and the content of all tokens up to
there, written by whoever holds a lease. Reused bytes must be those.
"""

from __future__ import annotations

import ctypes
import hashlib

import numpy as np
import numpy.typing as npt

from gr_kernels.cache.paged import PagedCache, PagedLease, PagedSpace
from gr_kernels.cache.store import Store
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
    for store in cache._stores.values():
        _audit(store)
    told = cache.statistics()
    assert 0 <= told.bytes <= told.capacity_bytes
    assert told.entries == sum(
        n.block is not None
        for store in cache._stores.values()
        for t in store.trees.values()
        for n in t.index.values()
    )


def _audit(store: Store) -> None:
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
        if store.slots is not None:
            slots = store.slots.shares[tree]
            there = [place for slab in slots.slabs for place in slab.places]
            taken = {n.slot for n in nodes if n.slot is not None}
            assert len(there) == slots.places == len(slots.free) + len(taken)
            assert set(there) == set(slots.free) | taken
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert node.block is None or node.block.node is node
            assert node.slot is None or node.slot.node is node
            assert node.writer is None or node.writer in store.holders
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
            if store.slots is not None:
                slots = store.slots.shares[tree]
                in_use = node.block is None and (node.count or node.pins)
                assert (node in slots.queue) == (node.slot is not None and not in_use)
        assert set(share.queue) <= set(nodes)
    assert marked == store.owners
    assert reserved == store.arena.reserved <= store.arena.capacity
