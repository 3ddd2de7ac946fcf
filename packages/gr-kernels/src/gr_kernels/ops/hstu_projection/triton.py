"""The op `hstu_projection` for CUDA: all of it in Triton, or the product by torch, so cuBLAS.

Neither makes a copy to the host or waits for anything, so both can be part of a CUDA graph. Sums
are in float32. Products of float32 are of three products of TF32 each in Triton's, which is as good
as float32 up to a few last bits; torch's are as `torch.set_float32_matmul_precision` says, float32
unless somebody changed that.

Shapes as in `gr_kernels.ops.hstu_projection.interface`.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.hstu_projection.interface import check_call
from gr_kernels.tuning import configuration, power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL = "hstu_projection-triton"
SHARED_BYTES = 220 * 1024
"""Of operands at once: a block of an H100 may use 227 KiB. What needs more is not even tried."""


class Norm(enum.IntEnum):
    """Where a product gets its normalized rows from: ``NORM`` of a launch."""

    IN_TILES = 1
    """Each program finds mean and variance of its rows. One launch."""
    FROM_MOMENTS = 2
    """A launch before finds them; the product normalizes its tiles."""
    NORMED = 3
    """A launch before writes what is normalized."""


def hstu_projection_fused(
    x_TD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None = None,
    norm_weight_GD: Tensor | None = None,
    norm_bias_GD: Tensor | None = None,
    groups_T: Tensor | None = None,
    rows_R: Tensor | None = None,
    *,
    norm_eps: float,
    silu: tuple[int, int] = (0, 0),
    out: Tensor | None = None,
) -> Tensor:
    """Implements `Projection`: a product that normalizes what it reads and ends with the SiLU."""
    check_call(x_TD, weight_WD, bias_W, norm_weight_GD, norm_bias_GD, groups_T, rows_R, silu, out)
    check_dtypes("hstu_projection", x_TD, weight_WD)
    kernels = load()
    rows = len(x_TD) if rows_R is None else len(rows_R)
    w, d = weight_WD.shape
    y_RW = weight_WD.new_empty(rows, w) if out is None else out
    if not rows:
        return y_RW
    if norm_weight_GD is None and norm_bias_GD is None:
        groups_T = None
    norm = (norm_weight_GD, norm_bias_GD, groups_T)
    with device_of(x_TD):
        dtype = str(weight_WD.dtype).removeprefix("torch.")
        sizes = {"rows": power_of_two(rows, least=16, most=65536), "columns": w, "width": d}
        config = configuration(KERNEL, dtype, sizes, default(dtype, sizes))
        how = config["NORM"]
        moments_R2, source = None, x_TD
        if how != Norm.IN_TILES:
            normed_RD = None
            if how == Norm.NORMED:
                source = normed_RD = weight_WD.new_empty(rows, d)
            else:
                moments_R2 = x_TD.new_empty(rows, 2)
            _normalize(kernels, x_TD, rows_R, norm, moments_R2, normed_RD, rows, norm_eps)
        programs = -(-rows // config["M"]) * -(-w // config["N"])
        kernels.project[(programs,)](
            source,
            rows_R if how != Norm.NORMED else None,
            moments_R2,
            *norm,
            weight_WD,
            bias_W,
            y_RW,
            rows,
            source.stride(0),
            weight_WD.stride(0),
            y_RW.stride(0),
            norm_eps,
            D=d,
            W=w,
            SILU_FIRST=silu[0],
            SILU_END=silu[1],
            **config,
        )
    return y_RW


def hstu_projection_product(
    x_TD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None = None,
    norm_weight_GD: Tensor | None = None,
    norm_bias_GD: Tensor | None = None,
    groups_T: Tensor | None = None,
    rows_R: Tensor | None = None,
    *,
    norm_eps: float,
    silu: tuple[int, int] = (0, 0),
    out: Tensor | None = None,
) -> Tensor:
    """Implements `Projection`: a norm in Triton, torch's product, and what is left in Triton."""
    check_call(x_TD, weight_WD, bias_W, norm_weight_GD, norm_bias_GD, groups_T, rows_R, silu, out)
    check_dtypes("hstu_projection", x_TD, weight_WD)
    kernels = load()
    rows = len(x_TD) if rows_R is None else len(rows_R)
    w, d = weight_WD.shape
    y_RW = weight_WD.new_empty(rows, w) if out is None else out
    if not rows:
        return y_RW
    if norm_weight_GD is None and norm_bias_GD is None:
        groups_T = None
    normed_RD = weight_WD.new_empty(rows, d)
    norm = (norm_weight_GD, norm_bias_GD, groups_T)
    with device_of(x_TD):
        _normalize(kernels, x_TD, rows_R, norm, None, normed_RD, rows, norm_eps)
        # cuBLAS adds a bias of the product's dtype at no cost; so does what goes over all columns.
        if bias_W is None or silu == (0, w):
            torch.mm(normed_RD, weight_WD.t(), out=y_RW)
        else:
            torch.addmm(bias_W.to(weight_WD.dtype), normed_RD, weight_WD.t(), out=y_RW)
            bias_W = None
        first, end = silu
        if first < end:
            block, lines = blocks_of(end - first)
            kernels.finish[(-(-rows // lines), -(-(end - first) // block))](
                y_RW,
                bias_W,
                rows,
                y_RW.stride(0),
                FIRST=first,
                END=end,
                SILU_FIRST=silu[0],
                SILU_END=silu[1],
                L=lines,
                B=block,
                num_warps=4,
            )
    return y_RW


def _normalize(
    kernels: Any,
    x_TD: Tensor,
    rows_R: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None],
    moments_R2: Tensor | None,
    normed_RD: Tensor | None,
    rows: int,
    norm_eps: float,
) -> None:
    d = x_TD.shape[1]
    block, lines = blocks_of(d)
    kernels.normalize[(-(-rows // lines),)](
        x_TD,
        rows_R,
        *norm,
        moments_R2,
        normed_RD,
        rows,
        x_TD.stride(0),
        norm_eps,
        D=d,
        L=lines,
        B=block,
        num_warps=4,
    )


def blocks_of(columns: int) -> tuple[int, int]:
    """How many columns, and of how many rows, a program of a kernel without products takes."""
    block = power_of_two(columns, least=16, most=2048)
    return block, max(1, 1024 // block)


def configurations(dtype: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """What `gr kernels tune` tries for `hstu_projection_fused`, the default first."""
    rows, narrow = sizes["rows"], dtype != "float32"
    tried = [dict(default(dtype, sizes))]
    for (m, n, warps), how in itertools.product(tiles(rows, narrow), Norm):
        if how == Norm.IN_TILES and rows > 256:
            continue
        k = (128 if m * n <= 32 * 64 else 64) if narrow else 32
        item = 2 if narrow else 4
        operands = m * (item if how == Norm.NORMED else 4) + n * item
        for stages in (3, 4):
            if stages * k * operands <= SHARED_BYTES:
                tried.append(_launch(m, n, k, how, warps, stages))
    return [one for i, one in enumerate(tried) if one not in tried[:i]]


def tiles(rows: int, narrow: bool) -> list[tuple[int, int, int]]:
    """M, N and warps that may be fastest for so many rows."""
    if rows <= 64:
        return [(m, n, 4) for m in (rows // 2, rows) if m >= 16 for n in (16, 32, 64)]
    wide = [(128, 256, 8)] if narrow and rows > 256 else []
    return [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8), *wide]


@functools.cache
def _default(rows: int, columns: int, narrow: bool) -> Mapping[str, int]:
    k = 64 if narrow else 32
    if rows <= 32:
        # As many programs as an H100 has processors, if that can be.
        n = 16 if columns <= 16 * 132 else 32
        return _launch(rows, n, 2 * k, Norm.IN_TILES, 4, 3)
    if rows * columns <= 132 * 128 * 128:
        return _launch(64, 64, k, Norm.FROM_MOMENTS, 4, 3)
    m, warps = (128, 8) if narrow else (64, 4)
    return _launch(m, m, k, Norm.NORMED, warps, 3)


def default(dtype: str, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """For a device on which nothing was measured."""
    return _default(sizes["rows"], sizes["columns"], dtype != "float32")


def _launch(m: int, n: int, k: int, norm: Norm, warps: int, stages: int) -> dict[str, int]:
    return {
        "M": m,
        "N": n,
        "K": k,
        "GROUP": 8,
        "NORM": int(norm),
        "num_warps": warps,
        "num_stages": stages,
    }


def check_dtypes(op: str, x_TD: Tensor, weight: Tensor) -> None:
    """Raises `ValueError` for what only the reference computes in."""
    if weight.dtype not in DTYPES or x_TD.dtype != torch.float32:
        raise ValueError(
            f"x is {x_TD.dtype} and weight {weight.dtype}; expected float32 and float32, bfloat16 "
            f"or float16; {op}-reference also computes in float64"
        )


@functools.cache
def load() -> Any:
    """The kernels. Raises `PlanError` where Triton is not installed."""
    if find_spec("triton") is None:
        raise PlanError("the op hstu_projection needs Triton; pip install gr-kernels[triton]")
    from gr_kernels.ops.hstu_projection import triton_kernels

    return triton_kernels
