"""A causal softmax Transformer of the same width, heads and depth, as the honest opponent.

Pre-norm, 4·D wide feed-forward with GELU, `F.scaled_dot_product_attention`. It is granted what
costs it least: no padding (projections take all users' tokens at once, the attention one user after
the other), K and V of cached tokens in place, and candidates that attend to the history in a call
of their own. That call needs no mask, as a candidate does not attend to itself either: what it is
reaches its row by the residual alone.

Shapes: T tokens of all users, S keys of one user, D model width, H heads, K columns per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_kernels.benchmark.points import HEADS


@dataclass(frozen=True, slots=True)
class User:
    """Where one user's tokens are in T, and their K and V of all layers, (1, H, S, K)."""

    start: int
    cached: int
    new: int
    candidates: int
    keys: Sequence[Tensor]
    """Rows from ``cached`` on are written by the forward pass."""
    values: Sequence[Tensor]
    mask: Tensor | None
    """(new, S) bool, where tokens are cached: the built-in causal mask would align at the start."""

    @staticmethod
    def of(start: int, cached: int, new: int, candidates: int, model: CausalTransformer) -> User:
        keys, values = (
            [
                torch.zeros(1, HEADS, cached + new, model.width // HEADS, dtype=model.dtype)
                for _ in model.blocks
            ]
            for _ in range(2)
        )
        mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached) if cached else None
        return User(start, cached, new, candidates, keys, values, mask)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_TD: Tensor, users: Sequence[User], number: int) -> Tensor:
        qkv_T3HK = self.qkv(self.attention_norm(x_TD)).unflatten(1, (3, HEADS, -1))
        a_THK = torch.empty_like(qkv_T3HK[:, 0])
        for user in users:
            history = slice(user.start, user.start + user.new)
            k, v = user.keys[number], user.values[number]
            k[0, :, user.cached :] = qkv_T3HK[history, 1].transpose(0, 1)
            v[0, :, user.cached :] = qkv_T3HK[history, 2].transpose(0, 1)
            candidates = slice(history.stop, history.stop + user.candidates)
            for rows, causal, mask in (
                (history, user.mask is None, user.mask),
                (candidates, False, None),
            ):
                q = qkv_T3HK[rows, 0].transpose(0, 1)[None]
                seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
                a_THK[rows] = seen[0].transpose(0, 1)
        x_TD = x_TD + self.output(a_THK.flatten(1))
        fed_TD: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(x_TD))))
        return x_TD + fed_TD


class CausalTransformer(nn.Module):
    def __init__(self, layers: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers)).to(dtype)

    def forward(self, x_TD: Tensor, users: Sequence[User]) -> Tensor:
        for number, block in enumerate(self.blocks):
            x_TD = block(x_TD, users, number)
        return x_TD
