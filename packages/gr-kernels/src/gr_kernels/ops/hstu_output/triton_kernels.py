"""The kernels of `triton`. Imports Triton.

Shapes: R rows that are wanted, D model width, F width of u and a, Y = F or 3·F, P parts of F with
moments of their own, S = F / P columns of a part, L parts of rows of a program that normalizes, B
columns of one of its steps, M rows and N columns of a program of the product, K columns of one of
its steps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.ops.hstu_projection.triton import Norm
from gr_kernels.ops.hstu_projection.triton_kernels import (
    affine,
    below,
    joined,
    parameters_of,
    silu,
    tile_of,
    tokens_of,
)

IN_TILES = tl.constexpr(int(Norm.IN_TILES))
FROM_MOMENTS = tl.constexpr(int(Norm.FROM_MOMENTS))
NORMED = tl.constexpr(int(Norm.NORMED))


@triton.jit
def gate_of(u_row_ptr, column_B, real_LB, SILU_U: tl.constexpr):
    """u of rows (L, B), float32."""
    u_LB = tl.load(u_row_ptr[:, None] + column_B[None, :], mask=real_LB, other=0.0).to(tl.float32)
    if SILU_U:
        u_LB = silu(u_LB)
    return u_LB


@triton.jit
def value_of(a_row_ptr, u_row_ptr, column_B, real_LB, GATE: tl.constexpr, SILU_U: tl.constexpr):
    """What the norm is of, (L, B), float32."""
    a_LB = tl.load(a_row_ptr[:, None] + column_B[None, :], mask=real_LB, other=0.0).to(tl.float32)
    if GATE == "norm(a*u)":
        a_LB *= gate_of(u_row_ptr, column_B, real_LB, SILU_U)
    return a_LB


@triton.jit
def moments(
    a_row_ptr,
    u_row_ptr,
    eps,
    GATE: tl.constexpr,
    SILU_U: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
):
    """Mean and 1/sqrt(variance + eps) of S columns from each pointer on, (L,) each."""
    mean_L, square_L = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    for from_ in range(0, S, B):
        column_B = from_ + tl.arange(0, B)
        real_LB = below(column_B, S, B)[None, :]
        value_LB = value_of(a_row_ptr, u_row_ptr, column_B, real_LB, GATE, SILU_U)
        count = tl.minimum(S - from_, B)
        mean_L, square_L = joined(mean_L, square_L, value_LB, real_LB, from_, count)
    return mean_L, 1.0 / tl.sqrt_rn(square_L / S + eps)


@triton.jit(do_not_specialize=["rows"])
def gate(
    a_ptr,
    u_ptr,
    row_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    moment_ptr,
    y_ptr,
    rows,
    a_stride,
    u_stride,
    eps,
    P: tl.constexpr,
    S: tl.constexpr,
    GATE: tl.constexpr,
    SILU_U: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
):
    """The moments (R, P, 2), or what is gated, (R, Y); the other is None. Grid: R·P / L."""
    F: tl.constexpr = P * S
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    line_L = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    real_L = line_L < rows.to(tl.int64) * P
    line_L = tl.where(real_L, line_L, 0)
    row_L, first_L = line_L // P, line_L % P * S
    a_row_ptr = a_ptr + row_L * a_stride + first_L
    u_row_ptr = u_ptr + row_L * u_stride + first_L
    mean_L, scale_L = moments(a_row_ptr, u_row_ptr, eps, GATE, SILU_U, L, S, B)
    if moment_ptr is not None:
        tl.store(moment_ptr + line_L * 2, mean_L, mask=real_L)
        tl.store(moment_ptr + line_L * 2 + 1, scale_L, mask=real_L)
    if y_ptr is not None:
        at_L = parameters_of(group_ptr, tl.maximum(tokens_of(row_L, row_ptr), 0), F)
        if P > 1:
            at_L = at_L + first_L
        if GATE == "u*norm(a)" or GATE == "norm(a*u)":
            y_row_ptr = y_ptr + row_L * F + first_L
        else:
            y_row_ptr = y_ptr + row_L * (3 * F) + first_L
        for from_ in range(0, S, B):
            column_B = from_ + tl.arange(0, B)
            real_SB = below(column_B, S, B)[None, :]
            real_LB = real_L[:, None] & real_SB
            value_LB = value_of(a_row_ptr, u_row_ptr, column_B, real_SB, GATE, SILU_U)
            normed_LB = affine(
                (value_LB - mean_L[:, None]) * scale_L[:, None],
                scale_ptr,
                shift_ptr,
                at_L[:, None] + column_B[None, :],
                real_SB,
            )
            y_LB_ptr = y_row_ptr[:, None] + column_B[None, :]
            if GATE == "norm(a*u)":
                tl.store(y_LB_ptr, normed_LB.to(dtype), mask=real_LB)
            else:
                u_LB = gate_of(u_row_ptr, column_B, real_SB, SILU_U)
                if GATE != "u*norm(a)":
                    tl.store(y_LB_ptr, u_LB.to(dtype), mask=real_LB)
                    second_LB = value_LB if GATE == "u,a,u*norm(a)" else normed_LB
                    tl.store(y_LB_ptr + F, second_LB.to(dtype), mask=real_LB)
                    y_LB_ptr += 2 * F
                tl.store(y_LB_ptr, (u_LB * normed_LB).to(dtype), mask=real_LB)


@triton.jit(do_not_specialize=["rows"])
def add_product(
    x_ptr,
    a_ptr,
    u_ptr,
    row_ptr,
    moment_ptr,
    scale_ptr,
    shift_ptr,
    group_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    x_stride,
    a_stride,
    u_stride,
    weight_stride,
    eps,
    D: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    GATE: tl.constexpr,
    SILU_U: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
):
    """Adds to x. Where NORM says so, a is what is gated, (R, Y). Grid: R / M times D / N."""
    F: tl.constexpr = P * S
    CONCATENATED: tl.constexpr = GATE == "u,norm(a),u*norm(a)" or GATE == "u,a,u*norm(a)"
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(D, N), GROUP)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    row_M = tile_m * M + tl.arange(0, M)
    column_N = tile_n * N + tl.arange(0, N)
    real_M, real_N = row_M < rows, below(column_N, D, N)
    # What is beyond the ends is the last once more, so that the loop needs no masks for it.
    row_M = tl.minimum(row_M, rows - 1)
    token_M = tokens_of(row_M, row_ptr)
    real_M &= token_M >= 0
    token_M = tl.maximum(token_M, 0)
    a_row_ptr = a_ptr + row_M.to(tl.int64) * a_stride
    weight_row_ptr = weight_ptr + tl.minimum(column_N, D - 1).to(tl.int64) * weight_stride
    x_MN = tl.zeros([M, N], tl.float32)
    if NORM == NORMED:
        Y: tl.constexpr = 3 * F if CONCATENATED else F
        for from_ in range(0, Y, K):
            column_K = from_ + tl.arange(0, K)
            real_K = below(column_K, Y, K)[None, :]
            y_MK = tl.load(a_row_ptr[:, None] + column_K[None, :], mask=real_K, other=0.0)
            weight_NK = tl.load(weight_row_ptr[:, None] + column_K[None, :], mask=real_K, other=0.0)
            x_MN = tl.dot(y_MK, tl.trans(weight_NK), x_MN, input_precision="tf32x3")
    else:
        u_row_ptr = u_ptr + row_M.to(tl.int64) * u_stride
        at_M = parameters_of(group_ptr, token_M, F)
        moment_row_ptr = moment_ptr
        if NORM == IN_TILES:
            mean_M, scale_M = moments(a_row_ptr, u_row_ptr, eps, GATE, SILU_U, M, F, K)
            mean_MK, scale_MK = mean_M[:, None], scale_M[:, None]
        else:
            moment_row_ptr = moment_ptr + row_M.to(tl.int64) * (2 * P)
            if P == 1:
                mean_MK = tl.load(moment_row_ptr)[:, None]
                scale_MK = tl.load(moment_row_ptr + 1)[:, None]
        for from_ in range(0, F, K):
            column_K = from_ + tl.arange(0, K)
            real_K = below(column_K, F, K)[None, :]
            weight_NK_ptr = weight_row_ptr[:, None] + column_K[None, :]
            if P > 1:
                if S % K == 0:
                    part_M_ptr = moment_row_ptr[:, None] + from_ // S * 2
                    mean_MK, scale_MK = tl.load(part_M_ptr), tl.load(part_M_ptr + 1)
                else:
                    part_K = tl.minimum(column_K // S, P - 1)
                    part_MK_ptr = moment_row_ptr[:, None] + part_K[None, :] * 2
                    mean_MK, scale_MK = tl.load(part_MK_ptr), tl.load(part_MK_ptr + 1)
            # Beyond F not zero, but finite where the row is; there the weights are zero.
            value_MK = value_of(a_row_ptr, u_row_ptr, column_K, real_K, GATE, SILU_U)
            normed_MK = affine(
                (value_MK - mean_MK) * scale_MK,
                scale_ptr,
                shift_ptr,
                at_M[:, None] + column_K[None, :],
                real_K,
            )
            weight_NK = tl.load(weight_NK_ptr, mask=real_K, other=0.0)
            if GATE == "norm(a*u)":
                gated_MK = normed_MK
            else:
                u_MK = gate_of(u_row_ptr, column_K, real_K, SILU_U)
                gated_MK = u_MK * normed_MK
                if CONCATENATED:
                    second_MK = value_MK if GATE == "u,a,u*norm(a)" else normed_MK
                    second_NK = tl.load(weight_NK_ptr + F, mask=real_K, other=0.0)
                    third_NK = tl.load(weight_NK_ptr + 2 * F, mask=real_K, other=0.0)
                    x_MN = tl.dot(
                        u_MK.to(dtype), tl.trans(weight_NK), x_MN, input_precision="tf32x3"
                    )
                    x_MN = tl.dot(
                        second_MK.to(dtype), tl.trans(second_NK), x_MN, input_precision="tf32x3"
                    )
                    weight_NK = third_NK
            x_MN = tl.dot(gated_MK.to(dtype), tl.trans(weight_NK), x_MN, input_precision="tf32x3")
    if bias_ptr is not None:
        x_MN += tl.load(bias_ptr + column_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    x_MN_ptr = x_ptr + token_M[:, None] * x_stride + column_N[None, :]
    real_MN = real_M[:, None] & real_N[None, :]
    tl.store(x_MN_ptr, tl.load(x_MN_ptr, mask=real_MN, other=0.0) + x_MN, mask=real_MN)


@triton.jit(do_not_specialize=["rows"])
def add(
    x_ptr,
    row_ptr,
    output_ptr,
    bias_ptr,
    rows,
    x_stride,
    D: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
):
    """Adds output (R, D) and bias to rows of x. Grid: (R / L, D / B)."""
    row_L = tl.program_id(0) * L + tl.arange(0, L)
    real_L = row_L < rows
    row_L = tl.minimum(row_L, rows - 1)
    token_L = tokens_of(row_L, row_ptr)
    real_L &= token_L >= 0
    column_B = tl.program_id(1) * B + tl.arange(0, B)
    real_B = column_B < D
    real_LB = real_L[:, None] & real_B[None, :]
    output_LB_ptr = output_ptr + row_L.to(tl.int64)[:, None] * D + column_B[None, :]
    x_LB_ptr = x_ptr + token_L[:, None] * x_stride + column_B[None, :]
    x_LB = tl.load(x_LB_ptr, mask=real_LB, other=0.0)
    x_LB += tl.load(output_LB_ptr, mask=real_LB, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x_LB += tl.load(bias_ptr + column_B, mask=real_B, other=0.0).to(tl.float32)[None, :]
    tl.store(x_LB_ptr, x_LB, mask=real_LB)
