"""`MTGR` in steps.

Shapes: B batch, W ids of a token, T tokens given, C candidates, R = T + C rows, G feature columns,
D model width.
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
from gr_hstu.models import MTGR
from gr_hstu.modules import masks
from gr_hstu.steps import tokens
from gr_hstu.steps.layers import Layers
from gr_hstu.steps.tokens import Past

GROUPS = "groups"


class MTGRSteps:
    """Ids of a token are those of `gr_hstu.jagged.mtgr` but for the tie, which intervals tell."""

    def __init__(self, module: MTGR) -> None:
        config = module.config
        self._module = module
        self._timed = bool(config.time_buckets)
        self._width = 1 + len(module.signals) + self._timed
        self._first_rows = tokens.first_rows(tokens.tables_of(module))
        self._crosses = len(module.crosses)
        self._contexts = len(module.contexts) if config.context_placement == "candidate" else 0
        self._kv = (config.num_layers, config.num_heads, config.qk_dim, config.v_dim)

    def prefill(self, task: Task) -> Step:
        assert task is Task.RANK
        inputs = (*self._tokens(), *tokens.interval_specs(self._kv[0]))
        return Step(_Prefill(self._module).eval(), inputs, tokens.kv_specs(*self._kv))

    def decode(self, task: Task) -> Step:
        assert task is Task.RANK
        inputs = [
            *tokens.past_specs(*self._kv),
            *self._tokens(),
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
        if self._timed:
            inputs.append(ArraySpec(tokens.CANDIDATE_BUCKET, "int32"))
        scores = ArraySpec(SCORES, "float32", (CANDIDATE, len(self._module.config.heads)))
        outputs = (scores, *tokens.kv_specs(*self._kv))
        return Step(_Decode(self._module).eval(), tuple(inputs), outputs)

    def _tokens(self) -> tuple[ArraySpec, ...]:
        return (
            tokens.jagged(tokens.IDS, "int32", TOKEN, self._width),
            tokens.jagged(GROUPS, "int32", TOKEN),
        )

    def arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        assert sequence.groups is not None
        given, n = request.arrays, sequence.history
        arrays: dict[str, npt.NDArray[Any]] = {
            PAST_LENGTHS: np.array(start, np.int32),
            tokens.IDS: tokens.step_ids(sequence, start, self._width, self._first_rows),
            GROUPS: sequence.groups[start:n].astype(np.int32),
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
        if self._timed:
            bucket = self._module.position_time.buckets(elapsed_at_request([request]))
            assert bucket is not None
            arrays[tokens.CANDIDATE_BUCKET] = bucket[0].numpy().astype(np.int32)
        return arrays


class _History(nn.Module):
    """The input of the tokens of U, S and R."""

    users: Tensor

    def __init__(self, model: MTGR) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.prefix = config.num_prefix_tokens
        self.signals = len(model.signals)
        self.timed = bool(config.time_buckets)
        tables = tokens.tables_of(model)
        if tables:
            # A token of U is one of few: all of them are projected here.
            with torch.no_grad():
                users = [p(t) for p, t in zip(model.user_projections, tables, strict=True)]
            self.register_buffer("users", torch.cat(users))

    def forward(self, ids_BTW: Tensor, place_BT: Tensor) -> Tensor:
        model, timed_at = self.model, 1 + self.signals
        first_BT = items_BT = tokens.first_ids(ids_BTW, model.item_side)
        is_user_BT = place_BT < self.prefix
        if self.prefix:
            items_BT = torch.where(is_user_BT, 0, first_BT)
        content = model.behaviours(model.item_content(items_BT), ids_BTW[..., 1:timed_at])
        # Position 0 is the candidates', those of behaviours count from 1, after U.
        position_BT = (place_BT + (1 - self.prefix)).clamp(min=0)
        bucket_BT = ids_BTW[..., timed_at] if self.timed else None
        x_BTD: Tensor = model.position_time(model.behaviour_mlp(content), position_BT, bucket_BT)
        if self.prefix:
            users_BTD = F.embedding(torch.where(is_user_BT, first_BT, 0), self.users)
            x_BTD = torch.where(is_user_BT[..., None], users_BTD, x_BTD)
        return x_BTD


def _layers(model: MTGR, *, answers: bool) -> Layers:
    divisor = model.config.max_seq_len
    return Layers(model.stack, alpha=1.0, divisor=divisor, answers=answers)


class _Prefill(nn.Module):
    def __init__(self, model: MTGR) -> None:
        super().__init__()
        self.history = _History(model)
        self.layers = _layers(model, answers=False)

    def forward(
        self, ids: Tensor, groups: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        place_1T = tokens.token_places(ids, None)
        sight_BTS = tokens.prefill_sight(place_1T, low, high, self.layers.divisor)
        _, keys, values = self.layers(self.history(ids, place_1T), sight_BTS, group_BR=groups)
        return keys, values


class _Decode(nn.Module):
    def __init__(self, model: MTGR) -> None:
        super().__init__()
        self.model = model
        self.history = _History(model)
        self.layers = _layers(model, answers=True)

    def forward(
        self,
        past_keys: Tensor,
        past_values: Tensor,
        past_lengths: Tensor,
        ids: Tensor,
        groups: Tensor,
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
        sights = tokens.candidate_sights(
            place_BT, low, high, candidate_low, candidate_high, past, self.layers.divisor
        )
        x_BCD = self._candidates(
            candidate_items, candidate_features, context_features, candidate_bucket
        )
        group_BC = torch.full_like(candidate_low, masks.CANDIDATE)
        group_BR = torch.cat([groups, group_BC], dim=1)
        x_BCD, keys, values = self.layers.with_candidates(
            self.history(ids, place_BT), x_BCD, *sights, past, group_BR
        )
        return model.heads(x_BCD), keys, values

    def _candidates(
        self,
        items_BC: Tensor,
        crosses_BCG: Tensor | None,
        context_BG: Tensor | None,
        bucket_B: Tensor | None,
    ) -> Tensor:
        model = self.model
        context_B1G = None if context_BG is None else context_BG[:, None]
        content = model.candidates(model.item_content(items_BC), crosses_BCG, context_B1G)
        position_11 = torch.zeros((1, 1), dtype=torch.int32, device=items_BC.device)
        bucket_B1 = None if bucket_B is None else bucket_B[:, None]
        encoded_BCD: Tensor = model.position_time(
            model.candidate_mlp(content), position_11, bucket_B1
        )
        return encoded_BCD
