"""The op `hstu_output` for CUDA: all of it in Triton, or the product by torch, so cuBLAS.

As `gr_kernels.ops.hstu_projection.triton` says; shapes as in
`gr_kernels.ops.hstu_output.interface`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_core.stack import Gate
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.hstu_output.interface import check_call
from gr_kernels.ops.hstu_projection.triton import SHARED_BYTES, Norm, blocks_of, check_dtypes, tiles
from gr_kernels.tuning import configuration, power_of_two

KERNEL = "hstu_output-triton"


def hstu_output_fused(
    x_TD: Tensor,
    a_RHV: Tensor,
    u_RF: Tensor,
    weight_DY: Tensor,
    bias_D: Tensor | None = None,
    norm_weight_GF: Tensor | None = None,
    norm_bias_GF: Tensor | None = None,
    groups_T: Tensor | None = None,
    rows_R: Tensor | None = None,
    *,
    norm_eps: float,
    head_norm: bool = False,
    gate: Gate,
    silu_u: bool = False,
) -> None:
    """Implements `Output`: a product that normalizes and gates what it reads, and adds to x."""
    norm = (norm_weight_GF, norm_bias_GF, groups_T)
    check_call(x_TD, a_RHV, u_RF, weight_DY, bias_D, *norm, rows_R, gate)
    check_dtypes("hstu_output", x_TD, weight_DY)
    kernels = load()
    rows, heads, _ = a_RHV.shape
    d, y = weight_DY.shape
    f = u_RF.shape[1]
    if not rows:
        return
    with device_of(x_TD):
        dtype = str(weight_DY.dtype).removeprefix("torch.")
        sizes = {"rows": power_of_two(rows, least=16, most=65536), "columns": y, "width": d}
        config = configuration(KERNEL, dtype, sizes, default(dtype, sizes))
        parts = heads if head_norm else 1
        if config["NORM"] == Norm.IN_TILES and parts > 1:
            config = {**config, "NORM": int(Norm.FROM_MOMENTS)}
        how = config["NORM"]
        moments, source = None, a_RHV
        if how != Norm.IN_TILES:
            gated_RY = None
            if how == Norm.NORMED:
                source = gated_RY = weight_DY.new_empty(rows, y)
            else:
                moments = x_TD.new_empty(rows, parts, 2)
            _gate(
                kernels, a_RHV, u_RF, norm, rows_R, moments, gated_RY, norm_eps, parts, gate, silu_u
            )
        if norm_weight_GF is None and norm_bias_GF is None:
            norm = (None, None, None)
        programs = -(-rows // config["M"]) * -(-d // config["N"])
        kernels.add_product[(programs,)](
            x_TD,
            source,
            u_RF,
            rows_R,
            moments,
            *norm,
            weight_DY,
            bias_D,
            rows,
            x_TD.stride(0),
            source.stride(0),
            u_RF.stride(0),
            weight_DY.stride(0),
            norm_eps,
            D=d,
            P=parts,
            S=f // parts,
            GATE=gate,
            SILU_U=silu_u,
            **config,
        )


def hstu_output_product(
    x_TD: Tensor,
    a_RHV: Tensor,
    u_RF: Tensor,
    weight_DY: Tensor,
    bias_D: Tensor | None = None,
    norm_weight_GF: Tensor | None = None,
    norm_bias_GF: Tensor | None = None,
    groups_T: Tensor | None = None,
    rows_R: Tensor | None = None,
    *,
    norm_eps: float,
    head_norm: bool = False,
    gate: Gate,
    silu_u: bool = False,
) -> None:
    """Implements `Output`: norm and gate in Triton, torch's product, the residual in Triton."""
    norm = (norm_weight_GF, norm_bias_GF, groups_T)
    check_call(x_TD, a_RHV, u_RF, weight_DY, bias_D, *norm, rows_R, gate)
    check_dtypes("hstu_output", x_TD, weight_DY)
    kernels = load()
    rows, heads, _ = a_RHV.shape
    d, y = weight_DY.shape
    if not rows:
        return
    gated_RY = weight_DY.new_empty(rows, y)
    parts = heads if head_norm else 1
    with device_of(x_TD):
        _gate(kernels, a_RHV, u_RF, norm, rows_R, None, gated_RY, norm_eps, parts, gate, silu_u)
        output_RD = torch.mm(gated_RY, weight_DY.t())
        block, lines = blocks_of(d)
        kernels.add[(-(-rows // lines), -(-d // block))](
            x_TD,
            rows_R,
            output_RD,
            bias_D,
            rows,
            x_TD.stride(0),
            D=d,
            L=lines,
            B=block,
            num_warps=4,
        )


def _gate(
    kernels: Any,
    a_RHV: Tensor,
    u_RF: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None],
    rows_R: Tensor | None,
    moments: Tensor | None,
    gated_RY: Tensor | None,
    norm_eps: float,
    parts: int,
    gate: Gate,
    silu_u: bool,
) -> None:
    rows, f = u_RF.shape
    block, lines = blocks_of(f // parts)
    if norm[0] is None and norm[1] is None:
        norm = (None, None, None)
    kernels.gate[(-(-rows * parts // lines),)](
        a_RHV,
        u_RF,
        rows_R if norm[2] is not None else None,
        *norm,
        moments,
        gated_RY,
        rows,
        a_RHV.stride(0),
        u_RF.stride(0),
        norm_eps,
        P=parts,
        S=f // parts,
        GATE=gate,
        SILU_U=silu_u,
        L=lines,
        B=block,
        num_warps=4,
    )


def configurations(dtype: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """What `gr kernels tune` tries for `hstu_output_fused`, the default first."""
    rows, narrow = sizes["rows"], dtype != "float32"
    tried = [dict(default(dtype, sizes))]
    for (m, n, warps), how in itertools.product(tiles(rows, narrow), Norm):
        if how == Norm.IN_TILES and rows > 256:
            continue
        k = (128 if m * n <= 32 * 64 else 64) if narrow else 32
        operands = (m + n) if how == Norm.NORMED else (2 * m + 3 * n)
        for stages in (2, 3, 4):
            is_deep = stages > 2 if how == Norm.NORMED else stages < 4
            if is_deep and stages * k * operands * (2 if narrow else 4) <= SHARED_BYTES:
                tried.append(_launch(m, n, k, how, warps, stages))
    return [one for i, one in enumerate(tried) if one not in tried[:i]]


@functools.cache
def _default(rows: int, width: int, narrow: bool) -> Mapping[str, int]:
    k = 64 if narrow else 32
    if rows <= 32:
        # As many programs as an H100 has processors, if that can be.
        n = 16 if width <= 16 * 132 else 32
        return _launch(rows, n, k, Norm.IN_TILES, 4, 3)
    if rows * width <= 132 * 128 * 64:
        # Of three weights at once, more columns of float32 would not fit into registers.
        return _launch(64, 64 if narrow else 32, k, Norm.FROM_MOMENTS, 4, 2)
    m, warps = (128, 8) if narrow else (64, 4)
    return _launch(m, m, k, Norm.NORMED, warps, 3)


def default(dtype: str, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """For a device on which nothing was measured."""
    return _default(sizes["rows"], sizes["width"], dtype != "float32")


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


@functools.cache
def load() -> Any:
    """The kernels. Raises `PlanError` where Triton is not installed."""
    if find_spec("triton") is None:
        raise PlanError("the op hstu_output needs Triton; pip install gr-kernels[triton]")
    from gr_kernels.ops.hstu_output import triton_kernels

    return triton_kernels
