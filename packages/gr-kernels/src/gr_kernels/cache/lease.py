"""The memory of one sequence: blocks found, shared in part, or fresh; then published."""

from __future__ import annotations

import threading
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gr_core.contracts import Arrivals
from gr_kernels.cache.arena import Block
from gr_kernels.cache.digests import chain, owner_digest, root_digest
from gr_kernels.cache.rates import most_saving
from gr_kernels.cache.store import Holder, Store
from gr_kernels.cache.tree import Node, Tree


class PagedLease(Holder):
    """Implements `gr_core.contracts.BlockLease`."""

    __slots__ = (
        "_addresses",
        "_arrivals",
        "_blocks",
        "_committed",
        "_data",
        "_digests",
        "_full",
        "_lock",
        "_next",
        "_reused",
        "_root",
        "_store",
        "_tail",
        "_tokens",
        "_tree",
        "owner",
    )

    _full: Node
    """The last node of its path that is full, or the root."""
    _addresses: npt.NDArray[np.uintp]

    def __init__(
        self,
        store: Store,
        lock: threading.Lock,
        tree: Tree,
        salt: bytes,
        content: npt.NDArray[np.uint8],
        owner: str,
    ) -> None:
        super().__init__()
        self.owner = owner_digest(owner)
        self._store = store
        self._lock = lock
        self._tree = tree
        self._data = data = content.tobytes()
        self._tokens = len(content)
        self._root = digest = root_digest(tree.layout.namespace, salt)
        size = tree.layout.rows_bytes
        self._digests = [
            digest := chain(digest, data[i : i + size])
            for i in range(0, len(data) - size + 1, size)
        ]
        """Of its full blocks."""
        self._blocks: list[Block] = []
        self._next = 0
        """Index of the block after `_full`."""
        self._tail: Node | None = None
        """The node after `_full`, where this lease may write behind its tokens."""
        self._committed = self._reused = 0
        self._arrivals: Arrivals | None = None

    @property
    def tree(self) -> Tree:
        return self._tree

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def blocks(self) -> npt.NDArray[np.uintp]:
        return self._addresses

    @property
    def arrivals(self) -> Arrivals | None:
        return self._arrivals

    @property
    def reused(self) -> int:
        return self._reused

    def commit(self, tokens: int) -> None:
        if not 0 <= tokens <= self._tokens:
            raise ValueError(f"tokens: {tokens}, expected 0 to {self._tokens}")
        with self._lock:
            if self in self._store.holders and not self.cancelled:
                self._publish(tokens)

    def release(self) -> None:
        with self._lock:
            self.give_back()

    # ── With the lock held ────────────────────────────────────────────────────────────────────

    def open(self, reusable: int) -> bool:
        """Finds or makes the blocks; False, and then nothing is held, if there are not enough."""
        store, tree = self._store, self._tree
        size = tree.layout.block_tokens
        needed = -(-self._tokens // size)
        if needed > store.arena.most(tree.layout.block_bytes):
            return False
        self.node = tree.root(self._root)
        self.node.pins += 1
        store.holders.add(self)
        self._reuse(max(0, min(reusable, self._tokens)))
        while len(self._blocks) < needed:
            block = store.memory.place(tree)
            if block is None:
                self.give_back()
                return False
            block.leased = True
            self.own.add(block)
            self._blocks.append(block)
        self._reused = self._committed
        self._addresses = np.array([block.address for block in self._blocks], np.uintp)
        self._arrivals = store.copies.arrivals()
        return True

    def give_back(self) -> None:
        store = self._store
        if self not in store.holders:
            return
        store.holders.discard(self)
        for block in self.own:
            store.memory.free(self._tree, block)
        self.own.clear()
        if self._tail is not None:
            self._tail.writer = None
        self.node.pins -= 1
        store.unpinned(self.node)
        if not self._tree.users:
            store.retire(self._tree)

    # ── What is there ─────────────────────────────────────────────────────────────────────────

    def _reuse(self, limit: int) -> None:
        """Takes the blocks of at most ``limit`` tokens that are known and worth it."""
        store, tree, node = self._store, self._tree, self.node
        size, width = tree.layout.block_tokens, tree.layout.width
        worth: _Worth | None = None
        for i, digest in enumerate(self._digests[: limit // size]):
            child = tree.index.get(digest)
            if child is None:
                break
            if child.block is None:
                worth = worth or self._worth(node, i, limit)
                if i >= worth.blocks:
                    break
                store.pin(self, node)
                if not store.load(child):
                    break
                assert child.block is not None
            tree.touch(child, store.clock)
            self._blocks.append(child.block)
            node = child
        store.pin(self, node)
        self._full, self._next = node, len(self._blocks)
        worth = worth or self._worth(node, self._next, limit)
        start = self._committed = self._next * size
        if start < limit:
            chunk = self._data[start * width : (start + size) * width]
            self._reuse_part(chunk, min(limit - start, size), worth.part)

    def _reuse_part(self, chunk: bytes, limit: int, may_load: bool) -> None:
        """Takes as many tokens of one more block as any node has, ``limit`` at most."""
        store, tree = self._store, self._tree
        node, common = self._most_alike(self._full, chunk, limit, may_load)
        if node is None:
            return
        # Where it is all that the sequence has of this block, the block will only be read.
        whole = common * tree.layout.width == len(chunk)
        if whole or (common == node.tokens and not node.pins):
            if node.block is None and not store.load(node):
                return
            assert node.block is not None
            store.pin(self, node)
            if not whole:
                node.writer, self._tail = self, node
            self._blocks.append(node.block)
        else:
            block = store.copy(node)
            if block is None:
                return
            self.own.add(block)
            self._blocks.append(block)
        tree.touch(node, store.clock)
        self._committed += common

    def _most_alike(
        self, parent: Node, chunk: bytes, limit: int, may_load: bool
    ) -> tuple[Node | None, int]:
        """The node with the most tokens in common with the next block, and how many."""
        tree, width = self._tree, self._tree.layout.width
        best: Node | None = None
        rank = (0, False, False)
        for node in list(tree.alike(parent, chunk[:width])):
            if node.block is None and not may_load:
                continue
            # A block that is being written to is left alone.
            rows = None if node.writer is not None else self._store.rows(node)
            if rows is None:
                continue
            common = _common_tokens(rows, chunk, limit, width)
            found = (common, common == node.tokens, node.block is not None)
            if found > rank:
                best, rank = node, found
        return best, rank[0]

    def _worth(self, node: Node, first: int, limit: int) -> _Worth:
        """What saves the most time of the blocks after ``node``, of which ``first`` is the next.

        None of them are in memory, but perhaps the begin of another one that is like the first.
        """
        tree, rates = self._tree, self._tree.rates
        size, width = tree.layout.block_tokens, tree.layout.width
        if rates is None:
            return _ALL

        def alike(i: int, after: Node, may_load: bool) -> tuple[Node | None, int]:
            start = i * size
            chunk = self._data[start * width : (start + size) * width]
            return self._most_alike(after, chunk, min(limit - start, size), may_load)

        def seconds(i: int, tokens: int) -> float:
            return tree.cost(i * size, tokens) / rates.costs_per_second

        instead = seconds(first, alike(first, node, False)[1])
        saved, i = [], first
        for digest in self._digests[first : limit // size]:
            child = tree.index.get(digest)
            if child is None:
                break
            saved.append(seconds(i, size))
            node, i = child, i + 1
        part, common = alike(i, node, True)
        if part is not None and part.block is None:
            saved.append(seconds(i, common))
        per_block = tree.layout.block_bytes / rates.bytes_per_second
        best = first + most_saving(saved, per_block, rates.latency_seconds, instead)
        return _Worth(best, best > i)

    # ── What is new ───────────────────────────────────────────────────────────────────────────

    def _publish(self, tokens: int) -> None:
        store, size, width = self._store, self._tree.layout.block_tokens, self._tree.layout.width
        while self._committed < tokens:
            i = self._next
            end = min((i + 1) * size, tokens)
            full = end == (i + 1) * size
            rows = self._data[i * size * width : end * width]
            digest = self._digests[i] if full else chain(self._full.digest, rows)
            node = self._publish_block(digest, rows, self._blocks[i])
            if node is None:
                self.cancelled = True
                break
            if full and node.writer is self:
                node.writer = None
            self._tail = node if node.writer is self else None
            if full:
                self._full, self._next = node, i + 1
            store.pin(self, node)
            self._committed = end
        if not self.node.is_root:
            store.mark(self.node, self.owner)

    def _publish_block(self, digest: bytes, rows: bytes, block: Block) -> Node | None:
        """The node for a block that was written: a new one, or what another lease published.

        None where no more can be published: others hold the node that this lease extended, so
        it cannot give way to one that has the same.
        """
        store, tree, parent, tail = self._store, self._tree, self._full, self._tail
        width = tree.layout.width
        node = tree.index.get(digest)
        if node is None and len(rows) < tree.layout.rows_bytes:
            node = self._longer(rows)
        if node is not None:
            if tail is not None and tail is not node:
                if tail.pins > 1:
                    return None
                self._give_way(tail, node)
            if node.block is None:
                self.own.discard(block)
                node.writer = self
                store.fill(node, block, rows)
            tree.touch(node, store.clock)
            return node
        if tail is not None:
            assert tail.block is block
            store.release_slot(tail)
            tree.extend(tail, digest, rows)
            node = tail
        else:
            self.own.discard(block)
            node = tree.add(parent, digest, rows[:width], len(rows) // width)
            node.writer = self
            store.fill(node, block, rows)
        tree.touch(node, store.clock)
        self._absorb(node, rows)
        return node

    def _longer(self, rows: bytes) -> Node | None:
        """Another's node that begins with some tokens and has more."""
        for node in self._tree.alike(self._full, rows[: self._tree.layout.width]):
            if node.block is not None and node.rows is not None and node.rows.startswith(rows):
                return node
        return None

    def _give_way(self, tail: Node, node: Node) -> None:
        """Drops the node that this lease extended, as another has the same; keeps its block."""
        store, block = self._store, tail.block
        assert block is not None
        store.pin(self, node)
        store.move_marks(tail, node)
        tail.writer = None
        store.detach(tail)
        block.leased = True
        self.own.add(block)
        store.drop(tail)

    def _absorb(self, node: Node, rows: bytes) -> None:
        """Drops shorter nodes that have nothing but what a new one has."""
        store = self._store
        for other in list(self._tree.alike(self._full, node.first)):
            if other.tokens < node.tokens and not other.pins and not other.count:
                known = store.rows(other)
                if known is not None and rows.startswith(known):
                    store.move_marks(other, node)
                    store.drop(other)


class _Worth(NamedTuple):
    """What is worth loading."""

    blocks: float
    """Of the sequence, counted from its first; full ones."""
    part: bool
    """Whether a part of one more is."""


_ALL = _Worth(inf, True)


def _common_tokens(rows: bytes, chunk: bytes, limit: int, width: int) -> int:
    """How many of the first tokens are the same, ``limit`` at most."""
    size = min(len(rows), len(chunk), limit * width)
    if rows[:size] == chunk[:size]:
        return size // width
    one = np.frombuffer(rows, np.uint8, size)
    other = np.frombuffer(chunk, np.uint8, size)
    return int(np.argmax(one != other)) // width
