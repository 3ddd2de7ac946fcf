"""Small models with random weights that open their stack, computed densely in float64.

They are the tiny model of `gr_core.testing.tiny` with layers: its requests, but other answers.

Shapes: B requests, L behaviours, T tokens, W ids of a token, C candidates, D model width, H heads,
F = H·V, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core import ExporterDescriptor, ModelDescriptor, Task
from gr_core.contracts import EncodedRequest
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.stack import Gate, LayerWeights, Stack, TokenSequence
from gr_core.testing.tiny import ARCHITECTURE, TinyModel, write_tiny_bundle
from gr_core.tokens import Norm, Readout, TokenTables
from gr_core.types import IntArray

ITEMS = 50
PLACES = 100


@dataclass(frozen=True)
class Shape:
    """What differs between these models."""

    gate: Gate = "u*norm(a)"
    projection_silu: Any = "all"
    head_norm: bool = False
    norms: bool = True
    biases: bool = True
    groups: int = 1
    columns: int = 1
    """W: the item, then what is left of it by 3."""
    places: bool = True
    positions: int = 0
    time_buckets: int = 0
    readout: Norm = "l2"
    sees_later: bool = False
    """Whether the first token of a history to rank by sees all of it."""
    d_model: int = 8
    d_qk: int = 3
    d_v: int = 5
    num_heads: int = 2
    num_layers: int = 2


class SmallModel(TinyModel):
    """What both kinds below share."""

    shape = Shape()
    does: Sequence[Task] = ()

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        shape = self.shape
        self.tasks = type(self).does
        self._generator = torch.Generator().manual_seed(0)
        width = shape.d_model
        self._tables = [self._random(ITEMS + 1, width), self._random(3, width)][: shape.columns]
        self._places = self._random(PLACES, width) if shape.places else None
        self._targets = self._random(ITEMS + 1, width)
        self._heads = self._random(width, 2)
        self._stack = Stack(
            d_model=width,
            num_heads=shape.num_heads,
            d_qk=shape.d_qk,
            d_v=shape.d_v,
            alpha=0.7,
            divisor=11.0,
            norm_eps=1e-5,
            projection_silu=shape.projection_silu,
            gate=shape.gate,
            head_norm=shape.head_norm,
            groups=shape.groups,
            layers=[self._layer() for _ in range(shape.num_layers)],
        )

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def _layer(self) -> LayerWeights:
        shape = self.shape
        keyed, gated = shape.num_heads * shape.d_qk, shape.num_heads * shape.d_v
        parts = 3 if "," in shape.gate else 1

        def norm(width: int) -> Tensor | None:
            return self._random(shape.groups, width) if shape.norms else None

        return LayerWeights(
            input_norm_weight=norm(shape.d_model),
            input_norm_bias=norm(shape.d_model),
            uvqk_weight=self._random(2 * (keyed + gated), shape.d_model),
            uvqk_bias=self._random(2 * (keyed + gated)) if shape.biases else None,
            attention_norm_weight=norm(gated),
            attention_norm_bias=norm(gated),
            output_weight=self._random(shape.d_model, parts * gated),
            output_bias=self._random(shape.d_model) if shape.biases else None,
            position_bias=self._random(2 * shape.positions - 1) if shape.positions else None,
            time_bias=self._random(shape.time_buckets) if shape.time_buckets else None,
        )

    def stack(self, task: Task) -> Stack:
        return self._stack

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        items_L = request.arrays["items"]
        n = len(items_L)
        candidates = len(request.arrays.get("candidates", ()))
        if Task.RETRIEVE in self.does:
            candidates = 0  # items are scored with what is read from the last token
        low = np.zeros(n + candidates, np.int32)
        high = np.concatenate([np.arange(n), np.full(candidates, n)]).astype(np.int32)
        if self.shape.sees_later and n:
            high[0] = n
        groups = np.arange(n + candidates) % self.shape.groups
        times = np.cumsum(np.concatenate([items_L % 7 * 500, np.full(candidates, 40)]))
        return TokenSequence(
            history=n,
            candidates=candidates,
            low=low,
            high=high,
            content=items_L.astype(np.int64).view(np.uint8).reshape(n, 8),
            salt=b"",
            reusable=n,
            groups=groups.astype(np.uint8) if self.shape.groups > 1 else None,
            times=times if self.shape.time_buckets else None,
            next_times=times + 60 if self.shape.time_buckets else None,
        )

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        assert set(starts) == {0}
        parts = [torch.empty(0, self.shape.d_model)]
        for request, sequence in zip(requests, sequences, strict=True):
            ids_LW = torch.from_numpy(self.token_ids(sequence).astype(np.int64))
            x_LD = torch.zeros(len(ids_LW), self.shape.d_model)
            for table, ids_L in zip(self._tables, ids_LW.T, strict=True):
                x_LD = x_LD + table[ids_L]
            if self._places is not None:
                x_LD = x_LD + self._places[: len(x_LD)]
            parts.append(x_LD)
            if sequence.candidates:
                parts.append(self._targets[torch.from_numpy(request.arrays["candidates"])])
        return torch.cat(parts)

    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        if task is Task.RETRIEVE:
            return list(self._user(rows))
        counts = [len(request.arrays["candidates"]) for request in requests]
        return list((rows @ self._heads).split(counts))

    def _user(self, rows_RD: Tensor) -> Tensor:
        if self.shape.readout == "l2":
            return rows_RD / rows_RD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        if self.shape.readout == "layer":
            return F.layer_norm(rows_RD, rows_RD.shape[-1:], eps=1e-6)
        return rows_RD

    def token_ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        items_L = sequence.content.reshape(-1).view(np.int64)
        return np.stack([items_L, items_L % 3], axis=1)[:, : self.shape.columns].astype(np.int32)

    def item_table(self) -> Tensor:
        return self._targets

    def module(self, task: Task) -> nn.Module:
        return Dense(self, task)


class Dense(nn.Module):
    """The model as its stack says, straight from the equations, one request at a time."""

    def __init__(self, model: SmallModel, task: Task) -> None:
        super().__init__()
        self._model, self._task = model, task

    def forward(
        self, items: Tensor, length: Tensor, candidates: Tensor | None = None
    ) -> Sequence[Tensor]:
        found = []
        for row in range(len(items)):
            arrays = {"items": items[row, : length[row]].numpy()}
            if candidates is not None:
                arrays["candidates"] = candidates[row].numpy()
            request = EncodedRequest(self._task, arrays, 1)
            sequence = self._model.sequence(request)
            x_TD = self._model.embed([request], [sequence], [0]).double()
            y_TD = dense(self._model.stack(self._task), x_TD, sequence).float()
            rows = y_TD[sequence.history :] if candidates is not None else y_TD[-1:]
            (answer,) = self._model.outputs(self._task, [request], rows)
            found.append(answer)
        return torch.stack(found)


def dense(stack: Stack, x_TD: Tensor, sequence: TokenSequence) -> Tensor:
    """The stack's output (T, D) in float64, from the equations of `gr_core.stack`."""
    tokens = len(x_TD)
    place_T = torch.arange(tokens)
    low_T, high_T = torch.from_numpy(sequence.low), torch.from_numpy(sequence.high)
    sees_TT = (place_T >= low_T[:, None]) & (place_T < high_T[:, None])
    sees_TT = sees_TT | torch.eye(tokens, dtype=torch.bool)
    groups_T = torch.zeros(tokens, dtype=torch.int64)
    if sequence.groups is not None:
        groups_T = torch.from_numpy(sequence.groups).long()
    keyed, gated = stack.num_heads * stack.d_qk, stack.num_heads * stack.d_v
    for layer in stack.layers:
        scale, shift = layer.input_norm_weight, layer.input_norm_bias
        normed_TD = _norm(stack, x_TD, scale, shift, groups_T, 1)
        uvqk = _linear(normed_TD, layer.uvqk_weight, layer.uvqk_bias)
        u_TF, v_TF, q_TF, k_TF = uvqk.split([gated, gated, keyed, keyed], dim=1)
        if stack.projection_silu == "all":
            u_TF, v_TF, q_TF, k_TF = map(F.silu, (u_TF, v_TF, q_TF, k_TF))
        elif stack.projection_silu == "u":
            u_TF = F.silu(u_TF)
        heads = []
        for h in range(stack.num_heads):
            of_k, of_v = (slice(h * n, (h + 1) * n) for n in (stack.d_qk, stack.d_v))
            score_TT = stack.alpha * q_TF[:, of_k] @ k_TF[:, of_k].T + _bias(layer, sequence)
            heads.append(sees_TT * F.silu(score_TT) / stack.divisor @ v_TF[:, of_v])
        a_TF = torch.cat(heads, dim=1)
        by = stack.num_heads if stack.head_norm else 1
        scale, shift = layer.attention_norm_weight, layer.attention_norm_bias
        normed_TF = _norm(stack, a_TF, scale, shift, groups_T, by)
        gates: dict[Gate, list[Tensor]] = {
            "u*norm(a)": [u_TF * normed_TF],
            "u,norm(a),u*norm(a)": [u_TF, normed_TF, u_TF * normed_TF],
            "u,a,u*norm(a)": [u_TF, a_TF, u_TF * normed_TF],
            "norm(a*u)": [_norm(stack, a_TF * u_TF, scale, shift, groups_T, by)],
        }
        gate = torch.cat(gates[stack.gate], dim=1)
        x_TD = x_TD + _linear(gate, layer.output_weight, layer.output_bias)
    return x_TD


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.double(), None if bias is None else bias.double())


def _norm(
    stack: Stack,
    x_TF: Tensor,
    scale_GF: Tensor | None,
    shift_GF: Tensor | None,
    groups_T: Tensor,
    parts: int,
) -> Tensor:
    split = x_TF.unflatten(1, (parts, -1))
    centred = split - split.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    normed = (centred / (variance + stack.norm_eps).sqrt()).flatten(1)
    if scale_GF is None or shift_GF is None:
        return normed
    return normed * scale_GF.double()[groups_T] + shift_GF.double()[groups_T]


def _bias(layer: LayerWeights, sequence: TokenSequence) -> Tensor | float:
    tokens = sequence.history + sequence.candidates
    bias: Tensor | float = 0.0
    if layer.position_bias is not None:
        place_T = torch.arange(tokens)
        middle = len(layer.position_bias) // 2
        bias = bias + layer.position_bias.double()[place_T - place_T[:, None] + middle]
    if layer.time_bias is not None:
        assert sequence.times is not None
        assert sequence.next_times is not None
        gap_TT = torch.from_numpy(sequence.next_times[:, None] - sequence.times)
        bucket_TT = (gap_TT.abs().clamp(min=1).float().log() / 0.301).long()
        bias = bias + layer.time_bias.double()[bucket_TT.clamp(max=len(layer.time_bias) - 1)]
    return bias


class Retrieves(SmallModel):
    """Implements `gr_core.tokens.TokenModel`."""

    does = (Task.RETRIEVE, Task.RANK)

    def token_tables(self) -> TokenTables:
        return TokenTables(tuple(self._tables), self._places)

    def readout(self) -> Readout:
        return Readout(self.item_table(), self.shape.readout, 1e-6)

    def answer_ids(self, request: EncodedRequest) -> IntArray:
        return request.arrays["candidates"]


class Ranks(SmallModel):
    """Implements `gr_core.stack.StackModel`; candidates are tokens."""

    does = (Task.RANK,)


def small(folder: Path, kind: type[SmallModel] = Retrieves, **shape: Any) -> SmallModel:
    """A model of the shape."""
    named = type(kind.__name__, (kind,), {"shape": Shape(**shape)})
    path = folder / "tiny" / "1"
    bundle = Bundle.open(path) if path.exists() else write_tiny_bundle(folder, items=ITEMS)
    model: SmallModel = named(bundle)
    return model


def registry(exporter: ExporterDescriptor) -> Registry:
    factory = f"{__name__}:Retrieves"
    descriptor = ModelDescriptor(
        name=ARCHITECTURE, factory=factory, tasks=Retrieves.does, formats=("torch",)
    )
    return Registry.of(descriptor, exporter)
