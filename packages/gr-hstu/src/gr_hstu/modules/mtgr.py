"""The MTGR layer and stack: HSTU-like attention with a layer norm per token group.

Shapes: B batch, T tokens given, S tokens seen (cached and given), D model width, H heads,
K columns of Q and K per head, V columns of U and V per head, N layers, F normalized width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.config import MTGRConfig
from gr_hstu.modules.attention import hstu_attention
from gr_hstu.modules.masks import NUM_GROUPS
from gr_hstu.modules.projection import Projection


class GroupLayerNorm(nn.Module):
    """LayerNorm with its own scale and shift for each token group (arXiv 2505.18654)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM_GROUPS, width))
        self.bias = nn.Parameter(torch.zeros(NUM_GROUPS, width))
        self.eps = eps

    def forward(self, x_BTF: Tensor, group_BT: Tensor) -> Tensor:
        normed_BTF = F.layer_norm(x_BTF, (x_BTF.shape[-1],), eps=self.eps)
        scale_BTF, shift_BTF = (F.embedding(group_BT, p) for p in (self.weight, self.bias))
        return normed_BTF * scale_BTF + shift_BTF


class MTGRLayer(nn.Module):
    """X̃ = GroupLN(X); Q, K, V, U = SiLU(W1 X̃); X + W2 · GroupLN(SiLU(Q Kᵀ)/N ⊙ M · V ⊙ U)."""

    def __init__(self, config: MTGRConfig) -> None:
        super().__init__()
        self.config = config
        gated, compared = config.num_heads * config.v_dim, config.num_heads * config.qk_dim
        self.input_norm = GroupLayerNorm(config.d_model, config.norm_eps)
        self.uvqk = Projection(
            config.d_model,
            {"u": gated, "v": gated, "q": compared, "k": compared},
            config.num_heads,
            bias=True,
        )
        self.gate_norm = GroupLayerNorm(gated, config.norm_eps)
        self.output = nn.Linear(gated, config.d_model)
        for linear in (self.uvqk, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def project(self, x_BTD: Tensor, group_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U (B, T, H·V), V (B, T, H, V), Q and K (B, T, H, K)."""
        parts = self.parts(self.uvqk, self.input_norm(x_BTD, group_BT))
        return parts["u"], parts["v"], parts["q"], parts["k"]

    def parts(self, projection: Projection, normed_BTD: Tensor) -> dict[str, Tensor]:
        """U, V, Q and K, as `project` gives them, or those that a part of `uvqk` has."""
        return projection.split(F.silu(projection(normed_BTD)))

    def gate(self, u_BTF: Tensor, attended_BTF: Tensor, group_BT: Tensor) -> Tensor:
        """What the output projection reads."""
        gated_BTF: Tensor = self.gate_norm(attended_BTF * u_BTF, group_BT)
        return gated_BTF

    def forward(
        self,
        x_BTD: Tensor,
        group_BT: Tensor,
        mask_BTS: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens (B, T, D), and their K (B, T, H, K) and V (B, T, H, V)."""
        u_BTF, v_BTHV, q_BTHK, k_BTHK = self.project(x_BTD, group_BT)
        k_BSHK, v_BSHV = k_BTHK, v_BTHV
        if past is not None:
            k_BSHK = torch.cat([past[0], k_BTHK], dim=1)
            v_BSHV = torch.cat([past[1], v_BTHV], dim=1)
        attended_BTHV = hstu_attention(
            q_BTHK,
            k_BSHK,
            v_BSHV,
            mask_BTS,
            alpha=1.0,
            divisor=self.config.max_seq_len,
        )
        gated_BTF = self.gate(u_BTF, attended_BTHV.flatten(-2), group_BT)
        gated_BTF = F.dropout(gated_BTF, self.config.dropout, self.training)
        return self.output(gated_BTF) + x_BTD, k_BTHK, v_BTHV


class MTGRStack(nn.Module):
    """Layers one after another, over given tokens and, before them, cached ones."""

    def __init__(self, config: MTGRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MTGRLayer(config) for _ in range(config.num_layers))

    def forward(
        self,
        x_BTD: Tensor,
        group_BT: Tensor,
        mask_BTS: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the tokens (B, T, D), and of each layer their K (B, T, H, K) and V (B, T, H, V).

        `past` holds the same for the cached tokens, stacked: (N, B, S - T, H, K) and V.
        """
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            layer_past = None if past is None else (past[0][i], past[1][i])
            x_BTD, k_BTHK, v_BTHV = layer(x_BTD, group_BT, mask_BTS, layer_past)
            keys.append(k_BTHK)
            values.append(v_BTHV)
        return x_BTD, keys, values
