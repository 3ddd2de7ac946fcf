"""The op `hstu_attention` as ``torch.ops.gr.hstu_attention``, so that export and compile see it.

Shapes as in `gr_kernels.ops.hstu_attention.interface`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.choice import choose
from gr_kernels.ops.hstu_attention import reference


@torch.library.custom_op("gr::hstu_attention", mutates_args=())
def hstu_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    alpha: float,
    divisor: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Runs the best implementation for the device and the dtype; the reference on unknown ones."""
    implementation = reference.hstu_attention
    if q_THK.device.type in ("cpu", "cuda"):
        implementation = choose(
            "hstu_attention",
            str(q_THK.dtype).removeprefix("torch."),
            device=q_THK.device.type,
            sizes={
                "d_qk": q_THK.shape[-1],
                "d_v": v_SHV.shape[-1],
                "biased": int(bias is not None),
            },
        ).resolve()
    return implementation(
        q_THK,
        k_SHK,
        v_SHV,
        query_offsets,
        key_offsets,
        low_T,
        high_T,
        own_T,
        alpha,
        divisor,
        bias,
    )


@hstu_attention.register_fake
def _(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    alpha: float,
    divisor: float,
    bias: Tensor | None = None,
) -> Tensor:
    return q_THK.new_empty(q_THK.shape[0], v_SHV.shape[1], v_SHV.shape[2])
