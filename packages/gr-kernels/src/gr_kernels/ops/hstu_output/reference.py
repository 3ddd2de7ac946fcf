"""The op `hstu_output` in torch: the definition, on any device and in any dtype.

Shapes as in `gr_kernels.ops.hstu_output.interface`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gr_core.stack import Gate
from gr_kernels.ops.hstu_output.interface import check_call
from gr_kernels.ops.hstu_projection.reference import layer_norm


def hstu_output(
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
    """Implements `Output`; x may also be float64."""
    check_call(
        x_TD,
        a_RHV,
        u_RF,
        weight_DY,
        bias_D,
        norm_weight_GF,
        norm_bias_GF,
        groups_T,
        rows_R,
        gate,
    )
    if not len(a_RHV):
        return
    dtype = weight_DY.dtype
    wide = torch.promote_types(dtype, torch.float32)
    parts = a_RHV.shape[1] if head_norm else 1
    if rows_R is not None and groups_T is not None:
        groups_T = groups_T[rows_R.clamp(min=0)]

    def norm(value_RF: Tensor) -> Tensor:
        return layer_norm(value_RF, norm_weight_GF, norm_bias_GF, groups_T, parts, norm_eps)

    a_RF, u_RF = a_RHV.flatten(1).to(wide), u_RF.to(wide)
    if silu_u:
        u_RF = F.silu(u_RF)
    if gate == "norm(a*u)":
        y_RY = norm(a_RF * u_RF)
    else:
        normed_RF = norm(a_RF)
        y_RY = u_RF * normed_RF
        if gate != "u*norm(a)":
            second_RF = a_RF if gate == "u,a,u*norm(a)" else normed_RF
            y_RY = torch.cat([u_RF, second_RF, y_RY], dim=1)
    output_RD = F.linear(y_RY.to(dtype), weight_DY).to(x_TD.dtype)
    if bias_D is not None:
        output_RD += bias_D.to(x_TD.dtype)
    if rows_R is None:
        x_TD += output_RD
    else:
        # No choice of rows by a mask: its size would have to come from the device.
        output_RD.masked_fill_((rows_R < 0)[:, None], 0)
        x_TD.index_add_(0, rows_R.clamp(min=0), output_RD)
