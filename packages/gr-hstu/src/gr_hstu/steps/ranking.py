"""`HSTURanking` in steps.

Shapes: B batch, W ids of a token, T tokens given, C candidates, G feature columns, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core.contracts import ArraySpec, EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.steps import CANDIDATE, PAST_LENGTHS, SCORES, TOKEN, Step
from gr_core.types import Task
from gr_hstu.jagged.rows import elapsed_at_request
from gr_hstu.models import HSTURanking
from gr_hstu.steps import tokens
from gr_hstu.steps.layers import Layers
from gr_hstu.steps.tokens import Past


class RankingSteps:
    """Ids of a token are those of `gr_hstu.jagged.ranking`."""

    def __init__(self, module: HSTURanking) -> None:
        config = module.config
        self._module = module
        self._timed = bool(config.time_buckets)
        self._from_end = bool(config.position_buckets) and config.position_from == "end"
        self._width = 1 + len(module.signals) + self._timed + self._from_end
        self._bucket = self._timed and config.time_from == "previous"
        self._first_rows = tokens.first_rows(tokens.tables_of(module))
        self._crosses = len(module.crosses)
        self._contexts = len(module.contexts) if config.context_placement == "candidate" else 0
        self._kv = (config.num_layers, config.num_heads, config.d_qk, config.d_v)

    def prefill(self, task: Task) -> Step:
        assert task is Task.RANK
        inputs = (self._ids(), *tokens.interval_specs(self._kv[0]))
        return Step(_Prefill(self._module).eval(), inputs, tokens.kv_specs(*self._kv))

    def decode(self, task: Task) -> Step:
        assert task is Task.RANK
        inputs = [
            *tokens.past_specs(*self._kv),
            self._ids(),
            *tokens.interval_specs(self._kv[0]),
            tokens.jagged(tokens.CANDIDATE_ITEMS, "int64", CANDIDATE),
            *tokens.candidate_interval_specs(),
        ]
        if self._crosses:
            inputs.append(
                tokens.jagged(tokens.CANDIDATE_FEATURES, "int64", CANDIDATE, self._crosses)
            )
        if self._contexts:
            inputs.append(ArraySpec(tokens.CONTEXT_FEATURES, "int64", (self._contexts,)))
        if self._bucket:
            inputs.append(ArraySpec(tokens.CANDIDATE_BUCKET, "int32"))
        scores = ArraySpec(SCORES, "float32", (CANDIDATE, len(self._module.config.heads)))
        outputs = (scores, *tokens.kv_specs(*self._kv))
        return Step(_Decode(self._module).eval(), tuple(inputs), outputs)

    def _ids(self) -> ArraySpec:
        return tokens.jagged(tokens.IDS, "int32", TOKEN, self._width)

    def arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        given, n = request.arrays, sequence.history
        arrays: dict[str, npt.NDArray[Any]] = {
            PAST_LENGTHS: np.array(start, np.int32),
            tokens.IDS: tokens.step_ids(sequence, start, self._width, self._first_rows),
            tokens.LOW: sequence.low[start:n],
            tokens.HIGH: sequence.high[start:n],
            tokens.CANDIDATE_ITEMS: given["candidate_items"],
            tokens.CANDIDATE_LOW: sequence.low[n:],
            tokens.CANDIDATE_HIGH: sequence.high[n:],
        }
        if self._crosses:
            arrays[tokens.CANDIDATE_FEATURES] = given["candidate_features"]
        if self._contexts:
            arrays[tokens.CONTEXT_FEATURES] = given["context_features"]
        if self._bucket:
            bucket = self._module.position_time.buckets(elapsed_at_request([request]))
            assert bucket is not None
            arrays[tokens.CANDIDATE_BUCKET] = bucket[0].numpy().astype(np.int32)
        return arrays


class _History(nn.Module):
    """The input of the history's tokens."""

    features: Tensor

    def __init__(self, model: HSTURanking) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.prefix = config.num_prefix_tokens
        self.signals = len(model.signals)
        self.timed = bool(config.time_buckets)
        self.from_end = bool(config.position_buckets) and config.position_from == "end"
        tables = tokens.tables_of(model)
        if tables:
            self.register_buffer("features", torch.cat(tables))

    def forward(self, ids_BTW: Tensor, place_BT: Tensor) -> Tensor:
        model, timed_at = self.model, 1 + self.signals
        first_BT = items_BT = tokens.first_ids(ids_BTW, model.item_side)
        is_feature_BT = place_BT < self.prefix
        if self.prefix:
            items_BT = torch.where(is_feature_BT, 0, first_BT)
        x_BTD = model.behaviours(model.item_content(items_BT), ids_BTW[..., 1:timed_at])
        if self.prefix:
            features_BTD = F.embedding(torch.where(is_feature_BT, first_BT, 0), self.features)
            x_BTD = torch.where(is_feature_BT[..., None], features_BTD, x_BTD)
        if self.from_end:
            position_BT = ids_BTW[..., -1]
        else:
            # Row `prefix` of the position table is the candidates'.
            position_BT = torch.where(is_feature_BT, place_BT, place_BT + 1)
        return model.placed(x_BTD, position_BT, ids_BTW[..., timed_at] if self.timed else None)


def _layers(model: HSTURanking, *, answers: bool) -> Layers:
    config = model.config
    return Layers(model.stack, alpha=config.scale, divisor=config.divisor, answers=answers)


class _Prefill(nn.Module):
    def __init__(self, model: HSTURanking) -> None:
        super().__init__()
        self.history = _History(model)
        self.layers = _layers(model, answers=False)

    def forward(
        self, ids: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        place_1T = tokens.token_places(ids, None)
        sight_BTS = tokens.prefill_sight(place_1T, low, high, self.layers.divisor)
        _, keys, values = self.layers(self.history(ids, place_1T), sight_BTS)
        return keys, values


class _Decode(nn.Module):
    def __init__(self, model: HSTURanking) -> None:
        super().__init__()
        self.model = model
        self.history = _History(model)
        self.layers = _layers(model, answers=True)
        self.timed = bool(model.config.time_buckets)

    def forward(
        self,
        past_keys: Tensor,
        past_values: Tensor,
        past_lengths: Tensor,
        ids: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
        *,
        candidate_items: Tensor,
        candidate_low: Tensor,
        candidate_high: Tensor,
        candidate_features: Tensor | None = None,
        context_features: Tensor | None = None,
        candidate_bucket: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        model = self.model
        past = Past(past_keys, past_values, past_lengths)
        place_BT = tokens.token_places(ids, past)
        item_BCD = model.candidates(model.item_content(candidate_items), candidate_features)
        x_BCD = self._targets(item_BCD, context_features, candidate_bucket)
        sights = tokens.candidate_sights(
            place_BT, low, high, candidate_low, candidate_high, past, self.layers.divisor
        )
        x_BCD, keys, values = self.layers.with_candidates(
            self.history(ids, place_BT), x_BCD, *sights, past
        )
        return model.logits(x_BCD, model.item_mlp(item_BCD)), keys, values

    def _targets(
        self, item_BCD: Tensor, context_BG: Tensor | None, bucket_B: Tensor | None
    ) -> Tensor:
        model = self.model
        context_B1G = None if context_BG is None else context_BG[:, None]
        position = torch.full(
            (1, 1), model.config.num_prefix_tokens, dtype=torch.int32, device=item_BCD.device
        )
        bucket = None
        if self.timed:
            # Until the request no time passes, if that is what is counted.
            bucket = torch.zeros_like(position) if bucket_B is None else bucket_B[:, None]
        return model.placed(model.targets(item_BCD, context_B1G), position, bucket)
