"""Blocks for histories that no cache holds: memory of the engine's own, used again and again."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gr_kernels.cache.memory import Buffer, HostMemory, Memory

_SLAB_BLOCKS = 64


class ScratchLease:
    """Implements `gr_core.contracts.BlockLease`; nothing is ever reused."""

    reused = 0
    arrivals = None

    def __init__(self, scratch: Scratch, blocks: npt.NDArray[np.uintp]) -> None:
        self._scratch = scratch
        self.blocks = blocks

    def commit(self, tokens: int) -> None:
        """There is nobody to publish to."""

    def release(self) -> None:
        blocks, self.blocks = self.blocks, self.blocks[:0]
        self._scratch.give_back(blocks)


class Scratch:
    """Grows to the largest batch; bounded by what a batch may hold. One thread at a time.

    On a device, its blocks are for the stream that is current in that thread.
    """

    def __init__(self, block_tokens: int, block_bytes: int, device: str = "cpu") -> None:
        self._memory = memory = _memory_of(device)
        self._block_tokens = block_tokens
        self._block_bytes = -(-block_bytes // memory.alignment) * memory.alignment
        self._slabs: list[Buffer] = []
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
        granularity = self._memory.granularity
        size = -(-_SLAB_BLOCKS * self._block_bytes // granularity) * granularity
        slab = self._memory.allocate(size)
        if slab is None:
            raise MemoryError(
                f"no memory for {size} bytes of keys and values that no cache holds; lower "
                "max_batch_tokens, or what caches take"
            )
        self._slabs.append(slab)
        first = slab.address
        self._free.extend(first + i * self._block_bytes for i in range(size // self._block_bytes))


def _memory_of(device: str) -> Memory:
    if device == "cpu":
        return HostMemory()
    from gr_kernels.cuda.transfers import CudaMemory, cuda_device

    return CudaMemory(cuda_device(device))
