"""The op `hstu_attention`: pointwise SiLU attention, the dense definition.

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
