"""Small perceptrons: the item side and the multi-task heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwishLayerNorm(nn.Module):
    """x · sigmoid(LayerNorm(x)), the activation of the public ranking code."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.norm(x))


class MLP(nn.Module):
    """Linear, SwishLayerNorm, Linear and, where asked, a final LayerNorm."""

    def __init__(self, in_width: int, hidden: int, out_width: int, *, norm: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_width, hidden)
        self.activation = SwishLayerNorm(hidden)
        self.output = nn.Linear(hidden, out_width)
        self.norm = nn.LayerNorm(out_width) if norm else None
        for linear in (self.hidden, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.activation(self.hidden(x)))
        return x if self.norm is None else self.norm(x)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / max(|x|, eps) along the last dimension; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=eps)
