"""The kernels of `triton`. Imports Triton.

Shapes: T tokens, B sequences, M rows of queries of a program, N keys of a step, K and V columns per
head, padded to powers of two; C = K + V of a page, unpadded.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(32)
"""Tokens of a page."""


@triton.jit
def store_tokens(
    k_ptr,
    v_ptr,
    page_ptr,
    slot_ptr,
    offset_ptr,
    sequences,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """K and V of one token and one head to its place in its page. Grid: (T, heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + token)
    first, end = tl.load(offset_ptr), tl.load(offset_ptr + sequences)
    if (slot >= 0) & (token >= first) & (token < end):
        row = (head * PAGE + slot % PAGE) * (D_QK + D_V)
        target_ptr = page_ptr + slot // PAGE * page_stride + row
        k_column, v_column = tl.arange(0, K), tl.arange(0, V)
        k_row_ptr = k_ptr + token * k_token_stride + head * k_head_stride
        v_row_ptr = v_ptr + token * v_token_stride + head * v_head_stride
        k = tl.load(k_row_ptr + k_column, mask=k_column < D_QK)
        v = tl.load(v_row_ptr + v_column, mask=v_column < D_V)
        tl.store(target_ptr + k_column, k, mask=k_column < D_QK)
        tl.store(target_ptr + D_QK + v_column, v, mask=v_column < D_V)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    page_ptr,
    table_ptr,
    offset_ptr,
    count_ptr,
    low_ptr,
    high_ptr,
    bias_ptr,
    bias_start_ptr,
    a_ptr,
    sequences,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    table_stride,
    alpha,
    scale,
    HEADS: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """M rows of one sequence and one head. Grid: (T // M + B, heads)."""
    block, head = tl.program_id(0), tl.program_id(1)
    # Sequence s has the blocks from start // M + s on: enough for all of its rows, however its
    # start falls, and known without a look at the lengths.
    first = tl.load(offset_ptr)
    left, right = 0, sequences
    while left < right:
        middle = (left + right) // 2
        begins = (tl.load(offset_ptr + middle) - first) // M + middle
        if begins <= block:
            left = middle + 1
        else:
            right = middle
    sequence = left - 1
    start, end = tl.load(offset_ptr + sequence), tl.load(offset_ptr + sequence + 1)
    row_M = (block - ((start - first) // M + sequence)) * M + tl.arange(0, M)
    real_M = row_M < end - start
    if (block - ((start - first) // M + sequence)) * M < end - start:
        keys = tl.load(count_ptr + sequence)
        token_M = (start + row_M).to(tl.int64)
        low_M = tl.load(low_ptr + token_M, mask=real_M, other=0)
        high_M = tl.load(high_ptr + token_M, mask=real_M, other=0)
        some_M = low_M < high_M
        lowest = tl.min(tl.where(some_M, low_M, 2147483647))
        highest = tl.max(tl.where(some_M, high_M, 0))
        k_column, v_column = tl.arange(0, K), tl.arange(0, V)
        q_row_ptr = q_ptr + token_M * q_token_stride + head * q_head_stride
        real_MK = real_M[:, None] & (k_column < D_QK)[None, :]
        q_MK = tl.load(q_row_ptr[:, None] + k_column[None, :], mask=real_MK, other=0.0)
        if HAS_BIAS:
            bias_row_ptr = bias_ptr + tl.load(bias_start_ptr + sequence) + row_M.to(tl.int64) * keys
        a_MV = tl.zeros([M, V], tl.float32)
        for from_ in range(lowest // PAGE * PAGE, highest, N):
            key_N = from_ + tl.arange(0, N)
            real_N = (key_N >= lowest) & (key_N < highest)
            page_N = tl.load(
                table_ptr + sequence.to(tl.int64) * table_stride + key_N // PAGE,
                mask=real_N,
                other=0,
            )
            at_N = head * PAGE * (D_QK + D_V) + key_N % PAGE * (D_QK + D_V)
            key_ptr = page_ptr + page_N.to(tl.int64) * page_stride + at_N
            real_NK = real_N[:, None] & (k_column < D_QK)[None, :]
            real_NV = real_N[:, None] & (v_column < D_V)[None, :]
            k_NK = tl.load(key_ptr[:, None] + k_column[None, :], mask=real_NK, other=0.0)
            score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="tf32x3") * alpha
            sees_MN = (key_N[None, :] >= low_M[:, None]) & (key_N[None, :] < high_M[:, None])
            if HAS_BIAS:
                score_MN += tl.load(bias_row_ptr[:, None] + key_N[None, :], mask=sees_MN, other=0.0)
            weight_MN = tl.where(sees_MN, silu(score_MN), 0.0)
            v_NV = tl.load(key_ptr[:, None] + D_QK + v_column[None, :], mask=real_NV, other=0.0)
            a_MV += tl.dot(weight_MN.to(v_NV.dtype), v_NV, input_precision="tf32x3")
        # Its own key, from where it came.
        own_M = keys - (end - start).to(tl.int32) + row_M
        apart_M = real_M & ((own_M < low_M) | (own_M >= high_M))
        k_row_ptr = k_ptr + token_M * k_token_stride + head * k_head_stride
        v_row_ptr = v_ptr + token_M * v_token_stride + head * v_head_stride
        own_MK = tl.load(k_row_ptr[:, None] + k_column[None, :], mask=real_MK, other=0.0)
        own_score_M = tl.sum(q_MK.to(tl.float32) * own_MK.to(tl.float32), axis=1) * alpha
        if HAS_BIAS:
            own_score_M += tl.load(bias_row_ptr + own_M, mask=apart_M, other=0.0)
        real_MV = real_M[:, None] & (v_column < D_V)[None, :]
        own_MV = tl.load(v_row_ptr[:, None] + v_column[None, :], mask=real_MV, other=0.0)
        own_weight_M = tl.where(apart_M, silu(own_score_M), 0.0)
        a_MV += own_weight_M[:, None] * own_MV.to(tl.float32)
        a_row_ptr = a_ptr + (token_M * HEADS + head) * D_V
        tl.store(a_row_ptr[:, None] + v_column[None, :], a_MV * scale, mask=real_MV)
