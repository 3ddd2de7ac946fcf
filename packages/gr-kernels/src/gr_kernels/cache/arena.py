"""Memory in slabs: bounded, reserved when needed, never moved.

A slab is cut into places of one size. Spaces of different block sizes share a budget by taking and
giving back whole slabs, so there is nothing to compact.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from gr_kernels.cache.tree import Node, Tree

ALIGNMENT = 64
"""Of blocks, in bytes: a cache line, and a register of AVX-512."""
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

    __slots__ = ("address", "view")

    def __init__(self, slab: Slab, address: int, view: memoryview) -> None:
        super().__init__(slab)
        self.address = address
        self.view = view


class MemorySlab(Slab):
    """Anonymous memory of this process, filled with zeros at first, on pages touched when used."""

    __slots__ = ("_memory", "bytes")

    def __init__(self, stride: int, block_bytes: int, count: int) -> None:
        super().__init__()
        self.bytes = _pages(stride * count)
        self._memory = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        probe = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(probe)
        del probe  # or the memory could not be given back
        with memoryview(self._memory) as whole:
            for i in range(count):
                view = whole[i * stride : i * stride + block_bytes]
                self.places.append(Block(self, base + i * stride, view))

    def free(self) -> None:
        for block in self.places:
            assert isinstance(block, Block)
            block.view.release()
        self.places.clear()
        self._memory.close()


class Arena:
    """Slabs of memory, together never more than ``capacity_bytes``."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity = capacity_bytes
        self.reserved = 0
        self._target = min(max(capacity_bytes // _PARTS, _SMALLEST), _LARGEST)

    def stride(self, block_bytes: int) -> int:
        """Bytes from one block to the next."""
        return -(-block_bytes // ALIGNMENT) * ALIGNMENT

    def most(self, block_bytes: int) -> int:
        """Blocks of one size that could be had at best."""
        return self.capacity // mmap.PAGESIZE * mmap.PAGESIZE // self.stride(block_bytes)

    def slab_for(self, tree: Tree) -> MemorySlab | None:
        """A new slab for a tree's blocks; None if there is not room for one."""
        block_bytes = tree.layout.block_bytes
        stride = self.stride(block_bytes)
        count = min(max(1, self._target // stride), self._left() // stride)
        if not count:
            return None
        try:
            slab = MemorySlab(stride, block_bytes, count)
        except OSError:  # the system has no more
            return None
        self.reserved += slab.bytes
        return slab

    def full(self, tree: Tree) -> bool:
        return self._left() < self.stride(tree.layout.block_bytes)

    def _left(self) -> int:
        return (self.capacity - self.reserved) // mmap.PAGESIZE * mmap.PAGESIZE

    def give_back(self, slab: MemorySlab) -> None:
        self.reserved -= slab.bytes
        slab.free()


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
