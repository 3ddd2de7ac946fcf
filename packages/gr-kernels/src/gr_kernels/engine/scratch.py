"""Blocks for histories that no cache holds: memory of the engine's own, used again and again."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_SLAB_BLOCKS = 64


class ScratchLease:
    """Implements `gr_core.contracts.BlockLease`; nothing is ever reused."""

    reused = 0

    def __init__(self, scratch: Scratch, blocks: npt.NDArray[np.uintp]) -> None:
        self._scratch = scratch
        self.blocks = blocks

    def commit(self, tokens: int) -> None:
        """There is nobody to publish to."""

    def release(self) -> None:
        blocks, self.blocks = self.blocks, self.blocks[:0]
        self._scratch.give_back(blocks)


class Scratch:
    """Grows to the largest batch; bounded by what a batch may hold. One thread at a time."""

    def __init__(self, block_tokens: int, block_bytes: int) -> None:
        self._block_tokens = block_tokens
        self._block_bytes = -(-block_bytes // _ALIGNMENT) * _ALIGNMENT
        self._slabs: list[npt.NDArray[np.uint8]] = []
        self._free: list[int] = []

    def lease(self, tokens: int) -> ScratchLease:
        count = math.ceil(tokens / self._block_tokens)
        while len(self._free) < count:
            self._grow()
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return ScratchLease(self, np.array(taken, np.uintp))

    def give_back(self, blocks: npt.NDArray[np.uintp]) -> None:
        self._free.extend(blocks.tolist())

    def _grow(self) -> None:
        slab = np.empty(_SLAB_BLOCKS * self._block_bytes + _ALIGNMENT, np.uint8)
        first = -(-slab.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._slabs.append(slab)
        self._free.extend(first + i * self._block_bytes for i in range(_SLAB_BLOCKS))
