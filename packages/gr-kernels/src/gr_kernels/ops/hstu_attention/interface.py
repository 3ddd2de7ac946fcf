"""What every implementation of the op `hstu_attention` is: pointwise attention over jagged tokens.

    hstu_attention(q_THK, k_SHK, v_SHV, query_offsets, key_offsets, low_T, high_T, own_T,
                   alpha, divisor, bias=None) -> a_THV

Row i of a is the sum, over the keys j that query i sees, of SiLU(alpha·q_i·k_j + bias_ij)/divisor
times v_j (arXiv 2402.17152, equation 2). Queries and keys of B sequences lie one sequence after
another, without padding: those of sequence b are the rows ``query_offsets[b]`` to
``query_offsets[b + 1] - 1`` of q, and likewise those of k and v. A query sees the keys of its own
sequence with the places ``low`` to ``high - 1``, counted from the sequence's first key, and the
key at the place ``own`` where that is not -1. See `gr_kernels.ops.hstu_attention.intervals` for
how the usual masks are said so. What is cached is keys without queries.

q, k and v have one dtype. ``bias`` holds, sequence after sequence, the (T_b, S_b) biases of its
pairs row by row in one axis; all heads share it. Rows of k and v before the first offset or from
the last on are arbitrary, NaN perhaps; such rows of q give zeros.

Shapes: T queries, S keys, B sequences, H heads, K columns of Q and K per head, V columns of V per
head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a call, T and S being its own numbers of queries and keys."""

    queries: slice
    keys: slice
    low_T: IntArray
    high_T: IntArray
    own_T: IntArray
    bias_TS: Tensor | None


def sequences(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    bias: Tensor | None,
) -> Iterator[Sequence]:
    """Checks a call's arguments and yields its sequences. Raises `ValueError`."""
    check_shapes(q_THK, k_SHK, v_SHV, bias)
    query_ends = _offsets("query_offsets", query_offsets, len(q_THK))
    key_ends = _offsets("key_offsets", key_offsets, len(k_SHK))
    if len(query_ends) != len(key_ends):
        raise ValueError(
            f"query_offsets are of {len(query_ends) - 1} sequences, key_offsets of "
            f"{len(key_ends) - 1}; expected the same"
        )
    low, high, own = (
        _places(name, tensor, len(q_THK))
        for name, tensor in (("low", low_T), ("high", high_T), ("own", own_T))
    )
    pairs = int((np.diff(query_ends) * np.diff(key_ends)).sum())
    if bias is not None and bias.shape != (pairs,):
        raise ValueError(f"bias has the shape {tuple(bias.shape)}; expected {(pairs,)}")
    pair = 0
    for b in range(len(query_ends) - 1):
        queries = slice(int(query_ends[b]), int(query_ends[b + 1]))
        keys = slice(int(key_ends[b]), int(key_ends[b + 1]))
        count, total = queries.stop - queries.start, keys.stop - keys.start
        one = (low[queries], high[queries], own[queries])
        if count and not (
            one[0].min() >= 0
            and one[1].max() <= total
            and -1 <= one[2].min() <= one[2].max() < total
        ):
            raise ValueError(
                f"sequence {b} has {total} keys; expected low from 0, high at most {total}, "
                f"own from -1 to {total - 1}"
            )
        bias_TS = None if bias is None else bias[pair : pair + count * total].view(count, total)
        pair += count * total
        yield Sequence(queries, keys, *one, bias_TS)


def check_shapes(q_THK: Tensor, k_SHK: Tensor, v_SHV: Tensor, bias: Tensor | None) -> None:
    if not q_THK.ndim == k_SHK.ndim == v_SHV.ndim == 3:
        raise ValueError("q, k and v must have three axes: tokens, heads, columns")
    if q_THK.shape[1:] != k_SHK.shape[1:]:
        raise ValueError(
            f"q has (heads, columns) {tuple(q_THK.shape[1:])}, k {tuple(k_SHK.shape[1:])}; "
            "expected the same"
        )
    if k_SHK.shape[:2] != v_SHV.shape[:2]:
        raise ValueError(
            f"k has (tokens, heads) {tuple(k_SHK.shape[:2])}, v {tuple(v_SHV.shape[:2])}; "
            "expected the same"
        )
    if not q_THK.dtype == k_SHK.dtype == v_SHV.dtype or not q_THK.dtype.is_floating_point:
        raise ValueError(
            f"q, k and v are {q_THK.dtype}, {k_SHK.dtype} and {v_SHV.dtype}; "
            "expected one floating-point dtype"
        )


def _offsets(name: str, offsets: Tensor, rows: int) -> npt.NDArray[np.int64]:
    array = offsets.cpu().numpy().astype(np.int64)
    if array.ndim != 1 or not len(array) or array[0] < 0 or array[-1] > rows:
        raise ValueError(f"{name} must be one axis of offsets from 0 to at most {rows}")
    if (np.diff(array) < 0).any():
        raise ValueError(f"{name} must not decrease")
    return array


def _places(name: str, tensor: Tensor, count: int) -> IntArray:
    if tensor.shape != (count,) or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected int32 of shape {(count,)}"
        )
    return tensor.cpu().numpy().astype(np.int32)
