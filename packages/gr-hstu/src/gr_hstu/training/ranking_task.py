"""Ranking on one dataset, ready to train, to measure and to bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.baselines import ItemRate, OneHotLogisticRegression
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.evaluation.retrieval import history_rows
from gr_hstu.features import FeatureSchema
from gr_hstu.models import MTGR, HSTURanking
from gr_hstu.training import settings as defaults
from gr_hstu.training.batches import HistoryEncoder, catalogue_of
from gr_hstu.training.loop import Options, Progress, fit
from gr_hstu.training.progress import Reporter
from gr_hstu.training.ranking import (
    ImpressionEncoder,
    RankingObjective,
    encode_item_features,
    predict,
)
from gr_hstu.training.warm_start import item_vectors

KINDS = ("mtgr", "hstu")
TIME_BUCKETS = 128
EMBEDDING_STD = 0.1
# Buckets of the history aggregates that a logistic regression is given in place of the history.
SHARES = np.linspace(0, 1, 11)[1:-1]
HOURS = np.array([0.02, 0.1, 0.5, 1, 3, 6, 12, 24, 48, 96])
LENGTHS = np.array([1, 5, 10, 20, 30, 40, 48])


class RankingTask:
    """A dataset with its split, features, labels and settings."""

    def __init__(self, data: Interactions, settings: defaults.RankingSettings) -> None:
        self.data = data = defaults.with_earlier_rates(data)
        self.settings = settings
        self.split = defaults.ranking_split(data)
        self.catalogue = catalogue_of(data)
        self.schema = FeatureSchema(
            signals=settings.signals,
            user=defaults.side_features(data.users, settings.user_columns),
            context=tuple(defaults.category_feature(n, c) for n, c in data.context.items()),
            max_history=settings.max_history,
            truncate_step=settings.truncate_step,
            realtime_window_s=settings.realtime_window_s,
        )
        self.item_features = defaults.side_features(data.items, settings.item_columns)
        self.item_feature_VI = encode_item_features(data, self.item_features)
        self.impressions = ImpressionEncoder(
            data, HistoryEncoder(data, self.schema, self.catalogue)
        )
        self.label_NH = defaults.labels(data, settings.heads)
        assert self.split.training is not None
        self.train_cases = self.split.training

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.settings.heads)

    def training_labels(self) -> np.ndarray:
        """Labels known when training ends: whether a user returns the day after is not, yet."""
        label_NH = self.label_NH.copy()
        day_N = defaults.calendar_day(self.data)
        unknown_N = day_N >= day_N[self.train_cases.row_C].max()
        for head, label in enumerate(self.settings.heads.values()):
            if label == "returns_next_day":
                label_NH[unknown_N, head] = np.nan
        return label_NH

    def config(self) -> MTGRConfig | HSTUConfig:
        s = self.settings
        common: dict[str, Any] = {
            "num_items": len(self.catalogue),
            "d_model": s.d_model,
            "num_layers": s.num_layers,
            "num_heads": s.num_heads,
            "max_seq_len": s.max_history,
            "heads": self.heads,
            "mlp_dim": s.mlp_dim,
            "dropout": s.dropout,
            "input_dropout": s.dropout,
            "context_placement": "candidate",
            "time_buckets": TIME_BUCKETS,
            "signal_cardinalities": tuple(f.cardinality for f in self.schema.signals),
            "user_cardinalities": tuple(f.cardinality for f in self.schema.user),
            "context_cardinalities": tuple(f.cardinality for f in self.schema.context),
            "item_cardinalities": tuple(f.cardinality for f in self.item_features),
        }
        positions = s.max_history + len(self.schema.user) + 1
        if s.model == "mtgr":
            return MTGRConfig(embedding_dim=s.embedding_dim, position_buckets=positions, **common)
        width = s.d_model // s.num_heads
        return HSTUConfig(
            variant="ranking", d_qk=width, d_v=width, position_buckets=positions, **common
        )

    def new_model(self, seed: int) -> MTGR | HSTURanking:
        """A fresh model, initialised from the seed, with the items' side features in place."""
        config = self.config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MTGR(config) if isinstance(config, MTGRConfig) else HSTURanking(config)
            # As large as the position and time embeddings that are added to them, which would
            # otherwise hide what the tokens are about from the first layer norm for long.
            for table in (
                model.items,
                *model.item_side.tables,
                *model.signals.tables,
                *model.users.tables,
                *model.contexts.tables,
            ):
                nn.init.normal_(table.weight, std=EMBEDDING_STD)
            with torch.no_grad():
                model.items.weight[0].zero_()
                if self.settings.warm_start:
                    width = model.items.embedding_dim
                    vectors_VD = item_vectors(
                        self.data, self.split.train_N, width, self.settings.warm_start
                    )
                    model.items.weight.copy_(torch.from_numpy(vectors_VD))
        model.item_features.copy_(self.item_feature_VI)
        return model

    def objective(self) -> RankingObjective:
        labels = list(self.settings.heads.values())
        return RankingObjective(
            self.impressions,
            self.training_labels(),
            self.train_cases,
            self.split.validation,
            batch_size=self.settings.batch_size,
            within_user=self.settings.within_user,
            item_heads=[h for h, label in enumerate(labels) if label != "returns_next_day"],
        )

    def train(
        self,
        model: nn.Module,
        options: Options,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> Progress:
        identity = {"data": self.data.name, "settings": asdict(self.settings)}
        return fit(model, self.objective(), options, folder, reporter, identity)

    def test(self, model: Any) -> np.ndarray:
        """Probabilities (C, H) for the test impressions."""
        return predict(model, self.impressions, self.split.test)

    def baselines(self) -> dict[str, np.ndarray]:
        """Probabilities (C, H) of the baselines for the test impressions.

        Fitted on the impressions of the training days, as the model is. The logistic regression
        reads all that the model reads of a request but the history; its second form also reads
        aggregates of the history.
        """
        train, test = self.train_cases, self.split.test
        item_N, label_NH = self.data.item_N, self.training_labels()
        popularity: list[np.ndarray] = []
        logistic: list[np.ndarray] = []
        with_history: list[np.ndarray] = []
        plain = [self._plain_features(c) for c in (train, test)]
        full = [
            np.concatenate([p, self._history_aggregates(c)], axis=1)
            for p, c in zip(plain, (train, test), strict=True)
        ]
        for head in range(len(self.heads)):
            label = label_NH[train.row_C, head]
            rate = ItemRate(item_N[train.row_C], label, len(self.catalogue))
            popularity.append(rate.predict(item_N[test.row_C]))
            for out, (x, y) in ((logistic, plain), (with_history, full)):
                sizes = (np.maximum(x.max(axis=0), y.max(axis=0)) + 1).tolist()
                model = OneHotLogisticRegression(
                    sizes, self.settings.logistic_regression_strength
                ).fit(x, label)
                out.append(model.predict(y))
        return {
            "popularity by item": np.stack(popularity, axis=1),
            "logistic regression, same features": np.stack(logistic, axis=1),
            "logistic regression, same features and history aggregates": np.stack(
                with_history, axis=1
            ),
        }

    def _plain_features(self, cases: Cases) -> np.ndarray:
        """User, context, item features and the item itself: (C, F) int64."""
        row_C = cases.row_C
        item_C = self.data.item_N[row_C]
        return np.concatenate(
            [
                self.impressions.user_UF[self.data.user_N[row_C]],
                self.impressions.context_NX[row_C],
                self.item_feature_VI.numpy()[item_C],
                item_C[:, None],
            ],
            axis=1,
        )

    def _history_aggregates(self, cases: Cases) -> np.ndarray:
        """Length, time since the last behaviour, and each signal's mean in the newest rows."""
        data, last = self.data, self.settings.max_history
        case, row = history_rows(cases, last)
        length_C = np.bincount(case, minlength=len(cases))
        newest_C = np.maximum(cases.end_C - 1, 0)
        elapsed_C = data.timestamp_ms_N[cases.row_C] - data.timestamp_ms_N[newest_C]
        hours_C = np.where(length_C > 0, elapsed_C / 3_600_000, np.inf)
        columns = [np.searchsorted(LENGTHS, length_C), np.searchsorted(HOURS, hours_C)]
        for feature in self.schema.signals:
            value = data.signals[feature.name][row]
            known = np.isfinite(value)
            total = np.bincount(case[known], value[known], len(cases))
            count = np.bincount(case[known], minlength=len(cases))
            share = total / np.maximum(count, 1)
            columns.append(np.where(count > 0, 1 + np.searchsorted(SHARES, share, "right"), 0))
        return np.stack(columns, axis=1).astype(np.int64)
