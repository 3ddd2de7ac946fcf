"""HSTU and MTGR as models of the platform: bundle in, arrays in, scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gr_core.contracts import ArraySpec, EncodedRequest, Encoding, InferenceResult, PrefixStability
from gr_core.errors import BundleError, PlanError
from gr_core.repository import Bundle, Catalogue
from gr_core.stack import Stack, TokenSequence
from gr_core.steps import Step
from gr_core.tokens import Readout, TokenTables
from gr_core.types import FloatArray, IntArray, RecommendRequest, Task
from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.features import FeatureSchema
from gr_hstu.jagged import Jagged, JaggedRetrieval, jagged, stack_of, without_layers
from gr_hstu.loading import check_catalogue, load_weights, read_config
from gr_hstu.models import MTGR, HSTURetrieval, build_model
from gr_hstu.modules.skeleton import skeleton
from gr_hstu.stability import prefix_stability
from gr_hstu.steps import steps_of

_HISTORY = ("history_items", "history_timestamps", "history_lengths", "request_time")
_RANKING = (
    *_HISTORY,
    "history_signals",
    "user_features",
    "context_features",
    "candidate_items",
    "candidate_features",
    "candidate_counts",
)
_RETRIEVAL_HEADS = ("recommendation",)


def load_hstu(bundle: Bundle) -> HSTUModel:
    """The factory of the architecture ``hstu``: retrieval or ranking by the configured variant."""
    return HSTUModel(bundle, read_config(bundle, HSTUConfig.from_dict))


def load_mtgr(bundle: Bundle) -> HSTUModel:
    """The factory of the architecture ``mtgr``."""
    return HSTUModel(bundle, read_config(bundle, MTGRConfig.from_dict))


class RetrievalRanker(nn.Module):
    """Ranks candidates with a retrieval model: dot products as the only head, (B, C, 1)."""

    def __init__(self, model: HSTURetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor,
        candidate_items: Tensor,
    ) -> Tensor:
        user_BD = self.model(
            history_items, history_timestamps, history_lengths, request_time, history_signals
        )
        return self.model.score(user_BD, candidate_items)[..., None]


class HSTUModel:
    """Implements `gr_core.steps.SteppedModel`, `gr_core.tokens.TokenModel` and
    `gr_core.stack.PlacedStackModel` for a bundle."""

    def __init__(self, bundle: Bundle, config: HSTUConfig | MTGRConfig) -> None:
        self._bundle = bundle
        self._config = config
        self._schema = FeatureSchema.from_dict(bundle.features)
        self._catalogue = bundle.catalogue()
        _check(bundle, config, self._schema, self._catalogue)
        try:
            with skeleton():
                module = build_model(config)
        except ValueError as error:
            raise BundleError(f"{bundle.path}/config.json: config: {error}") from None
        self.notes = load_weights(bundle, module)
        self._module = module.eval().requires_grad_(False)
        self._jagged = jagged(module)
        self._steps = steps_of(module)
        self._stack: Stack | None = None
        self._retrieves = isinstance(module, HSTURetrieval)
        supported = (Task.RETRIEVE, Task.RANK) if self._retrieves else (Task.RANK,)
        if unsupported := [t for t in bundle.tasks if t not in supported]:
            raise BundleError(
                f"{bundle.path}: tasks: {bundle.architecture} of this configuration cannot "
                f"{unsupported[0]}; expected of {', '.join(supported)}"
            )
        self._inputs = {task: self._specs(task) for task in bundle.tasks}
        self._stability = prefix_stability(config)
        self._prefix_tokens = 0 if self._retrieves else config.num_prefix_tokens
        if unknown := [head for head in bundle.head_weights if head not in self.heads]:
            raise BundleError(
                f"{bundle.path}/config.json: head_weights: {unknown[0]!r} is no head of the model; "
                f"there are: {', '.join(self.heads)}"
            )
        weights = dict(bundle.head_weights) or dict.fromkeys(self.heads, 1.0 / len(self.heads))
        self._weights = np.array([weights.get(head, 0.0) for head in self.heads], np.float32)

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def catalogue(self) -> Catalogue:
        return self._catalogue

    @property
    def tasks(self) -> Sequence[Task]:
        return self._bundle.tasks

    @property
    def heads(self) -> Sequence[str]:
        return _RETRIEVAL_HEADS if self._retrieves else self._config.heads

    @property
    def schema(self) -> FeatureSchema:
        return self._schema

    @property
    def prefix_stability(self) -> PrefixStability:
        return self._stability

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        return self._inputs[task]

    def _specs(self, task: Task) -> tuple[ArraySpec, ...]:
        schema = self._schema
        every = {
            "history_items": ("history",),
            "history_timestamps": ("history",),
            "history_lengths": (),
            "request_time": (),
            "history_signals": ("history", len(schema.signals)),
            "user_features": (len(schema.user),),
            "context_features": (len(schema.context),),
            "candidate_items": ("candidate",),
            "candidate_features": ("candidate", len(schema.candidate)),
            "candidate_counts": (),
            "realtime_counts": (),
        }
        names: tuple[str, ...] = (*_HISTORY, "history_signals")
        if self._retrieves and task is Task.RANK:
            names = (*names, "candidate_items")
        elif not self._retrieves:
            names = _RANKING
        if isinstance(self._module, MTGR):
            names = (*names, "realtime_counts")
        return tuple(ArraySpec(name, "int64", every[name]) for name in names)

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        schema, catalogue = self._schema, self._catalogue
        assert request.request_time_ms is not None
        history, indices, unknown_items = schema.history(request.history, catalogue)
        arrays = schema.history_arrays(history, indices, request.request_time_ms)
        tokens = self._prefix_tokens + len(history)
        candidates = np.empty(0, np.int64)
        unscored = np.empty(0, bool)
        if task is Task.RANK:
            assert request.candidates is not None
            found = catalogue.indices_of(request.candidates.item_ids)
            known = found > 0
            candidates, unscored = found[known], ~known
            arrays |= schema.candidate_arrays(request.candidates, known, candidates)
            tokens += len(candidates)
        if not self._retrieves:
            arrays["user_features"] = schema.user_array(request.user_features)
            arrays["context_features"] = schema.context_array(request.context_features)
        return Encoding(
            request=EncodedRequest(
                task=task,
                arrays={spec.name: arrays[spec.name] for spec in self._inputs[task]},
                tokens=tokens,
                user_id=request.user_id,
            ),
            candidate_indices=candidates,
            unscored=unscored,
            unknown_items=unknown_items,
        )

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        if task is Task.RETRIEVE:
            return result.scores, np.empty((len(result.scores), 0), np.float32)
        scores = result.scores
        if not self._retrieves:
            scores = (0.5 * (1.0 + np.tanh(0.5 * scores))).astype(np.float32)
        weights = self._weights
        if head_weights:
            weights = np.array([head_weights.get(head, 0.0) for head in self.heads], np.float32)
        return scores @ weights, scores

    def module(self, task: Task) -> nn.Module:
        if isinstance(self._module, HSTURetrieval):
            return self._module if task is Task.RETRIEVE else RetrievalRanker(self._module).eval()
        return self._module

    def stack(self, task: Task) -> Stack:
        """The same for all tasks, which therefore share K and V."""
        if self._stack is None:
            try:
                self._stack = stack_of(self._module)
            except PlanError as error:
                raise PlanError(f"{self._bundle.name}: {error}") from None
        return self._stack

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        return self._jagged.sequence(request)

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        return self._jagged.embed(requests, sequences, starts)

    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        return self._jagged.outputs(task, requests, rows)

    def ends(self, device: str) -> Jagged:
        return jagged(without_layers(self._module, device))

    def token_tables(self) -> TokenTables:
        return self._summed_tokens().tables()

    def readout(self) -> Readout:
        return self._summed_tokens().readout()

    def token_ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        return self._summed_tokens().ids(sequence)

    def answer_ids(self, request: EncodedRequest) -> IntArray:
        return self._summed_tokens().answer_ids(request)

    def _summed_tokens(self) -> JaggedRetrieval:
        if not isinstance(self._jagged, JaggedRetrieval):
            raise PlanError(
                f"{self._bundle.name}: its tokens are more than sums of embeddings; only models "
                "for retrieval open both ends of their stack"
            )
        return self._jagged

    def prefill_step(self, task: Task) -> Step:
        self.stack(task)
        return self._steps.prefill(task)

    def decode_step(self, task: Task) -> Step:
        self.stack(task)
        return self._steps.decode(task)

    def step_arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        return self._steps.arrays(request, sequence, start)

    def item_table(self) -> Tensor:
        assert isinstance(self._module, HSTURetrieval)
        with torch.no_grad():
            return self._module.item_embeddings().detach().clone()

    def close(self) -> None:
        """Nothing to free but memory."""


def _check(
    bundle: Bundle, config: HSTUConfig | MTGRConfig, schema: FeatureSchema, catalogue: Catalogue
) -> None:
    """The configuration, the feature schema and the catalogue must agree."""
    check_catalogue(bundle, catalogue, config.num_items)
    if schema.max_history > config.max_seq_len:
        raise BundleError(
            f"{bundle.path}: features.max_history is {schema.max_history}, more than "
            f"config.max_seq_len, {config.max_seq_len}"
        )
    for field, features in (
        ("signal_cardinalities", schema.signals),
        ("user_cardinalities", schema.user),
        ("context_cardinalities", schema.context),
        ("candidate_cardinalities", schema.candidate),
    ):
        expected = tuple(feature.cardinality for feature in features)
        if getattr(config, field) != expected:
            raise BundleError(
                f"{bundle.path}: config.{field} is {getattr(config, field)}, "
                f"the features need {expected}"
            )
