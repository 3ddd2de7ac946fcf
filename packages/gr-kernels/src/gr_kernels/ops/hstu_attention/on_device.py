"""Attention as the op `hstu_stack` needs it on a GPU: a part of the keys may lie in blocks.

    attend(q_THK, k_SHK, v_SHV, query_offsets, key_offsets, low_T, high_T, own_T, alpha, divisor,
           most_queries, cached=None, bias=None, out_THV=None) -> a_THV

As `gr_kernels.ops.hstu_attention.interface` says, with these differences. Keys of sequence b have
the places 0, 1, …: the first ``cached.counts[b]`` of them lie in blocks, what follows in the rows
``key_offsets[b]`` to ``key_offsets[b + 1] - 1`` of k and v. Offsets are int32 or int64 (B + 1,),
low, high and own int32 (T,). The columns of q, k and v are contiguous; tokens and heads may have
any stride, so they can be views of one projection. Numbers are not checked, since nothing waits for
the device: those out of range are the caller's fault. ``most_queries`` is how many queries a long
sequence has: what implementations choose their tiles by, and nothing else. Rows of q of no sequence
are zero in a, which is ``out`` where that is given: (T, H, V) of the dtype of q.

A row's result depends on nothing but what it sees, as far as rounding goes: sums in float32, in an
order that may depend on which of its keys are in blocks.

Shapes: T queries, S keys outside blocks, B sequences, M blocks of a row, H heads, K columns of Q
and K per head, V columns of V per head, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Keys in blocks of 32 tokens: one layer after another, K (H, 32, K), then V (H, 32, V)."""

    addresses_BM: Tensor
    """int64, on the device: where the blocks of each sequence begin, multiples of 64 bytes."""
    counts_B: Tensor
    """int32, on the device: keys of each sequence that are in blocks. The rest of a sequence's last
    block, and addresses behind it, are arbitrary, K and V NaN perhaps."""
    layer_offset: int
    """Bytes from a block's begin to the layer's part of it, a multiple of 64."""


@dataclass(frozen=True, slots=True)
class TableBias:
    """Biases of pairs, read from tables by position and time; either table may be None.

    The score of query i and the key at place j gets
    ``position[min(j, histories[b]) - positions[i] + P - 1]`` and ``time[bucket]``, bucket being the
    number of ``thresholds`` that are at most |next_times[i] - times[time_offsets[b] + j]|.
    """

    histories_B: Tensor
    """int32: places of a sequence's history; candidates come from there on and share a position."""
    position: Tensor | None = None
    """float32 (2·P - 1,)."""
    positions_T: Tensor | None = None
    """int32, of each query."""
    time: Tensor | None = None
    """float32 (buckets,)."""
    thresholds: Tensor | None = None
    """int64 (buckets - 1,), rising: the least gap in seconds of each bucket but the first, where
    buckets are of log(gap) / 0.301."""
    times: Tensor | None = None
    """int64: of the keys of all sequences, those in blocks included."""
    time_offsets_B: Tensor | None = None
    """int64: where those of each sequence begin in ``times``."""
    next_times_T: Tensor | None = None
    """int64, of each query."""


class DeviceAttention(Protocol):
    """What each implementation for GPUs is, see the module; it launches and waits for nothing."""

    def __call__(
        self,
        q_THK: Tensor,
        k_SHK: Tensor,
        v_SHV: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        low_T: Tensor,
        high_T: Tensor,
        own_T: Tensor,
        alpha: float,
        divisor: float,
        most_queries: int,
        cached: CachedKeys | None = None,
        bias: TableBias | Tensor | None = None,
        out_THV: Tensor | None = None,
    ) -> Tensor: ...
