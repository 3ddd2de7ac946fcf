"""What every implementation of the op `hstu_stack` is: layers over jagged tokens, K/V in blocks.

Shapes: T tokens of all segments, D model width, N cached and new tokens of one history, n new
tokens of a history, c candidates.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gr_core.contracts import Arrivals

BLOCK_TOKENS = 32
"""Tokens of a block of K and V. Blocks begin at multiples of it, counted from the first token."""


class Rows(enum.IntEnum):
    """Which rows of the stack's output are wanted; the others are left undefined.

    The last layer computes no more than K and V of a history token whose row nobody wants.
    """

    CANDIDATES = 0
    CANDIDATES_AND_LAST = 1
    """And that of the last token of the history."""
    ALL = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of one history and candidates, after tokens whose K and V are in the blocks.

    In the input, the rows of a segment are those of its new tokens, then its candidates. Keys are
    the N = ``cached`` + ``new`` tokens of the history; row i sees the keys ``low[i]`` to
    ``high[i] - 1`` and itself. Several segments may have the same blocks, but only one of them may
    have new tokens: then the others' ``cached`` includes what that one writes.
    """

    blocks: npt.NDArray[np.uintp]
    """Addresses of the ceil(N / BLOCK_TOKENS) blocks, each `HSTUStack.block_bytes` large, aligned
    to 64 bytes. What they hold at or beyond token N is arbitrary, NaN perhaps, and without effect.
    """
    cached: int
    new: int
    candidates: int
    low: npt.NDArray[np.int32]
    """(n + c,), from 0."""
    high: npt.NDArray[np.int32]
    """(n + c,), at most N."""
    groups: npt.NDArray[np.uint8] | None = None
    """(n + c,), where the stack has several groups."""
    times: npt.NDArray[np.int64] | None = None
    """(N + c,) seconds of all keys and then the candidates, where the stack has a time bias."""
    next_times: npt.NDArray[np.int64] | None = None
    """(n + c,) seconds, where the stack has a time bias."""
    rows: Rows = Rows.CANDIDATES


class HSTUStack(Protocol):
    """A stack with its weights converted. Its maker takes a `gr_core.stack.Stack`.

    One thread at a time may call `run`.
    """

    @property
    def name(self) -> str:
        """Which implementation this is, e.g. ``cpu-avx512bf16``: K and V of one are of no use to
        another."""
        ...

    @property
    def block_bytes(self) -> int:
        """Size of a block: K and V of `BLOCK_TOKENS` tokens of all layers, tile-packed."""
        ...

    def run(self, x_TD: Any, segments: Sequence[Segment], arrivals: Arrivals | None = None) -> None:
        """Runs all layers on a float32 torch tensor in place; writes K and V of new tokens.

        A row's result depends on nothing but the tokens that it sees: not on how many of them were
        cached, nor on the other segments. On another device than the CPU, x and the blocks are
        there, nothing waits for the device, and ``arrivals`` are of blocks on their way.
        """
        ...

    def close(self) -> None: ...
