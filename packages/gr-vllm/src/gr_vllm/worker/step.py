"""What all layers of one forward pass share: where its tokens stand, and what they see.

Shapes: T tokens of the pass, B sequences, P pages of a sequence at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pages:
    """vLLM's view of a pass: which pages hold whose tokens."""

    block_table: Tensor
    """(B, P) int32."""
    slots_T: Tensor
    """(T,) int64, page · page size + place."""
    query_offsets: Tensor
    """(B + 1,) int32."""
    key_counts: Tensor
    """(B,) int32, the new tokens included."""


@dataclass(frozen=True, slots=True)
class Step:
    """None of it changes from layer to layer. Without pages the pass only sizes memory."""

    pages: Pages | None
    low_T: Tensor
    """int32, the first key that a token sees."""
    high_T: Tensor
    """int32, one after the last."""
    groups_T: Tensor | None
    """int64, where there are several groups of norms."""
    times_T: Tensor | None
    """int32 seconds since the first of the sequence, where the stack has a time bias."""
    next_times_T: Tensor | None
