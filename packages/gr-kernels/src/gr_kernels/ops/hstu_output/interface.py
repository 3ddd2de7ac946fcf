"""What every implementation of the op `hstu_output` is: an HSTU layer after its attention.

    hstu_output(x_TD, a_RHV, u_RF, weight_DY, bias_D, norm_weight_GF, norm_bias_GF, groups_T,
                rows_R, norm_eps=norm_eps, head_norm=False, gate=gate, silu_u=False) -> None

In place x[rows[r]] += weight · gated(u[r], a[r]) + bias. What the ``gate`` says is concatenated; *
multiplies number by number; norm is a LayerNorm over F, or with ``head_norm`` over the V columns of
each head, with scale and shift of the token's group, each of which may be None, as may bias. With
``silu_u``, u is SiLU(u). All of it in float32, and what is gated is rounded to the weight's dtype;
products are summed in float32, or in float64 if that is the weight's dtype.

A call launches and waits for nothing, so the numbers in ``groups_T`` and ``rows_R`` are not
checked: those out of range, or twice among the rows, are the caller's fault.

Shapes: T tokens, R rows of them that are wanted, D model width, H heads, V columns of U and V per
head, F = H·V, Y = F or 3·F as the gate says, G groups of tokens with norms of their own.
"""

from __future__ import annotations

from typing import Protocol, get_args

from torch import Tensor

from gr_core.stack import Gate
from gr_kernels.ops.hstu_projection.interface import (
    check_matrix,
    check_norm,
    check_tokens,
    check_vector,
)


class Output(Protocol):
    """What each implementation is, see the module."""

    def __call__(
        self,
        x_TD: Tensor,
        a_RHV: Tensor,
        u_RF: Tensor,
        weight_DY: Tensor,
        bias_D: Tensor | None = None,
        norm_weight_GF: Tensor | None = None,
        norm_bias_GF: Tensor | None = None,
        groups_T: Tensor | None = None,
        rows_R: Tensor | None = None,
        *,
        norm_eps: float,
        head_norm: bool = False,
        gate: Gate,
        silu_u: bool = False,
    ) -> None:
        """Adds to ``x_TD``, float32, in place; rows of it that are not wanted stay as they are.

        a, u and weight are of one dtype, bias and norm of any floating dtype. ``groups_T`` is
        uint8, int32 or int64; None: all tokens are of group 0. ``rows_R`` is int64, in any order;
        nothing is added for a row of -1; None: all tokens. Rows of x, a, u and weight are
        contiguous, but may be any number of elements apart.
        """
        ...


def check_call(
    x_TD: Tensor,
    a_RHV: Tensor,
    u_RF: Tensor,
    weight_DY: Tensor,
    bias_D: Tensor | None,
    norm_weight_GF: Tensor | None,
    norm_bias_GF: Tensor | None,
    groups_T: Tensor | None,
    rows_R: Tensor | None,
    gate: Gate,
) -> None:
    """Raises `ValueError` for shapes and dtypes with which kernels would read what is not there."""
    if gate not in get_args(Gate):
        gates = ", ".join(map(repr, get_args(Gate)))
        raise ValueError(f"gate is {gate!r}; expected one of {gates}")
    for name, matrix in (("x", x_TD), ("u", u_RF), ("weight", weight_DY)):
        check_matrix(name, matrix)
    tokens, d = x_TD.shape
    check_tokens(tokens, groups_T, rows_R)
    rows = tokens if rows_R is None else len(rows_R)
    f = u_RF.shape[1]
    y = f * parts_of(gate)
    if a_RHV.dim() != 3 or len(a_RHV) != rows or a_RHV.shape[1] * a_RHV.shape[2] != f:
        raise ValueError(
            f"a has the shape {tuple(a_RHV.shape)}; expected ({rows}, H, V), H·V being {f}"
        )
    _, heads, d_v = a_RHV.shape
    if (d_v > 1 and a_RHV.stride(2) != 1) or (heads > 1 and a_RHV.stride(1) != d_v):
        raise ValueError(f"a has the strides {a_RHV.stride()}; expected contiguous rows (H, V)")
    if len(u_RF) != rows:
        raise ValueError(f"u has the shape {tuple(u_RF.shape)}; expected ({rows}, {f})")
    if weight_DY.shape != (d, y):
        raise ValueError(f"weight has the shape {tuple(weight_DY.shape)}; expected ({d}, {y})")
    if not a_RHV.dtype == u_RF.dtype == weight_DY.dtype:
        raise ValueError(
            f"a is {a_RHV.dtype}, u {u_RF.dtype} and weight {weight_DY.dtype}; expected one dtype"
        )
    check_vector("bias", bias_D, d)
    check_norm(norm_weight_GF, norm_bias_GF, f)


def parts_of(gate: Gate) -> int:
    """Y / F: what the gate concatenates."""
    return 1 + gate.count(",")
