"""The nodes of all trees, where their blocks are, and whose they are. Not thread-safe.

What holds of every node, between calls:

- If it has a block, so have its ancestors. If it has neither block nor slot, it is not there.
- A node with `pins` has a block, and is not dropped; so neither are its ancestors.
- A leaf that is not pinned has at least one mark. An owner's nodes are those with its mark and
  their ancestors; what nobody's mark is below goes when an owner is evicted.
- The queues of the pools hold exactly the nodes that may be evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gr_kernels.cache.arena import Arena, Block, Place, Slab
from gr_kernels.cache.layout import Layout
from gr_kernels.cache.memory import Copies
from gr_kernels.cache.pool import Pool, SlabSource
from gr_kernels.cache.tier import Record
from gr_kernels.cache.tree import ANYONE, MAX_MARKS, Node, Tree


class Tier(SlabSource, Protocol):
    """What stands behind the memory: a file, or the host's memory behind a device's.

    The slots are its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def option(self) -> str:
        """Which option of the cache its size is."""
        ...

    @property
    def outlives(self) -> bool:
        """Whether it is there after the process."""
        ...

    @property
    def capacity(self) -> int:
        """In bytes."""
        ...

    def fits(self, tree: Tree) -> bool:
        """Whether a slab has room for a block."""
        ...

    def slot_bytes(self, layout: Layout) -> int: ...

    def slabs(self) -> Iterable[tuple[Slab, Layout, list[Record]]]:
        """What was there before; called once."""
        ...

    def save(self, node: Node, slot: Any) -> bool:
        """Takes over a node's block; False if that failed, and the slot is as good as empty."""
        ...

    def describe(self, node: Node, slot: Any) -> object:
        """Its owners changed."""
        ...

    def load(self, node: Node, slot: Any, block: Block) -> bytes | None:
        """Fills a block and returns its tokens' content; None if it is damaged."""
        ...

    def rows(self, node: Node, slot: Any) -> bytes | None:
        """The content of a block's tokens; None if it is damaged."""
        ...

    def erase(self, slot: Any, tree: Tree, *, wipe: bool) -> None:
        """Forgets a block; with ``wipe`` nothing of it may outlive the process."""
        ...

    def close(self) -> None: ...


class Holder:
    """Holds a node with its ancestors, and blocks that are no node's."""

    __slots__ = ("cancelled", "node", "own")

    node: Node
    """The last of its path, which it pins."""

    def __init__(self) -> None:
        self.own: set[Block] = set()
        self.cancelled = False
        """Whether it may publish nothing any more."""


class Store:
    """Memory of one device, and a tier behind it if there is one."""

    def __init__(self, arena: Arena, copies: Copies, tier: Tier | None = None) -> None:
        self.arena = arena
        self.copies = copies
        self.memory: Pool[Block] = Pool(self.arena, self._demote, self._held)
        self.tier = tier
        self.slots: Pool[Place] | None = None
        self.trees: dict[bytes, Tree] = {}
        self.holders: set[Holder] = set()
        self.owners: dict[bytes, set[Node]] = {}
        self.clock = 0.0
        """Value of the most valuable block that was evicted, see `Tree.touch`."""
        self.closed = False
        self.hits = self.misses = self.evictions = 0
        self.tier_hits = self.tier_evictions = 0
        """Tokens copied back, and blocks."""
        if tier is not None:
            self.slots = Pool(tier, self._forget, lambda: _is_loading)
            self._read(tier)

    # ── Nodes ─────────────────────────────────────────────────────────────────────────────────

    def pin(self, holder: Holder, node: Node) -> None:
        """Holds a node and its ancestors, instead of what the holder held before."""
        before = holder.node
        if before is node:
            return
        node.pins += 1
        self.settle(node)
        holder.node = node
        before.pins -= 1
        self.unpinned(before)

    def unpinned(self, node: Node) -> None:
        if node.pins:
            return
        if node.is_root:
            self._settle_root(node)
        else:
            self.settle(node)
            self.prune(node, wipe=False)

    def fill(self, node: Node, block: Block, rows: bytes) -> None:
        """Gives a node a block with its tokens."""
        assert node.parent is not None
        node.block, node.rows = block, rows
        block.node, block.leased = node, False
        node.parent.in_memory += 1
        self.settle(node)
        self.settle(node.parent)

    def detach(self, node: Node) -> None:
        """Takes a node's block from it."""
        assert node.block is not None
        assert node.parent is not None
        node.block.node = None
        node.block = node.rows = None
        node.parent.in_memory -= 1

    def rows(self, node: Node) -> bytes | None:
        """Content of a node's tokens; None if it is damaged."""
        if node.rows is not None:
            return node.rows
        assert self.tier is not None
        assert node.slot is not None
        return self.tier.rows(node, node.slot)

    def settle(self, node: Node) -> None:
        """Says whether a node may be evicted now, from memory and from the tier."""
        if node.is_root:
            return
        queue = self.memory.shares[node.tree].queue
        if node.block is not None and not node.pins and not node.in_memory:
            queue.add(node)
        else:
            queue.discard(node)
        if self.slots is not None:
            queue = self.slots.shares[node.tree].queue
            in_use = node.pins or node.count
            if node.slot is not None and (node.block is not None or not in_use):
                queue.add(node)
            else:
                queue.discard(node)

    def _settle_root(self, root: Node) -> None:
        if not root.pins and not root.count:
            root.tree.roots.pop(root.digest, None)

    def drop(self, node: Node) -> None:
        """Takes a leaf that nobody holds out of the tree; its owners' marks go to its parent."""
        parent, tree = node.parent, node.tree
        assert parent is not None
        tree.remove(node)
        block = node.block
        if block is not None:
            self.detach(node)
            self.memory.free(tree, block)
        self.release_slot(node)
        self.memory.shares[tree].queue.discard(node)
        if parent.is_root:
            for mark in node.marks:
                self._unmark(node, mark)
            self._settle_root(parent)
        else:
            self.move_marks(node, parent)
            self.settle(parent)

    def drop_all(self, node: Node) -> None:
        """Takes a node and all below it out, none of which is held."""
        for below in reversed(node.descendants()):
            self.drop(below)

    def prune(self, node: Node, *, wipe: bool) -> int:
        """Drops a node that nobody needs any more, then its ancestors of which that is true."""
        dropped = 0
        while not (node.is_root or node.marks or node.count or node.pins):
            if node.tree.index.get(node.digest) is not node:
                break
            parent = node.parent
            assert parent is not None
            if wipe:
                self.release_slot(node, wipe=True)
            self.drop(node)
            dropped += 1
            node = parent
        return dropped

    # ── Owners ────────────────────────────────────────────────────────────────────────────────

    def evict(self, mark: bytes) -> int:
        """Drops what only one owner needs and returns the number of nodes."""
        nodes = self.owners.pop(mark, set())
        for node in nodes:
            node.marks.discard(mark)
            self.describe(node)
        return sum(self.prune(node, wipe=True) for node in nodes)

    def clear(self) -> None:
        self.owners.clear()
        for tree in list(self.trees.values()):
            for node in tree.index.values():
                node.marks.clear()
            for node in sorted(tree.index.values(), key=lambda node: -node.start):
                self.prune(node, wipe=True)
            self.memory.shrink(tree)
            if self.slots is not None:
                self.slots.shrink(tree)
            self.retire(tree)

    def mark(self, node: Node, mark: bytes) -> None:
        """Notes that a sequence of an owner ends at a node, which is kept for it."""
        marks = node.marks
        if mark in marks or ANYONE in marks:
            return
        if mark == ANYONE or len(marks) >= MAX_MARKS:
            for old in marks:
                self._unmark(node, old)
            marks.clear()
            marks.add(ANYONE)
        else:
            marks.add(mark)
            self.owners.setdefault(mark, set()).add(node)
        self.describe(node)

    def _unmark(self, node: Node, mark: bytes) -> None:
        nodes = self.owners.get(mark)
        if nodes is not None:
            nodes.discard(node)
            if not nodes:
                del self.owners[mark]

    def move_marks(self, node: Node, other: Node) -> None:
        marks, node.marks = node.marks, set()
        for mark in marks:
            self._unmark(node, mark)
            self.mark(other, mark)

    def describe(self, node: Node) -> None:
        if self.tier is not None and node.slot is not None:
            self.tier.describe(node, node.slot)

    # ── Memory and tier ───────────────────────────────────────────────────────────────────────

    def _demote(self, node: Node) -> None:
        """Empties the block of a node and of all below it, into the tier where there is room."""
        self.clock = max(self.clock, node.priority)
        below = [n for n in node.descendants() if n.block is not None]
        self.evictions += len(below)
        for leaf in reversed(below):
            self.demote_leaf(leaf)

    def demote_leaf(self, node: Node) -> None:
        tree, block, parent = node.tree, node.block, node.parent
        assert block is not None
        assert parent is not None
        assert not node.pins
        assert not node.in_memory
        self.memory.shares[tree].queue.discard(node)
        if node.slot is None:
            self._save(node)
        if node.slot is None:
            self.drop_all(node)
            return
        self.detach(node)
        self.memory.free(tree, block)
        self.settle(node)
        self.settle(parent)

    def _save(self, node: Node) -> None:
        """Saves a node's block in the tier, if there is one with room."""
        if self.slots is None or self.tier is None:
            return
        slot = self.slots.place(node.tree)
        if slot is None:
            return
        if self.tier.save(node, slot):
            slot.node, node.slot = node, slot
        else:
            self.slots.free(node.tree, slot)

    def load(self, node: Node) -> bool:
        """Copies a block back from the tier; False if there is no memory, or it is damaged."""
        assert self.tier is not None
        assert node.slot is not None
        node.pins += 1
        self.settle(node)
        block = self.memory.place(node.tree)
        node.pins -= 1
        self.settle(node)
        if block is None:
            return False
        rows = self.tier.load(node, node.slot, block)
        if rows is None:
            self.memory.free(node.tree, block)
            self.drop_all(node)
            return False
        self.fill(node, block, rows)
        self.tier_hits += node.tokens
        return True

    def _forget(self, node: Node) -> None:
        """Empties the slot of a node: it stays in memory, or goes with all below it."""
        self.tier_evictions += 1
        if node.block is None:
            self.drop_all(node)
        else:
            self.release_slot(node)
            self.settle(node)

    def release_slot(self, node: Node, *, wipe: bool = False) -> None:
        slot = node.slot
        if slot is None:
            return
        node.slot = None
        if self.slots is not None and self.tier is not None:
            self.tier.erase(slot, node.tree, wipe=wipe)
            self.slots.free(node.tree, slot)
            self.slots.shares[node.tree].queue.discard(node)

    def copy(self, node: Node) -> Block | None:
        """A leased block with a node's content; None if there is no memory, or it is damaged."""
        node.pins += 1
        self.settle(node)
        block = self.memory.place(node.tree)
        node.pins -= 1
        self.settle(node)
        if block is None:
            return None
        block.leased = True
        if node.block is not None:
            layout = node.tree.layout
            self.copies.copy(block.address, node.block.address, layout.block_bytes, layout.layers)
            return block
        assert self.tier is not None
        assert node.slot is not None
        if self.tier.load(node, node.slot, block) is None:
            self.memory.free(node.tree, block)
            self.drop_all(node)
            return None
        self.tier_hits += node.tokens
        return block

    def _held(self) -> Callable[[Slab], bool]:
        """Which slabs of memory have blocks that are held."""
        slabs: set[Slab] = set()
        for holder in self.holders:
            slabs.update(block.slab for block in holder.own)
            node: Node | None = holder.node
            while node is not None and node.block is not None:
                slabs.add(node.block.slab)
                node = node.parent
        return slabs.__contains__

    # ── Trees ─────────────────────────────────────────────────────────────────────────────────

    def tree(self, layout: Layout) -> Tree:
        tree = self.trees.get(layout.namespace)
        if tree is None:
            tree = self.trees[layout.namespace] = Tree(layout)
            self.memory.join(tree)
            if self.slots is not None:
                self.slots.join(tree)
        return tree

    def close(self) -> None:
        """Saves what is in memory if that outlives the process, and frees what is not held."""
        self.closed = True
        if self.tier is not None and not self.tier.outlives:
            self.clear()
        for tree in list(self.trees.values()):
            tree.users = 0
            self.retire(tree)
        if self.tier is not None:
            self.tier.close()
            self.tier = self.slots = None

    def retire(self, tree: Tree) -> None:
        """Empties the memory of a tree without users, as far as nobody holds it."""
        if not tree.users:
            queue = self.memory.shares[tree].queue
            while (node := queue.peek()) is not None:
                self.demote_leaf(node)
            self.memory.shrink(tree)
            if not self.memory.shares[tree].slabs and not tree.index and not tree.roots:
                self._forget_tree(tree)

    def _forget_tree(self, tree: Tree) -> None:
        del self.trees[tree.layout.namespace]
        del self.memory.shares[tree]
        if self.slots is not None:
            self.slots.shrink(tree)
            del self.slots.shares[tree]

    def _read(self, tier: Tier) -> None:
        """Rebuilds the trees of the blocks in the tier, without those that lost their prefix."""
        assert self.slots is not None
        found: dict[Tree, list[Record]] = {}
        for slab, layout, records in tier.slabs():
            tree = self.tree(layout)
            self.slots.adopt(tree, slab, {record.slot for record in records})
            found.setdefault(tree, []).extend(records)
        for tree, records in found.items():
            for record in sorted(records, key=lambda record: record.start):
                self._attach(tree, record)
            for node in sorted(tree.index.values(), key=lambda node: -node.start):
                self.prune(node, wipe=False)
            for node in tree.index.values():
                self.settle(node)
            self.slots.shrink(tree)
            self.retire(tree)

    def _attach(self, tree: Tree, record: Record) -> None:
        assert self.slots is not None
        assert self.tier is not None
        parent = tree.index.get(record.parent) if record.start else tree.root(record.parent)
        size, width = tree.layout.block_tokens, tree.layout.width
        sound = (
            parent is not None
            and parent.start + parent.tokens == record.start
            and record.start % size == 0
            and record.digest not in tree.index
        )
        if not sound or parent is None:
            self.tier.erase(record.slot, tree, wipe=False)
            self.slots.free(tree, record.slot)
            if parent is not None and parent.is_root:
                self._settle_root(parent)
            return
        node = tree.add(parent, record.digest, record.rows[:width], record.tokens)
        node.slot, record.slot.node = record.slot, node
        node.hits = record.hits
        for mark in record.marks:
            node.marks.add(mark)
            if mark != ANYONE:
                self.owners.setdefault(mark, set()).add(node)


def _is_loading(slab: Slab) -> bool:
    """Whether a block of a slab of the tier is just being copied to memory."""
    return any(p.node is not None and p.node.block is None and p.node.pins for p in slab.places)
