"""Ranking: multi-task training on impressions, and scoring for the evaluator.

Shapes: B impressions, each a request with one candidate; H heads, U user features, I item features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_core.types import Candidates
from gr_hstu.data.interactions import IntArray, Interactions
from gr_hstu.evaluation import metrics
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import Feature
from gr_hstu.training.batches import HistoryEncoder, to_device
from gr_hstu.training.losses import multi_task_bce

POOL = 16  # batches among which impressions are sorted by the length of their history


class ImpressionEncoder:
    """Turns impressions into the inputs that a request with that one candidate gets."""

    def __init__(self, data: Interactions, encoder: HistoryEncoder) -> None:
        self.data, self.histories = data, encoder
        schema = encoder.schema
        columns = {feature.name: data.users.features[feature.name] for feature in schema.user}
        rows = [
            schema.user_array({name: column[u] for name, column in columns.items()})
            for u in range(len(data.users))
        ]
        self.user_UF = np.stack([np.zeros_like(rows[0]), *rows])
        self.context_columns = {f.name: data.context[f.name] for f in schema.context}

    def context(self, row_B: IntArray) -> IntArray:
        """Context features of rows: (B, X) int64."""
        schema = self.histories.schema
        values = [
            {name: int(column[row]) for name, column in self.context_columns.items()}
            for row in row_B
        ]
        return np.stack([schema.context_array(v) for v in values])

    def batch(self, cases: Cases) -> dict[str, Tensor]:
        inputs = self.histories.batch(cases)
        row_B = cases.row_C
        one = np.ones(1, bool)
        # A candidate of a request without cross features, as the serving code encodes it.
        candidate = self.histories.schema.candidate_arrays(Candidates(), one, np.zeros(1, np.int64))
        cross_BCF = np.broadcast_to(
            candidate["candidate_features"], (len(cases), *candidate["candidate_features"].shape)
        )
        return inputs | {
            "user_features": torch.from_numpy(self.user_UF[self.data.user_N[row_B]]),
            "context_features": torch.from_numpy(self.context(row_B)),
            "candidate_items": torch.from_numpy(self.data.item_N[row_B][:, None]),
            "candidate_features": torch.from_numpy(cross_BCF.copy()),
            "candidate_counts": torch.ones(len(cases), dtype=torch.int64),
        }


class RankingObjective:
    """Binary cross-entropy of every head over its observed labels.

    ``label_NH`` is float32 with nan where an outcome is not observed. In a share ``unknown`` of
    the impressions the user features, and independently each context feature, are hidden, so that
    the model knows what to do when a request lacks them.
    """

    def __init__(
        self,
        impressions: ImpressionEncoder,
        label_NH: np.ndarray,
        train: Cases,
        validation: Cases,
        batch_size: int = 128,
        unknown: float = 0.05,
        metric_heads: Sequence[int] | None = None,
    ) -> None:
        self.impressions, self.label_NH = impressions, label_NH
        self.train, self.validation = train, validation
        self.batch_size, self.unknown = batch_size, unknown
        self.metric_heads = metric_heads or range(label_NH.shape[1])

    def epoch(self, draw: np.random.Generator) -> Sequence[IntArray]:
        """Batches of indices into ``train``: shuffled, then sorted by length within pools."""
        order = draw.permutation(len(self.train))
        length = np.minimum(
            self.train.end_C - self.train.start_C, self.impressions.histories.schema.max_history
        )
        pool = POOL * self.batch_size
        batches: list[IntArray] = []
        for begin in range(0, len(order), pool):
            part = order[begin : begin + pool]
            part = part[np.argsort(length[part], kind="stable")]
            batches += np.array_split(part, -(-len(part) // self.batch_size))
        return [batches[i] for i in draw.permutation(len(batches))]

    def loss(self, model: Any, plan: IntArray) -> Tensor:
        cases = self.train.take(plan)
        inputs = self.impressions.batch(cases)
        hidden_B1 = torch.rand(len(cases), 1) < self.unknown
        inputs["user_features"] = inputs["user_features"].masked_fill(hidden_B1, 0)
        hidden_BX = torch.rand(inputs["context_features"].shape) < self.unknown
        inputs["context_features"] = inputs["context_features"].masked_fill(hidden_BX, 0)
        logits_BCH = score(model, to_device(inputs, model))
        label_BCH = torch.from_numpy(self.label_NH[cases.row_C])[:, None].to(logits_BCH.device)
        return multi_task_bce(logits_BCH, label_BCH)

    def validate(self, model: Any) -> float:
        """Mean AUC of the heads."""
        probability_CH = predict(model, self.impressions, self.validation)
        label_CH = self.label_NH[self.validation.row_C]
        values = []
        for head in self.metric_heads:
            known = np.isfinite(label_CH[:, head])
            values.append(metrics.auc(label_CH[known, head], probability_CH[known, head]))
        return float(np.mean(values))


def score(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (B, C, H) of a ranking model, which names the inputs that it reads."""
    names = RANKING_INPUTS + (("realtime_counts",) if hasattr(model, "behaviour_mlp") else ())
    return model(**{name: inputs[name] for name in names})


RANKING_INPUTS = (
    "history_items",
    "history_timestamps",
    "history_lengths",
    "request_time",
    "history_signals",
    "user_features",
    "context_features",
    "candidate_items",
    "candidate_features",
    "candidate_counts",
)


@torch.inference_mode()
def predict(
    model: Any, impressions: ImpressionEncoder, cases: Cases, batch: int = 512
) -> np.ndarray:
    """Probabilities of every head for each case: (C, H) float32."""
    order = np.argsort(cases.end_C - cases.start_C, kind="stable")
    parts = []
    for begin in range(0, len(cases), batch):
        inputs = impressions.batch(cases.take(order[begin : begin + batch]))
        parts.append(torch.sigmoid(score(model, to_device(inputs, model)))[:, 0].cpu().numpy())
    out = np.concatenate(parts)
    out[order] = out.copy()
    return out


def encode_item_features(data: Interactions, features: Sequence[Feature]) -> Tensor:
    """Side features of all items, as the model's ``item_features``: (1 + items, I) int64."""
    out = np.zeros((len(data.items) + 1, len(features)), np.int64)
    for i, feature in enumerate(features):
        column = data.items.features[feature.name]
        if column.dtype.kind == "f" and feature.kind != "categorical":
            out[1:, i] = feature.encode(column)
        else:
            out[1:, i] = [feature.encode_value(str(value)) for value in column]
    return torch.from_numpy(out)
