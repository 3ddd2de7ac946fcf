"""Retrieval on one dataset, ready to train, to measure and to bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gr_hstu.config import HSTUConfig
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.baselines import CoOccurrence, Popularity
from gr_hstu.evaluation.protocols import Split
from gr_hstu.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from gr_hstu.evaluation.retrieval import RetrievalScorer as Scorer
from gr_hstu.features import FeatureSchema
from gr_hstu.models import HSTURetrieval
from gr_hstu.training import settings as defaults
from gr_hstu.training.batches import HistoryEncoder, catalogue_of
from gr_hstu.training.loop import Options, Progress, fit
from gr_hstu.training.progress import Reporter
from gr_hstu.training.retrieval import RetrievalObjective, RetrievalScorer
from gr_hstu.training.sasrec import SASRec
from gr_hstu.training.warm_start import item_vectors

KINDS = ("hstu", "sasrec")


class RetrievalTask:
    """A dataset with its split, features and settings."""

    def __init__(self, data: Interactions, settings: defaults.RetrievalSettings) -> None:
        self.data, self.settings = data, settings
        self.split = defaults.retrieval_split(data, settings)
        self.catalogue = catalogue_of(data)
        self.schema = FeatureSchema(
            signals=settings.signals,
            max_history=settings.max_history,
            truncate_step=settings.truncate_step,
        )
        self.encoder = HistoryEncoder(data, self.schema, self.catalogue)

    def config(self) -> HSTUConfig:
        s = self.settings
        return HSTUConfig(
            variant="research",
            num_items=len(self.catalogue),
            d_model=s.d_model,
            num_layers=s.num_layers,
            num_heads=s.num_heads,
            d_qk=s.d_model // s.num_heads,
            d_v=s.d_model // s.num_heads,
            max_seq_len=s.max_history,
            dropout=s.dropout,
            input_dropout=s.dropout,
            item_l2_norm=s.normalised,
            user_norm="l2" if s.normalised else "layer_norm",
            temperature=s.temperature if s.normalised else 1.0,
            relative_bias=s.relative_bias,
            signal_cardinalities=tuple(f.cardinality for f in s.signals),
        )

    def new_model(self, kind: str, seed: int) -> Any:
        """A fresh ``hstu`` or ``sasrec``, initialised from the seed."""
        s = self.settings
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: Any
            if kind == "hstu":
                model = HSTURetrieval(self.config())
                table = model.items.weight
            else:
                model = SASRec(
                    len(self.catalogue),
                    s.d_model,
                    s.num_layers,
                    s.num_heads,
                    s.max_history,
                    s.sasrec_dropout,
                    tuple(f.cardinality for f in s.signals),
                )
                table = model.item.weight
        if s.warm_start:
            vectors_VD = item_vectors(self.data, self.split.train_N, s.d_model, s.warm_start)
            with torch.no_grad():
                table.copy_(torch.from_numpy(vectors_VD))
        return model

    def objective(self, kind: str) -> RetrievalObjective:
        s = self.settings
        positive_N = defaults.positives(self.data, s.positive)
        return RetrievalObjective(
            self.data,
            self.split.train_N,
            np.where(positive_N, 1.0, s.other_weight).astype(np.float32),
            self.encoder,
            self.split.validation,
            loss=s.loss,
            negatives=s.negatives,
            batch_size=s.batch_size,
            # SASRec's scores are dot products.
            temperature=self.config().temperature if kind == "hstu" else 1.0,
        )

    def train(
        self,
        model: nn.Module,
        kind: str,
        options: Options,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> Progress:
        settings = {k: v for k, v in asdict(self.settings).items() if k != "co_occurrence"}
        identity = {"kind": kind, "data": self.data.name, "settings": settings}
        return fit(model, self.objective(kind), options, folder, reporter, identity)

    def scorer(self, model: Any) -> RetrievalScorer:
        return RetrievalScorer(model, self.encoder)

    def test(self, scorer: Scorer) -> RetrievalResult:
        return evaluate_retrieval(scorer, self.data, self.split.test)

    def baselines(self) -> dict[str, Callable[[], Scorer]]:
        s = self.settings
        return counting_baselines(self.data, self.split, s.co_occurrence, s.positive)


def counting_baselines(
    data: Interactions,
    split: Split,
    co_occurrence: Mapping[str, defaults.CoOccurrenceSettings],
    positive: str | None = None,
) -> dict[str, Callable[[], Scorer]]:
    """Counting baselines: fitted on the rows that models are trained on, and once more on all
    that precedes the test, the validation rows included."""
    out: dict[str, Callable[[], Scorer]] = {}
    for suffix, rows_N in (("", split.train_N), (", validation rows too", split.refit_N)):
        out[f"popularity{suffix}"] = partial(Popularity, data, rows_N)
        if positive is not None:
            positive_N = rows_N & defaults.positives(data, positive)
            out[f"popularity of {positive}{suffix}"] = partial(Popularity, data, positive_N)
        for name, parameters in co_occurrence.items():
            out[name + suffix] = partial(CoOccurrence, data, rows_N, **asdict(parameters))
    return out
