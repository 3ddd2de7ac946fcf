"""Ranking: multi-task training on impressions, and scoring for the evaluator.

Shapes: B requests, C candidates of a request, I impressions of a batch, H heads, X context
features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_core.types import Candidates
from gr_hstu.data.interactions import IntArray, Interactions
from gr_hstu.evaluation import metrics
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import Feature
from gr_hstu.training.batches import HistoryEncoder, stack, to_device
from gr_hstu.training.losses import multi_task_bce, within_user_softmax

POOL = 16  # batches among which requests are sorted by the length of their history


@dataclass(frozen=True)
class Requests:
    """Impressions grouped into requests: those of one user with one history and one context.

    ``first_R`` and ``size_R`` say where a request's impressions lie in ``case_C``, which holds
    indices into the cases.
    """

    cases: Cases
    case_C: IntArray
    first_R: IntArray
    size_R: IntArray

    def __len__(self) -> int:
        return len(self.first_R)

    def members(self, request: int) -> IntArray:
        """Cases of a request, in the order of their rows."""
        first = self.first_R[request]
        return self.case_C[first : first + self.size_R[request]]


class ImpressionEncoder:
    """Turns impressions into the inputs that a request with them as candidates gets."""

    def __init__(self, data: Interactions, encoder: HistoryEncoder) -> None:
        self.data, self.histories = data, encoder
        schema = encoder.schema
        columns = {feature.name: data.users.features[feature.name] for feature in schema.user}
        rows = [
            schema.user_array({name: column[u] for name, column in columns.items()})
            for u in range(len(data.users))
        ]
        self.user_UF = np.stack([np.zeros_like(rows[0]), *rows])
        names = [feature.name for feature in schema.context]
        self.context_NX = np.zeros((len(data), len(names)), np.int64)
        if names:
            raw_NX = np.stack([data.context[name] for name in names], axis=1)
            distinct, which = np.unique(raw_NX, axis=0, return_inverse=True)
            encoded = [
                schema.context_array(dict(zip(names, values, strict=True)))
                for values in distinct.tolist()
            ]
            self.context_NX = np.stack(encoded)[which.reshape(-1)]

    def requests(self, cases: Cases) -> Requests:
        """Groups cases by user, history and context, in the order of their rows."""
        row_C = cases.row_C
        key = np.column_stack([self.data.user_N[row_C], cases.end_C, self.context_NX[row_C]])
        _, group_C = np.unique(key, axis=0, return_inverse=True)
        order = np.argsort(group_C.reshape(-1), kind="stable")
        size_R = np.bincount(group_C.reshape(-1))
        return Requests(cases, order, np.cumsum(size_R) - size_R, size_R)

    def batch(self, requests: Requests, plan: IntArray) -> dict[str, Tensor]:
        """Inputs of the requests ``plan`` (B,), made at the time of their first impression."""
        members = [requests.members(r) for r in plan]
        first = requests.cases.take(np.array([m[0] for m in members]))
        row_B = first.row_C
        candidates = []
        for cases in members:
            items = self.data.item_N[requests.cases.row_C[cases]]
            known = np.ones(len(items), bool)
            arrays = self.histories.schema.candidate_arrays(Candidates(), known, items)
            candidates.append(arrays)
        return {
            **self.histories.batch(first),
            **stack(candidates),
            "user_features": torch.from_numpy(self.user_UF[self.data.user_N[row_B]]),
            "context_features": torch.from_numpy(self.context_NX[row_B]),
        }


class RankingObjective:
    """Binary cross-entropy of every head over its observed labels, plus ``within_user`` times the
    contrast of each user's positives with the same user's negatives.

    ``label_NH`` is float32 with nan where an outcome is not observed. In a share ``unknown`` of
    the requests the user features, and independently each context feature, are hidden, so that
    the model knows what to do when a request lacks them. ``batch_size`` counts impressions.
    ``item_heads`` are those that the item decides: they are contrasted, and choose the best epoch.
    """

    def __init__(
        self,
        impressions: ImpressionEncoder,
        label_NH: np.ndarray,
        train: Cases,
        validation: Cases,
        batch_size: int = 256,
        unknown: float = 0.05,
        within_user: float = 1.0,
        item_heads: Sequence[int] | None = None,
    ) -> None:
        self.impressions, self.label_NH = impressions, label_NH
        self.train, self.validation = impressions.requests(train), validation
        self.batch_size, self.unknown = batch_size, unknown
        self.within_user = within_user
        self.item_heads = list(range(label_NH.shape[1]) if item_heads is None else item_heads)

    def epoch(self, draw: np.random.Generator) -> Sequence[IntArray]:
        """Batches of requests: shuffled, then sorted by length within pools, so that little is
        padded."""
        requests = self.train
        length_C = requests.cases.end_C - requests.cases.start_C
        length_R = length_C[requests.case_C[requests.first_R]]
        length_R = np.minimum(length_R, self.impressions.histories.schema.max_history)
        order_R = draw.permutation(len(requests))
        pool_R = np.cumsum(requests.size_R[order_R]) // (POOL * self.batch_size)
        order_R = order_R[np.lexsort((length_R[order_R], pool_R))]
        batch_R = np.cumsum(requests.size_R[order_R]) // self.batch_size
        batches = np.split(order_R, np.flatnonzero(np.diff(batch_R)) + 1)
        return [batches[i] for i in draw.permutation(len(batches))]

    def loss(self, model: Any, plan: IntArray) -> Tensor:
        requests = self.train
        inputs = self.impressions.batch(requests, plan)
        hidden_B1 = torch.rand(len(plan), 1) < self.unknown
        inputs["user_features"] = inputs["user_features"].masked_fill(hidden_B1, 0)
        hidden_BX = torch.rand(inputs["context_features"].shape) < self.unknown
        inputs["context_features"] = inputs["context_features"].masked_fill(hidden_BX, 0)
        logits_BCH = score(model, to_device(inputs, model))
        row_C = requests.cases.row_C[np.concatenate([requests.members(r) for r in plan])]
        # Impressions one after another, (I, H), without the padding of short requests.
        size_B = inputs["candidate_counts"].to(logits_BCH.device)
        inside_BC = torch.arange(logits_BCH.shape[1], device=size_B.device) < size_B[:, None]
        logits_IH = logits_BCH[inside_BC]
        label_IH = torch.from_numpy(self.label_NH[row_C]).to(logits_IH.device)
        loss = multi_task_bce(logits_IH, label_IH)
        if self.within_user:
            user_I = torch.from_numpy(self.impressions.data.user_N[row_C]).to(logits_IH.device)
            heads = self.item_heads
            contrast = within_user_softmax(logits_IH[:, heads], label_IH[:, heads], user_I)
            loss = loss + self.within_user * contrast
        return loss

    def validate(self, model: Any) -> float:
        """Mean over the heads of AUC and GAUC."""
        cases = self.validation
        probability_CH = predict(model, self.impressions, cases)
        label_CH = self.label_NH[cases.row_C]
        user_C = self.impressions.data.user_N[cases.row_C]
        values = []
        for head in self.item_heads:
            known = np.isfinite(label_CH[:, head])
            label, value = label_CH[known, head], probability_CH[known, head]
            _, by_user, weight = metrics.auc_per_user(label, value, user_C[known])
            values.append(metrics.auc(label, value))
            if len(by_user):
                values.append(float(np.average(by_user, weights=weight)))
        return float(np.nanmean(values))


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
    model: Any, impressions: ImpressionEncoder, cases: Cases, batch: int = 256
) -> np.ndarray:
    """Probabilities of every head for each case: (C, H) float32."""
    requests = impressions.requests(cases)
    length_R = (cases.end_C - cases.start_C)[requests.case_C[requests.first_R]]
    order_R = np.argsort(length_R, kind="stable")
    out: np.ndarray | None = None
    for begin in range(0, len(order_R), batch):
        plan = order_R[begin : begin + batch]
        inputs = to_device(impressions.batch(requests, plan), model)
        probability_BCH = torch.sigmoid(score(model, inputs)).cpu().numpy()
        if out is None:
            out = np.zeros((len(cases), probability_BCH.shape[-1]), np.float32)
        for request, probability_CH in zip(plan, probability_BCH, strict=True):
            members = requests.members(request)
            out[members] = probability_CH[: len(members)]
    assert out is not None, "no cases"
    return out


def encode_item_features(data: Interactions, features: Sequence[Feature]) -> Tensor:
    """Side features of all items, as the model's ``item_features``: (1 + items, features) int64."""
    out = np.zeros((len(data.items) + 1, len(features)), np.int64)
    for i, feature in enumerate(features):
        column = data.items.features[feature.name]
        if column.dtype.kind == "f" and feature.kind != "categorical":
            out[1:, i] = feature.encode(column)
        else:
            out[1:, i] = [feature.encode_value(str(value)) for value in column]
    return torch.from_numpy(out)
