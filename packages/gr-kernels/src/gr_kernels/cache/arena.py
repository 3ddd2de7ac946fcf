"""Memory in slabs: bounded, reserved when needed, never moved.

A slab is cut into places of one size. Spaces of different block sizes share a budget by taking and
giving back whole slabs, so there is nothing to compact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gr_kernels.cache.memory import Buffer, Memory

if TYPE_CHECKING:
    from gr_kernels.cache.tree import Node, Tree

_SMALLEST, _LARGEST = 1 << 18, 1 << 25
"""Bounds of a slab's size where a block is not larger, in bytes."""
_PARTS = 64
"""A slab is at most this part of the budget, so that spaces share it in small steps."""


class Place:
    """Room for one block, in memory or in a file. Free where no node and no lease has it."""

    __slots__ = ("leased", "node", "slab")

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.node: Node | None = None
        self.leased = False


PlaceT = TypeVar("PlaceT", bound=Place)


class Slab:
    """Places of one size, side by side."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        self.places: list[Place] = []


class Block(Place):
    """A place in memory."""

    __slots__ = ("address",)

    def __init__(self, slab: Slab, address: int) -> None:
        super().__init__(slab)
        self.address = address


class MemorySlab(Slab):
    """A piece of memory, cut into blocks."""

    __slots__ = ("_buffer", "bytes")

    def __init__(
        self, buffer: Buffer, size: int, stride: int, count: int, place: type[Block]
    ) -> None:
        super().__init__()
        self._buffer = buffer
        self.bytes = size
        self.places += [place(self, buffer.address + i * stride) for i in range(count)]

    def free(self) -> None:
        self.places.clear()
        self._buffer.free()


class Arena:
    """Slabs of a memory, together never more than ``capacity_bytes``, with places of a kind."""

    def __init__(self, capacity_bytes: int, memory: Memory, place: type[Block] = Block) -> None:
        self.capacity = capacity_bytes
        self.reserved = 0
        self._memory = memory
        self._place = place
        self._target = min(max(capacity_bytes // _PARTS, _SMALLEST), _LARGEST)
        self._refused = False
        """Whether the system had no more, since a slab was given back."""

    def stride(self, block_bytes: int) -> int:
        """Bytes from one block to the next."""
        alignment = self._memory.alignment
        return -(-block_bytes // alignment) * alignment

    def most(self, block_bytes: int) -> int:
        """Blocks of one size that could be had at best."""
        return self._floor(self.capacity) // self.stride(block_bytes)

    def slab_for(self, tree: Tree) -> MemorySlab | None:
        """A new slab for a tree's blocks; None if there is not room for one."""
        stride = self.stride(tree.layout.block_bytes)
        count = min(max(1, self._target // stride), self._left() // stride)
        if not count or self._refused:
            return None
        size = -self._floor(-stride * count)
        buffer = self._memory.allocate(size)
        if buffer is None:
            self._refused = True  # asking is slow, most of all on a device
            return None
        self.reserved += size
        return MemorySlab(buffer, size, stride, count, self._place)

    def full(self, tree: Tree) -> bool:
        return self._refused or self._left() < self.stride(tree.layout.block_bytes)

    def give_back(self, slab: MemorySlab) -> None:
        self.reserved -= slab.bytes
        self._refused = False
        slab.free()

    def _left(self) -> int:
        return self._floor(self.capacity - self.reserved)

    def _floor(self, size: int) -> int:
        """The next multiple of the memory's granularity, downwards."""
        return size // self._memory.granularity * self._memory.granularity
