"""The layers of all models in steps.

Shapes: B batch, T tokens given, P tokens cached, S = P + T keys, C candidates, R rows: the tokens
and, where candidates have rows of their own, these after them; A rows that answer, M layers,
D model width, F gated columns, H heads, K columns of Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.mtgr import MTGRStack
from gr_hstu.steps.tokens import Past


class Answer(NamedTuple):
    """The rows that the answer is read from: candidates, or the last token."""

    rows: Callable[[Tensor], Tensor]
    """Those (B, A, ...) of all rows (B, R, ...)."""
    sight_BAS: Tensor
    bias_BAS: Tensor | None = None


class Layers(nn.Module):
    """A stack whose last layer computes only what is read.

    That is K and V of the tokens, as in each layer, and the outputs of the rows that answer, as no
    layer follows. Either has weights apart: slices in a graph would hide from quantizers and
    compilers that they are constant.
    """

    last: Any
    """A layer of either stack: MTGR's take groups, HSTU's do not."""

    def __init__(
        self, stack: HSTUStack | MTGRStack, *, alpha: float, divisor: float, answers: bool = True
    ) -> None:
        super().__init__()
        layers = list(stack.layers)
        self.first = nn.ModuleList(layers[:-1])
        self.last = layers[-1]
        self.last_vk = self.last.uvqk.only("vk")
        self.last_uq = self.last.uvqk.only("uq") if answers else None
        self.alpha = alpha
        self.divisor = divisor

    def forward(
        self,
        x_BRD: Tensor,
        sight_BRS: Tensor | None,
        past: Past | None = None,
        answer: Answer | None = None,
        *,
        tokens: int | None = None,
        bias_MBRS: Tensor | None = None,
        group_BR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Y (B, A, D), and of the given tokens K (B, M, T, H, K) and V (B, M, T, H, V).

        ``sight`` and ``bias`` are those of all layers but the last, whose are in ``answer``;
        without one, Y is what the last layer gets. ``tokens`` is T where candidates follow the
        tokens: each row's own key is added apart then, and no part of the sight.
        """
        groups = [] if group_BR is None else [group_BR]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(
            q_BRHK: Tensor,
            own: tuple[Tensor, Tensor],
            sight_BRS: Tensor | None,
            bias_BRS: Tensor | None,
        ) -> Tensor:
            """(B, R, F) of the layer whose K and V came last; ``own`` are those of the rows."""
            assert sight_BRS is not None
            k_BSHK, v_BSHV = keys[-1], values[-1]
            if past is not None:
                k_BPHK, v_BPHV = past.layer(len(keys) - 1)
                k_BSHK = torch.cat([k_BPHK, k_BSHK], dim=1)
                v_BSHV = torch.cat([v_BPHV, v_BSHV], dim=1)
            q_BRHK = q_BRHK * self.alpha if self.alpha != 1.0 else q_BRHK
            attended_BRHV = attention(q_BRHK, k_BSHK, v_BSHV, sight_BRS, bias_BRS)
            if tokens is not None:
                attended_BRHV = attended_BRHV + own_attention(q_BRHK, *own, self.divisor)
            return attended_BRHV.flatten(-2)

        def given(rows_BR: Tensor) -> Tensor:
            return rows_BR if tokens is None else rows_BR[:, :tokens]

        for i, layer in enumerate(cast("Iterable[Any]", self.first)):
            u_BRF, v_BRHV, q_BRHK, k_BRHK = layer.project(x_BRD, *groups)
            keys.append(given(k_BRHK))
            values.append(given(v_BRHV))
            bias_BRS = None if bias_MBRS is None else bias_MBRS[i]
            attended_BRF = attend(q_BRHK, (k_BRHK, v_BRHV), sight_BRS, bias_BRS)
            x_BRD = layer.output(layer.gate(u_BRF, attended_BRF, *groups)) + x_BRD

        layer = self.last
        normed_BRD = layer.input_norm(x_BRD, *groups)
        v_BRHV, k_BRHK = layer.parts(self.last_vk, normed_BRD).values()
        keys.append(given(k_BRHK))
        values.append(given(v_BRHV))
        if answer is not None:
            rows = answer.rows
            u_BAF, q_BAHK = layer.parts(self.last_uq, rows(normed_BRD)).values()
            own = rows(k_BRHK), rows(v_BRHV)
            attended_BAF = attend(q_BAHK, own, answer.sight_BAS, answer.bias_BAS)
            gated_BAF = layer.gate(u_BAF, attended_BAF, *map(rows, groups))
            x_BRD = layer.output(gated_BAF) + rows(x_BRD)
        return x_BRD, torch.stack(keys, dim=1), torch.stack(values, dim=1)

    def with_candidates(
        self,
        x_BTD: Tensor,
        x_BCD: Tensor,
        sight_BRS: Tensor | None,
        sight_BCS: Tensor,
        past: Past,
        group_BR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens and candidates; the candidates (B, C, D) answer."""
        tokens = x_BTD.shape[1]
        answer = Answer(lambda rows_BR: rows_BR[:, tokens:], sight_BCS)
        x_BRD = torch.cat([x_BTD, x_BCD], dim=1)
        return self.forward(x_BRD, sight_BRS, past, answer, tokens=tokens, group_BR=group_BR)


def attention(
    q_BRHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    sight_BRS: Tensor,
    bias_BRS: Tensor | None,
) -> Tensor:
    """(B, R, H, V): `modules.attention.hstu_attention` in the form that compilers do best.

    That is products of matrices, and as few passes over all pairs as can be: mask and divisor are
    one factor, which asks for finite scores of padded keys too.
    """
    score_BHRS = q_BRHK.transpose(1, 2) @ k_BSHK.permute(0, 2, 3, 1)
    if bias_BRS is not None:
        score_BHRS = score_BHRS + bias_BRS[:, None]
    # In a copy of lower precision, whose products go on in it.
    weight_BHRS = F.silu(score_BHRS) * sight_BRS[:, None].to(score_BHRS.dtype)
    return (weight_BHRS @ v_BSHV.transpose(1, 2)).transpose(1, 2)


def own_attention(q_BRHK: Tensor, k_BRHK: Tensor, v_BRHV: Tensor, divisor: float) -> Tensor:
    """(B, R, H, V), what each row's own key adds to the sum over keys.

    So a candidate need not be a key of all others, only to be masked.
    """
    weight_BRH1 = F.silu((q_BRHK * k_BRHK).sum(-1, keepdim=True)) / divisor
    return weight_BRH1 * v_BRHV
