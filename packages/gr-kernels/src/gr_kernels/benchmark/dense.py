"""HSTU layers in plain PyTorch: padded batches and a mask over all pairs of tokens.

What a careful engineer writes without kernels of their own, and what compilers and other runtimes
start from.

Shapes: B users, T tokens that are computed, padding among them, P cached tokens, S = P + T keys,
D model width, H heads, K columns per head, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core.stack import LayerWeights, Stack
from gr_kernels.benchmark.work import Work


class DenseLayer(nn.Module):
    """One layer of the ranking variant."""

    def __init__(self, weights: LayerWeights, stack: Stack) -> None:
        super().__init__()
        self.heads, self.alpha, self.scale = stack.num_heads, stack.alpha, 1 / stack.divisor
        width, gated = stack.d_model, stack.num_heads * stack.d_v
        self.input_norm = nn.LayerNorm(width, eps=stack.norm_eps)
        self.uvqk = nn.Linear(width, 4 * gated)
        self.attention_norm = nn.LayerNorm(gated, eps=stack.norm_eps)
        self.output = nn.Linear(3 * gated, width, bias=False)
        self.load_state_dict(
            {
                "input_norm.weight": _only(weights.input_norm_weight),
                "input_norm.bias": _only(weights.input_norm_bias),
                "uvqk.weight": weights.uvqk_weight,
                "uvqk.bias": weights.uvqk_bias,
                "attention_norm.weight": _only(weights.attention_norm_weight),
                "attention_norm.bias": _only(weights.attention_norm_bias),
                "output.weight": weights.output_weight,
            }
        )

    def forward(
        self,
        x_BTD: Tensor,
        mask_BTS: Tensor,
        past_k_BHPK: Tensor | None,
        past_v_BHPK: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, v, q, k = self.uvqk(self.input_norm(x_BTD)).chunk(4, dim=-1)
        u = F.silu(u)
        q_BHTK = self._split(q * self.alpha)
        k_BHTK, v_BHTK = self._split(k), self._split(v)
        k_BHSK, v_BHSK = k_BHTK, v_BHTK
        if past_k_BHPK is not None and past_v_BHPK is not None:
            k_BHSK = torch.cat([past_k_BHPK, k_BHTK], dim=2)
            v_BHSK = torch.cat([past_v_BHPK, v_BHTK], dim=2)
        score_BHTS = F.silu(q_BHTK @ k_BHSK.transpose(2, 3), inplace=True).mul_(mask_BTS[:, None])
        a = (score_BHTS @ v_BHSK).transpose(1, 2).flatten(2) * self.scale
        gated = torch.cat([u, a, u * self.attention_norm(a)], dim=-1)
        return x_BTD + self.output(gated), k_BHTK, v_BHTK

    def _split(self, part_BTF: Tensor) -> Tensor:
        # Without the copy, both products of the attention take longer than with it.
        return torch.unflatten(part_BTF, 2, (self.heads, -1)).transpose(1, 2).contiguous()


def _only(parameter_GF: Tensor | None) -> Tensor:
    """That of the only group."""
    assert parameter_GF is not None
    assert len(parameter_GF) == 1
    return parameter_GF[0]


class DenseStack(nn.Module):
    """All layers; ``past`` is the K and V of the cached tokens, layer after layer."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(weights, stack) for weights in stack.layers)

    def forward(self, x_BTD: Tensor, mask_BTS: Tensor, *past: Tensor) -> Tensor:
        """``mask_BTS`` is 1 where a token sees a key, of the layers' dtype."""
        for i, layer in enumerate(self.layers):
            k, v = past[2 * i : 2 * i + 2] if past else (None, None)
            x_BTD, _, _ = layer(x_BTD, mask_BTS, k, v)
        return x_BTD

    def cache(self, x_BTD: Tensor, mask_BTS: Tensor) -> list[Tensor]:
        """K and V of all tokens, layer after layer."""
        past = []
        for layer in self.layers:
            x_BTD, k, v = layer(x_BTD, mask_BTS, None, None)
            past += [k, v]
        return past


def padded(work: Work) -> Tensor:
    """(B, T, D): new tokens padded on the right to the longest history, then candidates."""
    point = work.point
    out_BTD = torch.zeros(point.users, point.new + point.candidates, point.width)
    for row_TD, tokens_SD, new in zip(out_BTD, work.users, point.lengths, strict=True):
        row_TD[:new] = tokens_SD[point.cached : point.cached + new]
        row_TD[point.new :] = tokens_SD[point.cached + new :]
    return out_BTD


def dense_mask(work: Work) -> Tensor:
    """(B, T, S) bool: causal; a candidate sees the whole history and itself; padding is unseen."""
    point = work.point
    size = point.new + point.candidates
    mask_BTS = torch.zeros(point.users, size, point.cached + size, dtype=torch.bool)
    mask_BTS[:, :, : point.cached] = True
    new_BTT = mask_BTS[:, :, point.cached :]
    for mask_TT, new in zip(new_BTT, point.lengths, strict=True):
        mask_TT[: point.new, : point.new] = torch.ones(point.new, point.new).tril().bool()
        mask_TT[point.new :, :new] = True
        mask_TT[point.new :, point.new :] = torch.eye(point.candidates, dtype=torch.bool)
    return mask_BTS


def causal_mask(size: int) -> Tensor:
    """(1, T, T) bool."""
    return torch.ones(1, size, size, dtype=torch.bool).tril()


def stack_tokens(tokens: Sequence[Tensor], count: int) -> Tensor:
    """(B, count, D): the first ``count`` tokens of each user."""
    return torch.stack([tokens_SD[:count] for tokens_SD in tokens])
