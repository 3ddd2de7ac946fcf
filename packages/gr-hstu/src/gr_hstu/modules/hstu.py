"""The HSTU layer and stack, in the research and the ranking variant.

Shapes: B batch, T tokens given, S tokens seen (cached and given), D model width, H heads,
K columns of Q and K per head, V columns of U and V per head, N layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig
from gr_hstu.modules.attention import hstu_attention, softmax_attention
from gr_hstu.modules.bias import RelativeBias, RelativeIndex
from gr_hstu.modules.projection import Projection


class HeadNorm(nn.Module):
    """Normalizes each head by itself, with one scale and one shift a head."""

    def __init__(self, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))
        self.num_heads = num_heads
        self.eps = eps

    def forward(self, x_BTF: Tensor) -> Tensor:
        x_BTHV = torch.unflatten(x_BTF, -1, (self.num_heads, -1))
        normed_BTHV = F.layer_norm(x_BTHV, (x_BTHV.shape[-1],), eps=self.eps)
        return (normed_BTHV * self.weight[:, None] + self.bias[:, None]).flatten(-2)


class HSTULayer(nn.Module):
    """One HSTU layer (arXiv 2402.17152, equations 1 to 3).

    U, V, Q, K = split(W1 · norm(X)); Y = W2 · gate(U, attention(Q, K, V)) + X. The variants differ
    in what SiLU is applied to, in the parameters of the norms, in the gate, and in biases.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        research = config.variant == "research"
        self.config = config
        gated, compared = config.num_heads * config.d_v, config.num_heads * config.d_qk
        self.input_norm = nn.LayerNorm(
            config.d_model, eps=config.norm_eps, elementwise_affine=not research
        )
        self.uvqk = Projection(
            config.d_model,
            {"u": gated, "v": gated, "q": compared, "k": compared},
            config.num_heads,
            bias=not research,
        )
        self.attention_norm: nn.Module
        if config.variant == "ranking" and config.group_norm:
            self.attention_norm = HeadNorm(config.num_heads, config.norm_eps)
        else:
            self.attention_norm = nn.LayerNorm(
                gated, eps=config.norm_eps, elementwise_affine=not research
            )
        concatenated = config.concat_ua or not research
        self.output = nn.Linear(gated * (3 if concatenated else 1), config.d_model, bias=research)
        self.relative_bias: RelativeBias | None = None
        if research and config.relative_bias:
            self.relative_bias = RelativeBias(config.max_seq_len, config.time_bias_buckets)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The public code's initialization."""
        if self.config.variant == "research":
            nn.init.normal_(self.uvqk.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(self.uvqk.weight)
            nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.output.weight)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U (B, T, H·V), V (B, T, H, V), Q and K (B, T, H, K)."""
        parts = self.parts(self.uvqk, self.input_norm(x_BTD))
        return parts["u"], parts["v"], parts["q"], parts["k"]

    def parts(self, projection: Projection, normed_BTD: Tensor) -> dict[str, Tensor]:
        """U, V, Q and K, as `project` gives them, or those that a part of `uvqk` has."""
        projected = projection(normed_BTD)
        if self.config.variant == "ranking":
            parts = projection.split(projected)
            return {n: F.silu(part) if n == "u" else part for n, part in parts.items()}
        if self.config.projection_activation == "silu":
            projected = F.silu(projected)
        return projection.split(projected)

    def gate(self, u_BTF: Tensor, attended_BTF: Tensor) -> Tensor:
        """What the output projection reads."""
        normed_BTF: Tensor = self.attention_norm(attended_BTF)
        if self.config.variant == "ranking":
            return torch.cat([u_BTF, attended_BTF, u_BTF * normed_BTF], dim=-1)
        if self.config.concat_ua:
            return torch.cat([u_BTF, normed_BTF, u_BTF * normed_BTF], dim=-1)
        return u_BTF * normed_BTF

    def forward(
        self,
        x_BTD: Tensor,
        mask_BTS: Tensor,
        index: RelativeIndex | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Y (B, T, D) and the K (B, T, H, K) and V (B, T, H, V) of the given tokens.

        `past` is the K and V of the S - T tokens before the given ones.
        """
        u_BTF, v_BTHV, q_BTHK, k_BTHK = self.project(x_BTD)
        k_BSHK, v_BSHV = k_BTHK, v_BTHV
        if past is not None:
            k_BSHK = torch.cat([past[0], k_BTHK], dim=1)
            v_BSHV = torch.cat([past[1], v_BTHV], dim=1)
        bias_BTS = None
        if self.relative_bias is not None and index is not None:
            bias_BTS = self.relative_bias(index)
        if self.config.attention_activation == "softmax":
            assert past is None, "the softmax variant has no reusable K/V"
            attended_BTHV = softmax_attention(q_BTHK, k_BTHK, v_BTHV, mask_BTS, bias_BTT=bias_BTS)
        else:
            attended_BTHV = hstu_attention(
                q_BTHK,
                k_BSHK,
                v_BSHV,
                mask_BTS,
                alpha=self.config.scale,
                divisor=self.config.divisor,
                bias_BTS=bias_BTS,
            )
        gated = self.gate(u_BTF, attended_BTHV.flatten(-2))
        gated = F.dropout(gated, self.config.dropout, self.training)
        return self.output(gated) + x_BTD, k_BTHK, v_BTHV


class HSTUStack(nn.Module):
    """Layers one after another, over given tokens and, before them, cached ones."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))

    def forward(
        self,
        x_BTD: Tensor,
        mask_BTS: Tensor,
        index: RelativeIndex | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns Y (B, T, D), and the tokens' K (B, T, H, K) and V (B, T, H, V) of each layer.

        `past` holds the same for the cached tokens, stacked: (N, B, S - T, H, K) and V.
        """
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            layer_past = None if past is None else (past[0][i], past[1][i])
            x_BTD, k_BTHK, v_BTHV = layer(x_BTD, mask_BTS, index, layer_past)
            keys.append(k_BTHK)
            values.append(v_BTHV)
        return x_BTD, keys, values
