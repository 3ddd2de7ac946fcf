"""The host's memory behind a device's: blocks that were evicted, until the process ends.

What is saved and loaded is on its way when these return; `Transfers` keeps the order, so a slot may
be read or written again at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gr_kernels.cache.arena import Arena, Block, MemorySlab, Slab
from gr_kernels.cache.layout import Layout
from gr_kernels.cache.tier import Record

if TYPE_CHECKING:
    from gr_kernels.cache.tree import Node, Tree
    from gr_kernels.cuda.transfers import Transfers


class HostSlot(Block):
    """A place in the host's memory."""

    __slots__ = ("rows",)

    def __init__(self, slab: Slab, address: int) -> None:
        super().__init__(slab, address)
        self.rows = b""
        """Content of its block's tokens."""


class HostTier:
    """Implements `gr_kernels.cache.store.Tier`: at most ``capacity`` bytes of pinned memory."""

    name = "the host's memory behind a device"
    option = "host_bytes"
    outlives = False

    def __init__(self, capacity: int, transfers: Transfers) -> None:
        self.capacity = capacity
        self._transfers = transfers
        self._arena = Arena(capacity, transfers.host, HostSlot)
        self._slabs: set[MemorySlab] = set()

    def slab_for(self, tree: Tree) -> MemorySlab | None:
        slab = self._arena.slab_for(tree)
        if slab is not None:
            self._slabs.add(slab)
        return slab

    def full(self, tree: Tree) -> bool:
        return self._arena.full(tree) and self.fits(tree)

    def give_back(self, slab: MemorySlab) -> None:
        self._slabs.discard(slab)
        self._arena.give_back(slab)

    def fits(self, tree: Tree) -> bool:
        return self._arena.most(tree.layout.block_bytes) > 0

    def slot_bytes(self, layout: Layout) -> int:
        return self._arena.stride(layout.block_bytes)

    def slabs(self) -> Iterable[tuple[Slab, Layout, list[Record]]]:
        return ()

    def save(self, node: Node, slot: HostSlot) -> bool:
        assert node.block is not None
        assert node.rows is not None
        slot.rows = node.rows
        self._transfers.save(slot.address, node.block.address, node.tree.layout.block_bytes)
        return True

    def describe(self, node: Node, slot: HostSlot) -> None:
        """The nodes know it."""

    def load(self, node: Node, slot: HostSlot, block: Block) -> bytes:
        layout = node.tree.layout
        self._transfers.copy(block.address, slot.address, layout.block_bytes, layout.layers)
        return slot.rows

    def rows(self, node: Node, slot: HostSlot) -> bytes:
        return slot.rows

    def erase(self, slot: HostSlot, tree: Tree, *, wipe: bool) -> None:
        slot.rows = b""

    def close(self) -> None:
        for slab in list(self._slabs):
            self.give_back(slab)
