"""The kernels of `triton`. Imports Triton.

Shapes: R rows that are wanted, D model width, W columns of the projection, L rows of a program that
normalizes, B columns of one of its steps, M rows and N columns of a program of the product, K
columns of one of its steps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.ops.hstu_projection.triton import Norm

IN_TILES = tl.constexpr(int(Norm.IN_TILES))
FROM_MOMENTS = tl.constexpr(int(Norm.FROM_MOMENTS))
NORMED = tl.constexpr(int(Norm.NORMED))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile: so that programs near in time share what L2 holds."""
    in_group = GROUP * tiles_n
    first_m = program // in_group * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    in_own = program % in_group
    return first_m + in_own % height, in_own // height


@triton.jit
def below(column, END: tl.constexpr, STEP: tl.constexpr):
    """Which columns of a step are real; known at compile time where all are."""
    real = tl.full(column.shape, True, tl.int1)
    if END % STEP != 0:
        real = column < END
    return real


@triton.jit
def tokens_of(row, row_ptr):
    """The token of each row that is wanted, int64; -1 for none."""
    token = row.to(tl.int64)
    if row_ptr is not None:
        token = tl.load(row_ptr + row)
    return token


@triton.jit
def parameters_of(group_ptr, token_L, WIDTH: tl.constexpr):
    """Where the scale and the shift of each row begin: (L,), or (1,) where all share them."""
    if group_ptr is None:
        at = tl.zeros([1], tl.int32)
    else:
        at = tl.load(group_ptr + token_L).to(tl.int32) * WIDTH
    return at


@triton.jit
def affine(x_LB, scale_ptr, shift_ptr, at_LB, real_LB):
    """Scaled and shifted by what lies at (L or 1, B)."""
    if scale_ptr is not None:
        x_LB = x_LB * tl.load(scale_ptr + at_LB, mask=real_LB, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x_LB = x_LB + tl.load(shift_ptr + at_LB, mask=real_LB, other=0.0).to(tl.float32)
    return x_LB


@triton.jit
def joined(mean_L, square_L, x_LB, real_LB, before, count):
    """Mean, and sum of squares about it, of ``before`` numbers a row and ``count`` more.

    Unlike a sum of squares about zero it loses nothing where the mean is large (Chan et al. 1983).
    """
    here_L = tl.sum(tl.where(real_LB, x_LB, 0.0), axis=1) / count
    apart_LB = tl.where(real_LB, x_LB - here_L[:, None], 0.0)
    gap_L = here_L - mean_L
    share = count / (before + count)
    square_L += tl.sum(apart_LB * apart_LB, axis=1) + gap_L * gap_L * (before * share)
    return mean_L + gap_L * share, square_L


@triton.jit
def moments(x_row_ptr, eps, L: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """Mean and 1/sqrt(variance + eps) of rows of float32, (L,) each."""
    mean_L, square_L = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    for from_ in range(0, D, B):
        column_B = from_ + tl.arange(0, B)
        real_LB = below(column_B, D, B)[None, :]
        x_LB = tl.load(x_row_ptr[:, None] + column_B[None, :], mask=real_LB, other=0.0)
        count = tl.minimum(D - from_, B)
        mean_L, square_L = joined(mean_L, square_L, x_LB, real_LB, from_, count)
    return mean_L, 1.0 / tl.sqrt_rn(square_L / D + eps)


@triton.jit(do_not_specialize=["rows"])
def normalize(
    x_ptr,
    row_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    moment_ptr,
    normed_ptr,
    rows,
    x_stride,
    eps,
    D: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
):
    """The moments (R, 2) of rows, or what is normalized, (R, D); the other is None. Grid: R / L."""
    row_L = tl.program_id(0) * L + tl.arange(0, L)
    real_L = row_L < rows
    row_L = tl.minimum(row_L, rows - 1)
    token_L = tl.maximum(tokens_of(row_L, row_ptr), 0)
    x_row_ptr = x_ptr + token_L * x_stride
    mean_L, scale_L = moments(x_row_ptr, eps, L, D, B)
    if moment_ptr is not None:
        tl.store(moment_ptr + row_L * 2, mean_L, mask=real_L)
        tl.store(moment_ptr + row_L * 2 + 1, scale_L, mask=real_L)
    if normed_ptr is not None:
        normed_row_ptr = normed_ptr + row_L.to(tl.int64) * D
        at_L = parameters_of(group_ptr, token_L, D)
        for from_ in range(0, D, B):
            column_B = from_ + tl.arange(0, B)
            real_LB = below(column_B, D, B)[None, :]
            x_LB = tl.load(x_row_ptr[:, None] + column_B[None, :], mask=real_LB, other=0.0)
            normed_LB = affine(
                (x_LB - mean_L[:, None]) * scale_L[:, None],
                scale_ptr,
                shift_ptr,
                at_L[:, None] + column_B[None, :],
                real_LB,
            )
            tl.store(
                normed_row_ptr[:, None] + column_B[None, :],
                normed_LB.to(normed_ptr.dtype.element_ty),
                mask=real_L[:, None] & real_LB,
            )


@triton.jit(do_not_specialize=["rows"])
def project(
    x_ptr,
    row_ptr,
    moment_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    weight_stride,
    y_stride,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU_FIRST: tl.constexpr,
    SILU_END: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
):
    """y (R, W) from x (T, D), or where NORM says so (R, D). Grid: R / M times W / N."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(W, N), GROUP)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    row_M = tile_m * M + tl.arange(0, M)
    column_N = tile_n * N + tl.arange(0, N)
    real_M, real_N = row_M < rows, below(column_N, W, N)
    # What is beyond the ends is the last once more, so that the loop needs no masks for it.
    row_M = tl.minimum(row_M, rows - 1)
    token_M = tl.maximum(tokens_of(row_M, row_ptr), 0)
    x_row_ptr = x_ptr + token_M * x_stride
    weight_row_ptr = weight_ptr + tl.minimum(column_N, W - 1).to(tl.int64) * weight_stride
    if NORM == IN_TILES:
        mean_M, scale_M = moments(x_row_ptr, eps, M, D, K)
    elif NORM == FROM_MOMENTS:
        mean_M, scale_M = tl.load(moment_ptr + row_M * 2), tl.load(moment_ptr + row_M * 2 + 1)
    if NORM != NORMED:
        at_M = parameters_of(group_ptr, token_M, D)
    y_MN = tl.zeros([M, N], tl.float32)
    for from_ in range(0, D, K):
        column_K = from_ + tl.arange(0, K)
        real_K = below(column_K, D, K)[None, :]
        x_MK = tl.load(x_row_ptr[:, None] + column_K[None, :], mask=real_K, other=0.0)
        weight_NK = tl.load(weight_row_ptr[:, None] + column_K[None, :], mask=real_K, other=0.0)
        if NORM != NORMED:
            # Not zero beyond D, but finite where the row is; there the weights are zero.
            x_MK = affine(
                (x_MK - mean_M[:, None]) * scale_M[:, None],
                scale_ptr,
                shift_ptr,
                at_M[:, None] + column_K[None, :],
                real_K,
            )
        y_MN = tl.dot(x_MK.to(dtype), tl.trans(weight_NK), y_MN, input_precision="tf32x3")
    if bias_ptr is not None:
        y_MN += tl.load(bias_ptr + column_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    if SILU_FIRST < SILU_END:
        inside_N = (column_N >= SILU_FIRST) & (column_N < SILU_END)
        y_MN = tl.where(inside_N[None, :], silu(y_MN), y_MN)
    y_row_ptr = y_ptr + row_M.to(tl.int64) * y_stride
    tl.store(
        y_row_ptr[:, None] + column_N[None, :],
        y_MN.to(dtype),
        mask=real_M[:, None] & real_N[None, :],
    )


@triton.jit(do_not_specialize=["rows"])
def finish(
    y_ptr,
    bias_ptr,
    rows,
    y_stride,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    SILU_FIRST: tl.constexpr,
    SILU_END: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
):
    """Bias and SiLU, in place, on the columns from FIRST on. Grid: (R / L, (END - FIRST) / B)."""
    row_L = tl.program_id(0) * L + tl.arange(0, L)
    column_B = FIRST + tl.program_id(1) * B + tl.arange(0, B)
    real_B = column_B < END
    real_LB = (row_L < rows)[:, None] & real_B[None, :]
    at_LB = y_ptr + row_L.to(tl.int64)[:, None] * y_stride + column_B[None, :]
    y_LB = tl.load(at_LB, mask=real_LB, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y_LB += tl.load(bias_ptr + column_B, mask=real_B, other=0.0).to(tl.float32)[None, :]
    if SILU_FIRST < SILU_END:
        inside_B = (column_B >= SILU_FIRST) & (column_B < SILU_END)
        y_LB = tl.where(inside_B[None, :], silu(y_LB), y_LB)
    tl.store(at_LB, y_LB.to(y_ptr.dtype.element_ty), mask=real_LB)
