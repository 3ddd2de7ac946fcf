"""What every implementation of the op `hstu_paged_attention` is: new tokens on K and V in pages.

Row i of a is the sum, over the keys j that token i sees, of SiLU(alpha·q_i·k_j + bias_ij)/divisor
times v_j (arXiv 2402.17152, equation 2), as in `gr_kernels.ops.hstu_attention`; but the keys lie
in pages, where a server such as vLLM keeps them, and the call stores those of the new tokens too.

Shapes: T tokens, B sequences, P pages, M pages of a row of the block table, H heads, K columns of
Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK_TOKENS = 32
"""Tokens of a page."""
PAGE_ALIGNMENT = 4
"""Bytes; pages begin at multiples of it, in float64 of 8."""


class PagedAttention(Protocol):
    """The attention of one layer. The factories of the op make one; its arguments are checked.

    Of ``threads`` workers, where the implementation has workers, the caller is one; 0: as many as
    torch has threads. Calls may come from any thread, one at a time for the same ``pages``.
    """

    page_bytes: int
    """Bytes of a page: K and V of `BLOCK_TOKENS` tokens of all heads of one layer. How they lie in
    it is the implementation's own, so pages that one wrote are of no use to another."""

    def __init__(
        self,
        heads: int,
        d_qk: int,
        d_v: int,
        dtype: torch.dtype,
        alpha: float,
        divisor: float,
        *,
        threads: int = 0,
    ) -> None:
        """Raises `ValueError` for what it does not compute, naming it."""
        ...

    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        pages: Tensor,
        block_table: Tensor,
        slots_T: Tensor,
        query_offsets: Tensor,
        key_counts: Tensor,
        low_T: Tensor,
        high_T: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Stores K and V of the new tokens, then attends: a, (T, H, V) in the dtype of q.

        ``q``, ``k`` and ``v`` are the new tokens of B sequences, one sequence after another: those
        of sequence b are the rows ``query_offsets[b]`` to ``query_offsets[b + 1] - 1``. Their
        columns are contiguous; tokens and heads may have any stride, so they can be views of one
        projection. Rows of no sequence are padding: never read, and zero in a.

        ``pages`` is uint8, (P, at least page_bytes); the rows may lie further apart than that, as
        views of a larger allocation, and begin at multiples of `PAGE_ALIGNMENT`. ``block_table``,
        int32 (B, M), names the pages of each sequence in order; sequences may share pages.
        ``slots``, int64 (T,), says where a new token is stored, as page · 32 + place within it;
        one that is negative is stored nowhere, and then no interval may hold that token.

        ``query_offsets`` is int32 or int64, (B + 1,). ``key_counts``, int32 (B,), counts the
        tokens of each sequence that have places once the new ones are stored. The new ones are
        the last: token r of the new ones of b has the place ``key_counts[b]`` - (number of new
        ones) + r, whether it is stored or not.

        Token i sees the keys of its sequence with the places ``low[i]`` to ``high[i] - 1``, both
        int32 (T,), and its own, once; where that is outside, it comes from k and v, not from the
        page. `gr_kernels.ops.hstu_attention.causal` and `mtgr` make the usual intervals, with what
        is cached as their ``start``.

        ``bias``, float32, holds sequence after sequence the biases of its pairs of new token and
        key, (new tokens, key_counts[b]) row by row, in one axis; all heads share it.

        What was never stored may be anything, NaN too: it has no effect where it lies at or beyond
        the largest ``high`` of its sequence's tokens, or in a page wholly below their smallest
        ``low``. All other keys must have been stored. A token's row depends on nothing but what it
        sees: not on the other tokens of the call. In C++ that holds to the last bit.

        Raises `ValueError` naming what is wrong, as far as that is cheaply seen: shapes, dtypes
        and, on the CPU, numbers out of range.
        """
        ...


def check_sizes(heads: int, d_qk: int, d_v: int, divisor: float, threads: int) -> None:
    """Checks the numbers of a constructor. Raises `ValueError`."""
    for name, value in (("heads", heads), ("d_qk", d_qk), ("d_v", d_v)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if divisor == 0:
        raise ValueError("divisor is 0; expected another number")
    if not 0 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; expected 0 to 1024")


def check_call(
    heads: int,
    d_qk: int,
    d_v: int,
    dtype: torch.dtype,
    page_bytes: int,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots_T: Tensor,
    query_offsets: Tensor,
    key_counts: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    bias: Tensor | None,
) -> None:
    """Checks shapes, dtypes and strides of a call. Raises `ValueError`."""
    tokens, sequences = len(q_THK), len(key_counts)
    device = q_THK.device
    for name, tensor, columns in (("q", q_THK, d_qk), ("k", k_THK, d_qk), ("v", v_THV, d_v)):
        if tensor.shape != (tokens, heads, columns) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} "
                f"{(tokens, heads, columns)}"
            )
        if columns > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name} has columns that are {tensor.stride(2)} apart; expected 1")
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] < page_bytes:
        raise ValueError(
            f"pages are {pages.dtype} {tuple(pages.shape)}; expected torch.uint8 with at least "
            f"{page_bytes} columns"
        )
    alignment = max(PAGE_ALIGNMENT, dtype.itemsize)
    if pages.stride(1) != 1 or pages.stride(0) % alignment or pages.storage_offset() % alignment:
        raise ValueError(
            f"pages have the strides {pages.stride()} from {pages.storage_offset()}; expected rows "
            f"of contiguous bytes, at multiples of {alignment}"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or len(block_table) < sequences:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; expected torch.int32 "
            f"with {sequences} rows"
        )
    if query_offsets.dtype not in (torch.int32, torch.int64) or query_offsets.shape != (
        sequences + 1,
    ):
        raise ValueError(
            f"query_offsets are {query_offsets.dtype} {tuple(query_offsets.shape)}; expected int32 "
            f"or int64 of shape {(sequences + 1,)}, for {sequences} key_counts"
        )
    for name, tensor, expected, shape in (
        ("slots", slots_T, torch.int64, (tokens,)),
        ("key_counts", key_counts, torch.int32, (sequences,)),
        ("low", low_T, torch.int32, (tokens,)),
        ("high", high_T, torch.int32, (tokens,)),
    ):
        if tensor.dtype != expected or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {expected} {shape}"
            )
    if bias is not None and (bias.dtype != torch.float32 or bias.dim() != 1):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}; expected torch.float32 with one axis"
        )
    for name, tensor in (
        ("k", k_THK),
        ("v", v_THV),
        ("pages", pages),
        ("block_table", block_table),
        ("slots", slots_T),
        ("query_offsets", query_offsets),
        ("key_counts", key_counts),
        ("low", low_T),
        ("high", high_T),
        *((("bias", bias),) if bias is not None else ()),
    ):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where q is")
