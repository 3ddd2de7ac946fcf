"""Attention by blocks of queries, in torch: no padding, and no work for keys that no row sees.

Shapes: T queries, S keys, R queries of a block, E keys of a block, H heads, K columns of Q and K
per head, V columns of V per head.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gr_kernels.ops.hstu_attention.interface import sequences

QUERY_BLOCK = 256
KEY_BLOCK = 512
"""So many scores a head are computed at once: few enough to stay in a processor's cache."""


class PairBias(Protocol):
    """What is added to the scores of pairs of query and key, the same for all heads."""

    def block(self, queries: slice, keys: slice) -> Tensor:
        """(R, E)."""
        ...

    def pairs(self, query_R: Tensor, key_R: Tensor) -> Tensor:
        """(R,) of the pairs (query_R[r], key_R[r])."""
        ...


def attend(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    low_T: npt.NDArray[np.int32],
    high_T: npt.NDArray[np.int32],
    own_T: npt.NDArray[np.int32],
    bias: PairBias | None = None,
) -> Tensor:
    """Sums of SiLU(Q Kᵀ + bias) V for the queries and keys of one sequence: (T, H, V).

    Query i sees the keys low[i] to high[i] - 1, and the key own[i] where that is not -1. What
    nobody sees is never read.
    """
    # Most own keys just follow the interval; so they cost nothing of their own.
    high_T = high_T + ((own_T == high_T) & (low_T <= high_T))
    # Contiguous for each head: otherwise every product would copy its operands.
    q_HTK, k_HSK, v_HSV = (x.transpose(0, 1).contiguous() for x in (q_THK, k_SHK, v_SHV))
    a_HTV = q_HTK.new_zeros(*q_HTK.shape[:2], v_HSV.shape[2])
    for start in range(0, len(q_THK), QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, len(q_THK)))
        low_R, high_R = low_T[queries], high_T[queries]
        some = low_R < high_R
        if not some.any():
            continue
        begin, end = int(low_R[some].min()), int(high_R[some].max())
        q_HRK, a_HRV = q_HTK[:, queries], a_HTV[:, queries]
        for first in range(begin, end, KEY_BLOCK):
            keys = slice(first, min(first + KEY_BLOCK, end))
            score_HRE = torch.bmm(q_HRK, k_HSK[:, keys].transpose(1, 2))
            if bias is not None:
                score_HRE += bias.block(queries, keys)
            F.silu(score_HRE, inplace=True)
            _mask(score_HRE, low_R, high_R, keys)
            a_HRV += torch.bmm(score_HRE, v_HSV[:, keys])
    a_THV = a_HTV.transpose(0, 1)
    _add_own(a_THV, q_THK, k_SHK, v_SHV, low_T, high_T, own_T, bias)
    return a_THV


def _mask(
    score_HRE: Tensor,
    low_R: npt.NDArray[np.int32],
    high_R: npt.NDArray[np.int32],
    keys: slice,
) -> None:
    """Zeroes what a row does not see; the columns in the middle that all rows see are left out."""
    from_, to = int(low_R.max()), int(high_R.min())
    if to <= from_:
        from_ = to = keys.stop
    parts = (slice(keys.start, min(from_, keys.stop)), slice(max(to, keys.start), keys.stop))
    for part in parts:
        if part.start < part.stop:
            key_E = np.arange(part.start, part.stop, dtype=np.int32)
            hidden_RE = (key_E < low_R[:, None]) | (key_E >= high_R[:, None])
            columns = slice(part.start - keys.start, part.stop - keys.start)
            score_HRE[:, :, columns].masked_fill_(torch.from_numpy(hidden_RE), 0.0)


def _add_own(
    a_THV: Tensor,
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    low_T: npt.NDArray[np.int32],
    high_T: npt.NDArray[np.int32],
    own_T: npt.NDArray[np.int32],
    bias: PairBias | None,
) -> None:
    """Adds the queries' own keys where their interval does not hold them already."""
    outside_T = (own_T >= 0) & ((own_T < low_T) | (own_T >= high_T))
    if not outside_T.any():
        return
    query_R = torch.from_numpy(np.flatnonzero(outside_T))
    key_R = torch.from_numpy(own_T[outside_T].astype(np.int64))
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    score_RH = (q_THK[query_R].to(wide) * k_SHK[key_R].to(wide)).sum(-1)
    if bias is not None:
        score_RH += bias.pairs(query_R, key_R)[:, None]
    weighted_RHV = F.silu(score_RH)[..., None] * v_SHV[key_R].to(wide)
    a_THV.index_add_(0, query_R, weighted_RHV.to(a_THV.dtype))


class _GivenBias:
    """Implements `PairBias` on the biases of all pairs, (T, S)."""

    def __init__(self, bias_TS: Tensor, dtype: torch.dtype) -> None:
        self._bias_TS = bias_TS.to(dtype)

    def block(self, queries: slice, keys: slice) -> Tensor:
        return self._bias_TS[queries, keys]

    def pairs(self, query_R: Tensor, key_R: Tensor) -> Tensor:
        return self._bias_TS[query_R, key_R]


def hstu_attention(
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
    bias: Tensor | None = None,
) -> Tensor:
    """See `gr_kernels.ops.hstu_attention.interface`. On the CPU."""
    a_THV = q_THK.new_zeros(len(q_THK), *v_SHV.shape[1:])
    offsets = (query_offsets, key_offsets)
    for one in sequences(q_THK, k_SHK, v_SHV, *offsets, low_T, high_T, own_T, bias):
        of_pairs = None if one.bias_TS is None else _GivenBias(one.bias_TS, q_THK.dtype)
        attended_THV = attend(
            q_THK[one.queries] * alpha,
            k_SHK[one.keys],
            v_SHV[one.keys],
            one.low_T,
            one.high_T,
            one.own_T,
            of_pairs,
        )
        a_THV[one.queries] = attended_THV / divisor
    return a_THV
