"""Generation of semantic ids on one dataset, ready to train, to measure and to bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from gr_core.generation import Tokens
from gr_hstu.config import SemanticIdConfig
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from gr_hstu.evaluation.retrieval import RetrievalScorer as Scorer
from gr_hstu.features import FeatureSchema
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.training import settings as defaults
from gr_hstu.training.batches import HistoryEncoder, catalogue_of
from gr_hstu.training.generation import GenerationObjective, GenerationScorer
from gr_hstu.training.loop import Options, Progress, fit
from gr_hstu.training.progress import Reporter
from gr_hstu.training.retrieval_task import counting_baselines

_DEPTH = 50
"""Items found for each test case besides those of its history."""


class GenerationTask:
    """A dataset with its split, its items' codes and settings."""

    def __init__(self, data: Interactions, settings: defaults.GenerationSettings) -> None:
        self.data, self.settings = data, settings
        self.codes_IL = item_codes(data)
        self.split = defaults.retrieval_split(data, defaults.retrieval_settings(data))
        self.catalogue = catalogue_of(data)
        self.schema = FeatureSchema(
            max_history=settings.max_history, truncate_step=settings.truncate_step
        )
        self.encoder = HistoryEncoder(data, self.schema, self.catalogue)

    def config(self) -> SemanticIdConfig:
        s = self.settings
        return SemanticIdConfig(
            num_items=len(self.catalogue),
            code_sizes=tuple((self.codes_IL.max(axis=0) + 1).tolist()),
            max_behaviours=s.max_history,
            d_model=s.d_model,
            num_layers=s.num_layers,
            num_heads=s.num_heads,
            d_qk=s.d_model // s.num_heads,
            d_v=s.d_model // s.num_heads,
            beam_width=s.beam_width,
            dropout=s.dropout,
            input_dropout=s.dropout,
            state_norm="l2" if s.normalised else "layer_norm",
            token_l2_norm=s.normalised,
            temperature=s.temperature if s.normalised else 1.0,
        )

    def new_model(self, seed: int) -> HSTUSemanticIds:
        """A fresh model, initialised from the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = HSTUSemanticIds(self.config())
        model.item_codes.copy_(torch.from_numpy(self.codes_IL))
        return model

    def objective(self) -> GenerationObjective:
        return GenerationObjective(
            self.data,
            self.split.train_N,
            self.encoder,
            self.split.validation,
            self.settings.batch_size,
        )

    def train(
        self,
        model: HSTUSemanticIds,
        options: Options,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> Progress:
        settings = {k: v for k, v in asdict(self.settings).items() if k != "co_occurrence"}
        identity = {"kind": "hstu-sid", "data": self.data.name, "settings": settings}
        return fit(model, self.objective(), options, folder, reporter, identity)

    def scorer(self, model: HSTUSemanticIds) -> GenerationScorer:
        return GenerationScorer(model, self.encoder, _DEPTH)

    def test(self, scorer: Scorer) -> RetrievalResult:
        return evaluate_retrieval(scorer, self.data, self.split.test)

    def baselines(self) -> dict[str, Callable[[], Scorer]]:
        return counting_baselines(self.data, self.split, self.settings.co_occurrence)


def item_codes(data: Interactions) -> Tokens:
    """Codes of the items, (items + 1, L) int32, row 0 zeros, from the columns code_1, code_2, …

    Raises ValueError where they are missing or no counts from 0.
    """
    columns: list[np.ndarray] = []
    while (name := f"code_{len(columns) + 1}") in data.items.features:
        columns.append(data.items.features[name])
    if not columns:
        raise ValueError(
            f"{data.name}: the items have no codes; generation reads them from the columns code_1, "
            "code_2, … of items.csv, counted from 0"
        )
    codes_IL = np.zeros((len(data.items) + 1, len(columns)), np.int32)
    for level, column in enumerate(columns):
        right = column.dtype.kind == "f"
        if right:
            right = bool(
                np.isfinite(column).all() and (column >= 0).all() and (column < 2**16).all()
            )
        if not right or (column % 1).any():
            raise ValueError(
                f"{data.name}: code_{level + 1} of the items must be a count from 0 for each, at "
                f"most {2**16 - 1}"
            )
        codes_IL[1:, level] = column
    return codes_IL
