"""HSTU over semantic ids as a model of the platform: bundle in, tokens in, codes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gr_core.contracts import ArraySpec, EncodedRequest, Encoding, InferenceResult, PrefixStability
from gr_core.errors import BundleError, PlanError
from gr_core.generation import Tokens
from gr_core.repository import Bundle, Catalogue
from gr_core.stack import Stack, TokenSequence
from gr_core.tokens import Readout, TokenTables
from gr_core.types import FloatArray, IntArray, RecommendRequest, Task
from gr_hstu.config import SemanticIdConfig
from gr_hstu.features import FeatureSchema
from gr_hstu.jagged import JaggedRetrieval, stack_of, without_layers
from gr_hstu.loading import check_catalogue, load_weights, read_config
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.modules.skeleton import skeleton
from gr_hstu.stability import prefix_stability

_TOKENS = "history_tokens"
_INPUTS = (
    ArraySpec(_TOKENS, "int64", ("token",)),
    ArraySpec("history_lengths", "int64"),
)


def load_semantic_ids(bundle: Bundle) -> SemanticIdModel:
    """The factory of the architecture ``hstu-sid``."""
    return SemanticIdModel(bundle, read_config(bundle, SemanticIdConfig.from_dict))


class SemanticIdModel:
    """Implements `gr_core.generation.GenerativeModel` and `gr_core.stack.PlacedStackModel` for a
    bundle.

    The module of `Task.GENERATE` takes, besides the inputs, ``prefixes`` (batch, level), and
    returns log-probabilities, see `HSTUSemanticIds.forward`.
    """

    heads: Sequence[str] = ()

    def __init__(self, bundle: Bundle, config: SemanticIdConfig) -> None:
        self._bundle = bundle
        self._config = config
        self._schema = FeatureSchema.from_dict(bundle.features)
        self._catalogue = bundle.catalogue()
        _check(bundle, config, self._schema, self._catalogue)
        with skeleton():
            module = HSTUSemanticIds(config)
        self.notes = load_weights(bundle, module)
        self._module = module.eval().requires_grad_(False)
        _check_codes(bundle, config, module.item_codes.numpy())
        self._item_tokens = module.item_tokens()
        self._jagged = JaggedRetrieval(module.decoder, _TOKENS)
        self._stack = stack_of(module.decoder)
        self._stability = prefix_stability(config.decoder())

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
    def prefix_stability(self) -> PrefixStability:
        return self._stability

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        return _INPUTS

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        history, indices, unknown_items = self._schema.history(request.history, self._catalogue)
        tokens_N = np.empty(1 + self._item_tokens.shape[1] * len(history), np.int64)
        tokens_N[0] = self._config.first_token
        tokens_N[1:] = self._item_tokens[indices].reshape(-1)
        return Encoding(
            request=EncodedRequest(
                task=task,
                arrays={
                    _TOKENS: tokens_N,
                    "history_lengths": np.array(len(tokens_N), np.int64),
                },
                tokens=len(tokens_N),
                user_id=request.user_id,
            ),
            candidate_indices=np.empty(0, np.int64),
            unscored=np.empty(0, np.bool_),
            unknown_items=unknown_items,
        )

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        return result.scores, np.empty((len(result.scores), 0), np.float32)

    def module(self, task: Task) -> nn.Module:
        return self._module

    def item_table(self) -> Tensor:
        raise PlanError(f"{self._bundle.name}: it generates items code by code; none has a vector")

    def item_tokens(self) -> Tokens:
        return self._item_tokens

    @property
    def levels(self) -> Sequence[range]:
        return self._config.levels

    @property
    def beam_width(self) -> int:
        return self._config.beam_width

    def stack(self, task: Task) -> Stack:
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

    def ends(self, device: str) -> JaggedRetrieval:
        return JaggedRetrieval(without_layers(self._module.decoder, device), _TOKENS)

    def token_tables(self) -> TokenTables:
        return self._jagged.tables()

    @torch.no_grad()
    def readout(self) -> Readout:
        readout = self._jagged.readout()
        return replace(readout, table=readout.table / self._config.temperature)

    def token_ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        return self._jagged.ids(sequence)

    def answer_ids(self, request: EncodedRequest) -> IntArray:
        raise PlanError(f"{self._bundle.name}: it generates items code by code, and ranks none")

    def close(self) -> None:
        """Nothing to free but memory."""


def _check(
    bundle: Bundle, config: SemanticIdConfig, schema: FeatureSchema, catalogue: Catalogue
) -> None:
    """The configuration, the features and the catalogue must agree."""
    if unsupported := [task for task in bundle.tasks if task is not Task.GENERATE]:
        raise BundleError(
            f"{bundle.path}: tasks: {bundle.architecture} cannot {unsupported[0]}; expected of "
            f"{Task.GENERATE}"
        )
    check_catalogue(bundle, catalogue, config.num_items)
    if schema.max_history > config.max_behaviours:
        raise BundleError(
            f"{bundle.path}: features.max_history is {schema.max_history}, more than "
            f"config.max_behaviours, {config.max_behaviours}"
        )
    for group in ("signals", "user", "context", "candidate"):
        if found := getattr(schema, group):
            raise BundleError(
                f"{bundle.path}: features.{group} has {found[0].name!r}, but "
                f"{bundle.architecture} reads only the items of a history; remove it"
            )


def _check_codes(bundle: Bundle, config: SemanticIdConfig, codes: Tokens) -> None:
    wrong = (codes < 0) | (codes >= np.array(config.code_sizes))
    for item, level in np.argwhere(wrong[1:])[:1].tolist():
        raise BundleError(
            f"{bundle.weights_path}: item_codes: item {item + 1} has the code "
            f"{codes[item + 1, level]} at level {level}, config.code_sizes allows 0 to "
            f"{config.code_sizes[level] - 1}"
        )
