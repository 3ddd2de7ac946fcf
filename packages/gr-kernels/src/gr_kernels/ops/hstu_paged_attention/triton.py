"""The op `hstu_paged_attention` in Triton, for CUDA; pages as those of `reference`.

A call makes no copy to the host and waits for nothing, so it can be part of a CUDA graph; in
exchange, numbers out of range are not seen. Sums are in float32; products of float32 are of three
products of TF32 each, which is as good as float32 up to a few last bits.

Shapes as in `gr_kernels.ops.hstu_paged_attention.interface`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.ops.hstu_paged_attention.interface import check_call, check_sizes
from gr_kernels.ops.hstu_paged_attention.reference import plain_page_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 256
"""Columns of a head."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program of the attention holds at once; see `triton_kernels`."""

    k: int
    v: int
    m: int
    n: int
    warps: int
    stages: int


def tiles(d_qk: int, d_v: int, dtype: torch.dtype, tokens_each: int) -> Tiles:
    """For heads of that size, and so many new tokens of a sequence on average."""
    k, v = (max(16, 1 << (d - 1).bit_length()) for d in (d_qk, d_v))
    # So that the sums and the products' operands of a program stay in its registers.
    size = max(k, v) * dtype.itemsize
    most = 64 if size <= 256 else 32 if size <= 512 else 16
    m = min(most, max(16, 1 << (tokens_each - 1).bit_length()))
    return Tiles(k, v, m, n=32, warps=4 if size <= 256 else 8, stages=2 if size <= 512 else 1)


class TritonPagedAttention:
    """Implements `PagedAttention`."""

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
        """Raises `PlanError` where Triton is not installed."""
        check_sizes(heads, d_qk, d_v, divisor, threads)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; expected float32, bfloat16 or float16")
        if max(d_qk, d_v) > LARGEST:
            raise ValueError(
                f"d_qk is {d_qk} and d_v {d_v}; expected at most {LARGEST}; "
                "hstu_paged_attention-reference has no limit"
            )
        if find_spec("triton") is None:
            raise PlanError(
                "the op hstu_paged_attention needs Triton; pip install gr-kernels[triton]"
            )
        from gr_kernels.ops.hstu_paged_attention import triton_kernels

        self._kernels = triton_kernels
        self._sizes = (heads, d_qk, d_v, dtype)
        self._alpha, self._scale = alpha, 1 / divisor
        self.page_bytes = plain_page_bytes(heads, d_qk, d_v, dtype)

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
        """See `PagedAttention.__call__`."""
        check_call(
            *self._sizes,
            self.page_bytes,
            q_THK,
            k_THK,
            v_THV,
            pages,
            block_table,
            slots_T,
            query_offsets,
            key_counts,
            low_T,
            high_T,
            bias,
        )
        heads, d_qk, d_v, dtype = self._sizes
        tokens, sequences = len(q_THK), len(key_counts)
        a_THV = q_THK.new_zeros(tokens, heads, d_v)
        if not tokens or not sequences:
            return a_THV
        page_PC = pages[:, : self.page_bytes].view(dtype)
        slots_T, query_offsets, key_counts = (
            x.contiguous() for x in (slots_T, query_offsets, key_counts)
        )
        low_T, high_T = low_T.contiguous(), high_T.contiguous()
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        bias_starts = None
        if bias is not None:
            bias = bias.contiguous()
            pairs_B = query_offsets.diff() * key_counts.long()
            bias_starts = pairs_B.cumsum(0) - pairs_B
        of = tiles(d_qk, d_v, dtype, -(-tokens // sequences))
        on_device = torch.cuda.device(q_THK.device) if q_THK.is_cuda else contextlib.nullcontext()
        with on_device:
            self._kernels.store_tokens[(tokens, heads)](
                k_THK,
                v_THV,
                page_PC,
                slots_T,
                query_offsets,
                sequences,
                *k_THK.stride()[:2],
                *v_THV.stride()[:2],
                page_PC.stride(0),
                D_QK=d_qk,
                D_V=d_v,
                K=of.k,
                V=of.v,
                num_warps=1,
            )
            self._kernels.attend[(tokens // of.m + sequences, heads)](
                q_THK,
                k_THK,
                v_THV,
                page_PC,
                block_table,
                query_offsets,
                key_counts,
                low_T,
                high_T,
                bias,
                bias_starts,
                a_THV,
                sequences,
                *q_THK.stride()[:2],
                *k_THK.stride()[:2],
                *v_THV.stride()[:2],
                page_PC.stride(0),
                block_table.stride(0),
                self._alpha,
                self._scale,
                HEADS=heads,
                D_QK=d_qk,
                D_V=d_v,
                K=of.k,
                V=of.v,
                M=of.m,
                N=of.n,
                HAS_BIAS=bias is not None,
                num_warps=of.warps,
                num_stages=of.stages,
            )
        return a_THV
