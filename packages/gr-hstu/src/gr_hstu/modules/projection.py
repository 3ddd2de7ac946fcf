"""The product that U, V, Q and K of a layer are columns of.

Shapes: B batch, T tokens, D model width, H heads, F all columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """U, V, Q and K of all heads side by side, in this order, or some of them."""

    def __init__(
        self,
        d_model: int,
        widths: Mapping[str, int],
        num_heads: int,
        *,
        bias: bool,
        device: str | None = None,
    ) -> None:
        super().__init__(d_model, sum(widths.values()), bias=bias, device=device)
        self.widths = dict(widths)
        self.num_heads = num_heads

    def split(self, projected_BTF: Tensor) -> dict[str, Tensor]:
        """By name: U (B, T, columns), the others (B, T, H, columns per head)."""
        parts = torch.split(projected_BTF, list(self.widths.values()), dim=-1)
        return {
            name: part if name == "u" else torch.unflatten(part, -1, (self.num_heads, -1))
            for name, part in zip(self.widths, parts, strict=True)
        }

    def only(self, names: str) -> Projection:
        """A copy that computes nothing but the parts named; it has their rows of the weights."""
        part = Projection(
            self.in_features,
            {name: self.widths[name] for name in names},
            self.num_heads,
            bias=self.bias is not None,
            device="meta",  # without drawing any random numbers
        )
        for field, whole in self.named_parameters():
            rows = torch.split(whole.detach(), list(self.widths.values()))
            by_name = dict(zip(self.widths, rows, strict=True))
            chosen = torch.cat([by_name[name] for name in names])
            setattr(part, field, nn.Parameter(chosen, requires_grad=False))
        return part
