"""What every implementation of the op `hstu_projection` is: an HSTU layer up to its attention.

    hstu_projection(x_TD, weight_WD, bias_W, norm_weight_GD, norm_bias_GD, groups_T, rows_R,
                    norm_eps=norm_eps, silu=(first, end), out=None) -> y_RW

y[r] = SiLU(weight · normed(x[rows[r]]) + bias), SiLU on the columns from ``first`` to ``end - 1``
only. normed is a LayerNorm over D, mean and variance in float32, with scale and shift of the
token's group, each of which may be None, as may bias. It is rounded to the weight's dtype; products
are summed in float32, or in float64 if that is the weight's dtype.

A call launches and waits for nothing, so the numbers in ``groups_T`` and ``rows_R`` are not
checked: those out of range are the caller's fault.

Shapes: T tokens, R rows of them that are wanted, D model width, W columns of the projection, G
groups of tokens with norms of their own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int32, torch.int64)
"""Of groups."""


class Projection(Protocol):
    """What each implementation is, see the module."""

    def __call__(
        self,
        x_TD: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None = None,
        norm_weight_GD: Tensor | None = None,
        norm_bias_GD: Tensor | None = None,
        groups_T: Tensor | None = None,
        rows_R: Tensor | None = None,
        *,
        norm_eps: float,
        silu: tuple[int, int] = (0, 0),
        out: Tensor | None = None,
    ) -> Tensor:
        """(R, W) in the dtype of ``weight_WD``, which is ``out`` where that is given.

        ``x_TD`` is float32, bias and norm of any floating dtype. ``groups_T`` is uint8, int32 or
        int64; None: all tokens are of group 0. ``rows_R`` is int64, in any order; for a row of -1
        that of y is arbitrary; None: all tokens. Rows of x, weight and out are contiguous, but may
        be any number of elements apart.
        """
        ...


def check_call(
    x_TD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    norm_weight_GD: Tensor | None,
    norm_bias_GD: Tensor | None,
    groups_T: Tensor | None,
    rows_R: Tensor | None,
    silu: tuple[int, int],
    out: Tensor | None,
) -> None:
    """Raises `ValueError` for shapes and dtypes with which kernels would read what is not there."""
    check_matrix("x", x_TD)
    check_matrix("weight", weight_WD)
    tokens, d = x_TD.shape
    w = len(weight_WD)
    if weight_WD.shape[1] != d:
        raise ValueError(f"weight has the shape {tuple(weight_WD.shape)}; expected (W, {d})")
    check_vector("bias", bias_W, w)
    check_norm(norm_weight_GD, norm_bias_GD, d)
    check_tokens(tokens, groups_T, rows_R)
    if not 0 <= silu[0] <= silu[1] <= w:
        raise ValueError(f"silu is {silu}; expected 0 <= first <= end <= {w}")
    if out is not None:
        check_matrix("out", out)
        shape = (tokens if rows_R is None else len(rows_R), w)
        if out.shape != shape or out.dtype != weight_WD.dtype:
            raise ValueError(
                f"out is {tuple(out.shape)} of {out.dtype}; expected {shape} of {weight_WD.dtype}"
            )


def check_matrix(name: str, x: Tensor) -> None:
    """That its rows are contiguous."""
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} has the shape {tuple(x.shape)} and strides {x.stride()}; expected a matrix "
            "with contiguous rows"
        )


def check_vector(name: str, x: Tensor | None, size: int) -> None:
    if x is not None and (x.shape != (size,) or not x.is_contiguous()):
        raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected ({size},), contiguous")


def check_norm(weight: Tensor | None, bias: Tensor | None, size: int) -> None:
    for name, x in (("norm_weight", weight), ("norm_bias", bias)):
        if x is not None and (x.dim() != 2 or x.shape[1] != size or not x.is_contiguous()):
            raise ValueError(
                f"{name} has the shape {tuple(x.shape)}; expected (G, {size}), contiguous"
            )


def check_tokens(tokens: int, groups_T: Tensor | None, rows_R: Tensor | None) -> None:
    if groups_T is not None and (
        groups_T.shape != (tokens,)
        or groups_T.dtype not in INTEGERS
        or not groups_T.is_contiguous()
    ):
        raise ValueError(
            f"groups are {tuple(groups_T.shape)} of {groups_T.dtype}; expected ({tokens},) of "
            "uint8, int32 or int64, contiguous"
        )
    if rows_R is not None and (
        rows_R.dim() != 1 or rows_R.dtype != torch.int64 or not rows_R.is_contiguous()
    ):
        raise ValueError(
            f"rows are {tuple(rows_R.shape)} of {rows_R.dtype}; expected (R,) of int64, contiguous"
        )
