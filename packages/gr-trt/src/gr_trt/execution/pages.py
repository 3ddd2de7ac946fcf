"""K and V of histories in the blocks of the platform's cache.

Shapes: M layers, P tokens, H heads, K columns of K per head, V columns of V per head.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import BlockLease
from gr_core.steps import PAST_KEYS, PAST_VALUES
from gr_trt.ensemble import Graph

BLOCK_TOKENS = 32

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pages:
    """The layout of a block: keys (M, 32, H, K), then values (M, 32, H, V)."""

    keys: tuple[int, int, int]
    """M, H, K."""
    values: tuple[int, int, int]
    """M, H, V."""
    dtype: npt.DTypeLike

    @staticmethod
    def of(decode: Graph, dtype: npt.DTypeLike) -> Pages:
        """As a decode graph takes them."""
        axes = {tensor.name: tensor.axes for tensor in decode.inputs}
        layers, _, heads, width = axes[PAST_KEYS]
        value_width = axes[PAST_VALUES][-1]
        fixed = [int(size) for size in (layers, heads, width, value_width)]
        return Pages((fixed[0], fixed[1], fixed[2]), (fixed[0], fixed[1], fixed[3]), dtype)

    @property
    def block_bytes(self) -> int:
        columns = prod(self.keys) + prod(self.values)
        return BLOCK_TOKENS * columns * np.dtype(self.dtype).itemsize

    def read(self, lease: BlockLease, keys_MPHK: Array, values_MPHV: Array, tokens: int) -> None:
        """Copies the first ``tokens`` tokens out of their blocks."""
        for number, start in enumerate(range(0, tokens, BLOCK_TOKENS)):
            stop = min(tokens, start + BLOCK_TOKENS)
            keys, values = self._block(lease, number)
            keys_MPHK[:, start:stop] = keys[:, : stop - start]
            values_MPHV[:, start:stop] = values[:, : stop - start]

    def write(self, lease: BlockLease, keys_MTHK: Array, values_MTHV: Array, first: int) -> None:
        """Copies tokens into their blocks, the first of them being token ``first``."""
        last = first + keys_MTHK.shape[1]
        start = first
        while start < last:
            number, offset = divmod(start, BLOCK_TOKENS)
            stop = min(last, start - offset + BLOCK_TOKENS)
            keys, values = self._block(lease, number)
            place, given = slice(offset, offset + stop - start), slice(start - first, stop - first)
            keys[:, place] = keys_MTHK[:, given]
            values[:, place] = values_MTHV[:, given]
            start = stop

    def _block(self, lease: BlockLease, number: int) -> tuple[Array, Array]:
        memory = (ctypes.c_char * self.block_bytes).from_address(int(lease.blocks[number]))
        numbers = np.frombuffer(memoryview(memory).cast("B"), self.dtype)
        split = BLOCK_TOKENS * prod(self.keys)
        layers, heads, width = self.keys
        keys = numbers[:split].reshape(layers, BLOCK_TOKENS, heads, width)
        layers, heads, width = self.values
        return keys, numbers[split:].reshape(layers, BLOCK_TOKENS, heads, width)
