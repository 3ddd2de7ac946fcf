"""The kernels of `triton`. Imports Triton.

Shapes: B users, M of them in a program; I rows of the table, N of them in a program, which is a
group; D columns, K of them in a step; A answers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

MAX_ROWS = tl.constexpr(2**31 - 1)
NONE = tl.constexpr(-(2**63))
"""Below all keys."""


@triton.jit
def keys_of(score, row):
    """See `gr_kernels.ops.item_topk.interface`."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # of the two zeros, which a product may give, one
    bits = score.to(tl.int32, bitcast=True)
    in_order = bits ^ ((bits >> 31) & MAX_ROWS)
    return (in_order.to(tl.int64) << 32) | (row ^ MAX_ROWS).to(tl.int64)


@triton.jit
def scan(
    user_ptr,
    table_ptr,
    key_ptr,
    users,
    rows,
    user_stride,
    table_stride,
    key_stride,
    user_tiles,
    D: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    ALL: tl.constexpr,
):
    """Keys of N rows for M users, or only the best of them. Grid: (I / N · user_tiles,).

    Programs of the same rows are next to each other, so that the table is read once.
    """
    group = (tl.program_id(0) // user_tiles).to(tl.int64)
    user_M = (tl.program_id(0) % user_tiles).to(tl.int64) * M + tl.arange(0, M)
    row_N = 1 + group * N + tl.arange(0, N)
    real_N, real_M = row_N < rows, user_M < users
    score_NM = tl.zeros([N, M], tl.float32)
    for from_ in range(0, D, K):
        column_K = from_ + tl.arange(0, K)
        real_K = column_K < D
        table_NK = tl.load(
            table_ptr + (row_N * table_stride)[:, None] + column_K[None, :],
            mask=real_N[:, None] & real_K[None, :],
            other=0.0,
        )
        user_KM = tl.load(
            user_ptr + (user_M * user_stride)[None, :] + column_K[:, None],
            mask=real_K[:, None] & real_M[None, :],
            other=0.0,
        )
        score_NM = tl.dot(table_NK, user_KM, score_NM, input_precision="tf32x3")
    key_NM = tl.where(real_N[:, None], keys_of(score_NM, row_N[:, None]), NONE)
    key_M_ptr = key_ptr + user_M * key_stride
    if ALL:
        key_NM_ptr = key_M_ptr[None, :] + (row_N - 1)[:, None]
        tl.store(key_NM_ptr, key_NM, mask=real_N[:, None] & real_M[None, :])
    else:
        tl.store(key_M_ptr + group, tl.max(key_NM, axis=0), mask=real_M)


@triton.jit
def score_groups(
    user_ptr,
    table_ptr,
    best_ptr,
    key_ptr,
    rows,
    user_stride,
    table_stride,
    best_stride,
    key_stride,
    D: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Keys of all N rows of a group that one of its keys names. Grid: (groups of a user, B)."""
    place, user = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best_row = (tl.load(best_ptr + user * best_stride + place) & MAX_ROWS) ^ MAX_ROWS
    row_N = (best_row - 1) // N * N + 1 + tl.arange(0, N)
    real_N = row_N < rows
    sum_NK = tl.zeros([N, K], tl.float32)
    for from_ in range(0, D, K):
        column_K = from_ + tl.arange(0, K)
        real_K = column_K < D
        user_K = tl.load(user_ptr + user * user_stride + column_K, mask=real_K, other=0.0)
        table_NK = tl.load(
            table_ptr + (row_N * table_stride)[:, None] + column_K[None, :],
            mask=real_N[:, None] & real_K[None, :],
            other=0.0,
        )
        sum_NK += table_NK.to(tl.float32) * user_K.to(tl.float32)[None, :]
    key_N = tl.where(real_N, keys_of(tl.sum(sum_NK, axis=1), row_N), NONE)
    tl.store(key_ptr + user * key_stride + place.to(tl.int64) * N + tl.arange(0, N), key_N)


@triton.jit
def answers_of(key_ptr, score_ptr, row_ptr, answers, A: tl.constexpr):
    """Scores and rows of keys. Grid: (number of them / A,)."""
    at_A = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    real_A = at_A < answers
    key_A = tl.load(key_ptr + at_A, mask=real_A, other=0)
    in_order = (key_A >> 32).to(tl.int32)
    bits = in_order ^ ((in_order >> 31) & MAX_ROWS)
    tl.store(score_ptr + at_A, bits.to(tl.float32, bitcast=True), mask=real_A)
    tl.store(row_ptr + at_A, (key_A & MAX_ROWS) ^ MAX_ROWS, mask=real_A)
