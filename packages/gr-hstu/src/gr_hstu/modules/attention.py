"""The op `hstu_attention`, pointwise SiLU attention: the dense definition.

Shapes: B batch, T queries, S keys, H heads, K columns of Q and K, V columns of V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hstu_attention(
    q_BTHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    mask_BTS: Tensor,
    *,
    alpha: float,
    divisor: float,
    bias_BTS: Tensor | None = None,
) -> Tensor:
    """SiLU(alpha Q Kᵀ + bias) / divisor ⊙ mask, times V (arXiv 2402.17152, equation 2).

    No softmax: each score is activated on its own, so masked keys, padding among them, add exactly
    nothing. `mask_BTS` is bool; `bias_BTS` is shared by the heads. Returns (B, T, H, V).
    """
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * alpha
    if bias_BTS is not None:
        score_BHTS = score_BHTS + bias_BTS[:, None]
    weight_BHTS = F.silu(score_BHTS) / divisor
    weight_BHTS = weight_BHTS.masked_fill(~mask_BTS[:, None], 0.0)
    return torch.einsum("bhts,bshv->bthv", weight_BHTS, v_BSHV)


def softmax_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    mask_BTT: Tensor,
    *,
    bias_BTT: Tensor | None = None,
) -> Tensor:
    """The research code's `softmax_rel_bias`, kept for the checkpoints trained with it.

    As there, the heads form one wide head (while the scale stays that of one), and the softmax is
    taken before the mask: over all tokens, future and padding among them, the latter with keys of
    zero. So the number of tokens has to be the trained one. Returns (B, T, H, V).
    """
    # A token sees itself unless it is padding.
    valid_BT = mask_BTT.diagonal(dim1=1, dim2=2)
    k_BTF = k_BTHK.flatten(-2).masked_fill(~valid_BT[..., None], 0.0)
    score_BTT = torch.einsum("btf,bsf->bts", q_BTHK.flatten(-2), k_BTF)
    if bias_BTT is not None:
        score_BTT = score_BTT + bias_BTT
    weight_BTT = torch.softmax(score_BTT * q_BTHK.shape[-1] ** -0.5, dim=-1)
    weight_BTT = weight_BTT.masked_fill(~mask_BTT, 0.0)
    return torch.einsum("bts,bshv->bthv", weight_BTT, v_BTHV)
