"""What is computed at a point: layers with random weights of a trained model's scale, and tokens.

Shapes: D model width, H heads, K columns of each of U, V, Q, K per head, S tokens of one user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gr_core.stack import LayerWeights, Stack
from gr_kernels.benchmark.points import HEADS, Point

_EMBEDDING_STD = 1 / 32
"""Of item embeddings; the ranking variant scales them by sqrt(D). Errors depend on it: the larger
the input, the less of the output is what layers of low precision computed. With this one, plain
bf16 layers err by about 0.009."""


@dataclass(frozen=True, slots=True)
class Work:
    """A point with its numbers; everything on the CPU in float32."""

    point: Point
    stack: Stack
    users: Sequence[Tensor]
    """For each user (S, D): tokens cached, new tokens of the history, candidates."""

    @property
    def recomputed(self) -> Work:
        """The same tokens with nothing cached."""
        return Work(self.point.recomputed, self.stack, self.users)


def make_work(point: Point, seed: int = 0) -> Work:
    """The same for the same point and seed."""
    generator = torch.Generator().manual_seed(seed)
    width = point.width
    scale = _EMBEDDING_STD * math.sqrt(width)
    sizes = [point.cached + new + point.candidates for new in point.lengths]
    return Work(
        point,
        Stack(
            d_model=width,
            num_heads=HEADS,
            d_qk=width // HEADS,
            d_v=width // HEADS,
            alpha=(width // HEADS) ** -0.5,
            divisor=float(max(sizes)),
            norm_eps=1e-6,
            projection_silu="u",
            gate="u,a,u*norm(a)",
            head_norm=False,
            groups=1,
            layers=[_layer(width, generator) for _ in range(point.layers)],
        ),
        [torch.randn(size, width, generator=generator) * scale for size in sizes],
    )


def _layer(width: int, generator: torch.Generator) -> LayerWeights:
    """Xavier-uniform projections; norms and biases away from their neutral values."""

    def projection(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / (rows + columns))
        return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound

    def around(mean: float, *shape: int) -> Tensor:
        return mean + 0.05 * torch.randn(*shape, generator=generator)

    return LayerWeights(
        input_norm_weight=around(1, 1, width),
        input_norm_bias=around(0, 1, width),
        uvqk_weight=projection(4 * width, width),
        uvqk_bias=around(0, 4 * width),
        attention_norm_weight=around(1, 1, width),
        attention_norm_bias=around(0, 1, width),
        output_weight=projection(width, 3 * width),
        output_bias=None,
    )
