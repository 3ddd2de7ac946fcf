"""The op `hstu_attention` as its equation says it, on any device: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gr_kernels.ops.hstu_attention.interface import sequences


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
    """See `gr_kernels.ops.hstu_attention.interface`. Scores of all pairs, then a mask."""
    a_THV = q_THK.new_zeros(len(q_THK), *v_SHV.shape[1:])
    offsets = (query_offsets, key_offsets)
    for one in sequences(q_THK, k_SHK, v_SHV, *offsets, low_T, high_T, own_T, bias):
        score_HTS = torch.einsum("thk,shk->hts", q_THK[one.queries], k_SHK[one.keys]) * alpha
        if one.bias_TS is not None:
            score_HTS = score_HTS + one.bias_TS.to(score_HTS.dtype)
        key_S = torch.arange(one.keys.stop - one.keys.start, device=q_THK.device)
        low_T1, high_T1, own_T1 = (
            torch.from_numpy(place).to(q_THK.device)[:, None]
            for place in (one.low_T, one.high_T, one.own_T)
        )
        sees_TS = ((key_S >= low_T1) & (key_S < high_T1)) | (key_S == own_T1)
        weight_HTS = (F.silu(score_HTS) / divisor).masked_fill(~sees_TS, 0.0)
        a_THV[one.queries] = torch.einsum("hts,shv->thv", weight_HTS, v_SHV[one.keys])
    return a_THV
