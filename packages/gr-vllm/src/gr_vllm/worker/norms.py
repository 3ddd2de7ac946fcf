"""Layer norms whose width may be spread over tensor-parallel ranks.

Shapes: T tokens, F width on this rank, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)


class GroupedNorm(nn.Module):
    """Mean and variance of the whole width, or of each head; scale and shift by group of tokens.

    With ``split``, the width is spread over the ranks, and full-width statistics are summed up.
    """

    def __init__(
        self, width: int, groups: int, eps: float, *, affine: bool, heads: int = 0, split: bool
    ) -> None:
        """``width`` and ``heads`` are those of all ranks; ``heads`` 0: no norm of each head."""
        super().__init__()
        self._ranks = get_tensor_model_parallel_world_size() if split else 1
        self._width = width
        self._heads = heads // self._ranks
        self._eps = eps
        self._own = own = width // self._ranks
        self.weight = self._parameter(groups, own) if affine else None
        self.bias = self._parameter(groups, own) if affine else None

    def _parameter(self, groups: int, own: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(groups, own), requires_grad=False)
        parameter.weight_loader = self._load  # type: ignore[attr-defined]
        return parameter

    def _load(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        own = parameter.shape[1]
        rank = get_tensor_model_parallel_rank() if self._ranks > 1 else 0
        parameter.data.copy_(loaded[:, rank * own : (rank + 1) * own])

    def forward(self, x_TF: Tensor, groups_T: Tensor | None) -> Tensor:
        if not self._heads and self._ranks == 1 and groups_T is None:
            scale, shift = (None if p is None else p[0] for p in (self.weight, self.bias))
            return nn.functional.layer_norm(x_TF, x_TF.shape[-1:], scale, shift, self._eps)
        wide = x_TF.float()
        if self._heads:
            normed = self._normed(
                wide.view(len(wide), self._heads, self._own // self._heads)
            ).flatten(1)
        elif self._ranks > 1:
            # In two passes: the difference of large sums would lose what it is about.
            mean = tensor_model_parallel_all_reduce(wide.sum(1, keepdim=True)) / self._width
            wide = wide - mean
            squares = tensor_model_parallel_all_reduce(wide.square().sum(1, keepdim=True))
            normed = wide * torch.rsqrt(squares / self._width + self._eps)
        else:
            normed = self._normed(wide)
        if self.weight is not None and self.bias is not None:
            scale, shift = (
                (p[0] if groups_T is None else p[groups_T]) for p in (self.weight, self.bias)
            )
            normed = torch.addcmul(shift.float(), normed, scale.float())
        return normed.to(x_TF.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self._eps)
