"""The op `hstu_projection` in torch: the definition, on any device and in any dtype.

Shapes as in `gr_kernels.ops.hstu_projection.interface`; F normalized columns, P parts of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gr_kernels.ops.hstu_projection.interface import check_call


def hstu_projection(
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
    """Implements `Projection`; x may also be float64."""
    check_call(x_TD, weight_WD, bias_W, norm_weight_GD, norm_bias_GD, groups_T, rows_R, silu, out)
    dtype = weight_WD.dtype
    if rows_R is not None:
        rows_R = rows_R.clamp(min=0)
        x_TD = x_TD[rows_R]
        groups_T = None if groups_T is None else groups_T[rows_R]
    wide_RD = x_TD.to(torch.promote_types(x_TD.dtype, dtype))
    normed_RD = layer_norm(wide_RD, norm_weight_GD, norm_bias_GD, groups_T, 1, norm_eps)
    y_RW = F.linear(normed_RD.to(dtype), weight_WD, None if bias_W is None else bias_W.to(dtype))
    F.silu(y_RW[:, slice(*silu)], inplace=True)
    return y_RW if out is None else out.copy_(y_RW)


def layer_norm(
    x_TF: Tensor,
    weight_GF: Tensor | None,
    bias_GF: Tensor | None,
    groups_T: Tensor | None,
    parts: int,
    eps: float,
) -> Tensor:
    """With scale and shift of each token's group; mean and variance of each of ``parts`` parts."""
    x_TPF = torch.unflatten(x_TF, 1, (parts, -1))
    normed_TF = F.layer_norm(x_TPF, x_TPF.shape[2:], eps=eps).flatten(1)
    if weight_GF is not None:
        normed_TF = normed_TF * _of_group(weight_GF, groups_T).to(x_TF.dtype)
    if bias_GF is not None:
        normed_TF = normed_TF + _of_group(bias_GF, groups_T).to(x_TF.dtype)
    return normed_TF


def _of_group(parameter_GF: Tensor, groups_T: Tensor | None) -> Tensor:
    return parameter_GF[0] if groups_T is None else parameter_GF[groups_T.long()]
