"""HSTU layers in plain PyTorch over jagged tokens: the fastest that needs no kernel of one's own.

Projections take all tokens at once, attention one user after the other, without padding. The
history is a triangle of all its pairs; candidates see all of it, which needs no mask, and each
itself, which is a product of rows. Of the last layer, what nobody reads can be left out.

Shapes: T tokens of all users, R rows of them that are computed, C candidates of one user, N its
history, D model width, F = D, H heads, K columns per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gr_core.stack import Stack
from gr_kernels.benchmark.dense import DenseLayer, DenseStack


@dataclass(frozen=True, slots=True)
class User:
    """Where one user's tokens are: the history, then the candidates."""

    start: int
    history: int
    candidates: int

    @staticmethod
    def all_of(histories: Sequence[int], candidates: int) -> list[User]:
        users, start = [], 0
        for history in histories:
            users.append(User(start, history, candidates))
            start += history + candidates
        return users


class PlainStack:
    """All layers, nothing cached, in one dtype: weights, residual and all."""

    def __init__(self, stack: Stack, dtype: torch.dtype, device: str) -> None:
        model = DenseStack(stack).to(device, dtype).eval().requires_grad_(False)
        self._layers = [layer for layer in model.layers if isinstance(layer, DenseLayer)]
        self.dtype = dtype

    def __call__(self, x_TD: Tensor, users: Sequence[User], all_rows: bool = True) -> Tensor:
        """``x`` with all layers applied; else the candidates' rows alone, user after user."""
        for layer in self._layers[:-1]:
            x_TD = _layer(layer, x_TD, users)
        last = self._layers[-1]
        return _layer(last, x_TD, users) if all_rows else _candidates(last, x_TD, users)


def _layer(layer: DenseLayer, x_TD: Tensor, users: Sequence[User]) -> Tensor:
    u_TF, v_TF, q_TF, k_TF = layer.uvqk(layer.input_norm(x_TD)).chunk(4, dim=-1)
    q_THK, k_THK, v_THK = (_heads(layer, x) for x in (q_TF * layer.alpha, k_TF, v_TF))
    a_THK = torch.empty_like(v_THK)
    for user in users:
        history = slice(user.start, user.start + user.history)
        rows = slice(history.stop, history.stop + user.candidates)
        k_HNK, v_HNK = (x[history].transpose(0, 1).contiguous() for x in (k_THK, v_THK))
        q_HNK = q_THK[history].transpose(0, 1)
        score_HNN = F.silu(q_HNK @ k_HNK.transpose(1, 2), inplace=True).tril_()
        a_THK[history] = (score_HNN @ v_HNK).transpose(0, 1)
        del score_HNN
        a_THK[rows] = _of_candidates(q_THK[rows], k_THK[rows], v_THK[rows], k_HNK, v_HNK)
    return _output(layer, x_TD, F.silu(u_TF), a_THK)


def _candidates(layer: DenseLayer, x_TD: Tensor, users: Sequence[User]) -> Tensor:
    """A layer's rows of candidates; of the history only K and V are computed."""
    normed_TD = layer.input_norm(x_TD)
    weight_U, weight_V, weight_Q, weight_K = layer.uvqk.weight.chunk(4)
    bias_U, bias_V, bias_Q, bias_K = layer.uvqk.bias.chunk(4)
    k_THK = _heads(layer, F.linear(normed_TD, weight_K, bias_K))
    v_THK = _heads(layer, F.linear(normed_TD, weight_V, bias_V))
    rows_R = candidate_rows(users, x_TD.device)
    normed_RD = normed_TD.index_select(0, rows_R)
    q_RHK = _heads(layer, F.linear(normed_RD, weight_Q, bias_Q) * layer.alpha)
    u_RF = F.silu(F.linear(normed_RD, weight_U, bias_U))
    parts, row = [], 0
    for user in users:
        history = slice(user.start, user.start + user.history)
        rows = slice(history.stop, history.stop + user.candidates)
        k_HNK, v_HNK = (x[history].transpose(0, 1) for x in (k_THK, v_THK))
        q_CHK = q_RHK[row : row + user.candidates]
        parts.append(_of_candidates(q_CHK, k_THK[rows], v_THK[rows], k_HNK, v_HNK))
        row += user.candidates
    return _output(layer, x_TD.index_select(0, rows_R), u_RF, torch.cat(parts))


def candidate_rows(users: Sequence[User], device: torch.device) -> Tensor:
    """Which of T rows are candidates', user after user: (R,)."""
    parts = [
        torch.arange(user.start + user.history, user.start + user.history + user.candidates)
        for user in users
    ]
    return torch.cat(parts).to(device)


def _of_candidates(
    q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, k_HNK: Tensor, v_HNK: Tensor
) -> Tensor:
    score_HCN = F.silu(q_CHK.transpose(0, 1) @ k_HNK.transpose(1, 2), inplace=True)
    own_CH1 = F.silu((q_CHK * k_CHK).sum(dim=2, keepdim=True))
    return (score_HCN @ v_HNK).transpose(0, 1) + own_CH1 * v_CHK


def _heads(layer: DenseLayer, x_TF: Tensor) -> Tensor:
    return torch.unflatten(x_TF, 1, (layer.heads, -1))


def _output(layer: DenseLayer, x_RD: Tensor, u_RF: Tensor, a_RHK: Tensor) -> Tensor:
    a_RF = a_RHK.flatten(1) * layer.scale
    gated_RY = torch.cat([u_RF, a_RF, u_RF * layer.attention_norm(a_RF)], dim=1)
    found: Tensor = x_RD + layer.output(gated_RY)
    return found
