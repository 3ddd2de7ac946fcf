"""The one evaluator of retrieval: full ranking of every item for every case.

A scorer sees a dataset and cases and returns scores of all items; counting baselines, SASRec and
HSTU go through the same function, so no model has its own way of being measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation import metrics
from gr_hstu.evaluation.bootstrap import Interval, mean_interval
from gr_hstu.evaluation.protocols import Cases

BATCH = 512


class RetrievalScorer(Protocol):
    """Scores every item for each case from the case's history alone."""

    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        """(C, 1 + items) float32; column 0, the padding item, is ignored."""
        ...


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of the targets: (C,) each, with seen items removed (B) and kept (A)."""

    user_C: np.ndarray
    rank_seen_removed_C: np.ndarray
    rank_seen_kept_C: np.ndarray

    def per_case(self, metric: str, seen: str = "removed") -> np.ndarray:
        """Values of ``hr@k`` or ``ndcg@k`` for each case."""
        name, k = metric.split("@")
        function = {"hr": metrics.hit_rate, "ndcg": metrics.ndcg}[name]
        rank = self.rank_seen_removed_C if seen == "removed" else self.rank_seen_kept_C
        return function(rank, int(k))

    def mean(self, metric: str, seen: str = "removed") -> float:
        return float(self.per_case(metric, seen).mean())

    def interval(self, metric: str, seen: str = "removed") -> Interval:
        return mean_interval(self.per_case(metric, seen), self.user_C)


def evaluate_retrieval(
    scorer: RetrievalScorer, data: Interactions, cases: Cases, batch: int = BATCH
) -> RetrievalResult:
    """Ranks the target of every case among all items."""
    removed, kept = [], []
    for begin in range(0, len(cases), batch):
        part = cases.take(np.arange(begin, min(begin + batch, len(cases))))
        scores_BN = np.array(scorer.score(data, part), dtype=np.float32)
        scores_BN[:, 0] = -np.inf
        target_B = data.item_N[part.row_C]
        kept.append(metrics.ranks(scores_BN, target_B))
        case, row = history_rows(part)
        other = data.item_N[row] != target_B[case]
        scores_BN[case[other], data.item_N[row[other]]] = -np.inf
        removed.append(metrics.ranks(scores_BN, target_B))
    return RetrievalResult(data.user_N[cases.row_C], np.concatenate(removed), np.concatenate(kept))


def history_rows(cases: Cases, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All (case, row) pairs of the cases' histories, of the ``last`` rows only if given."""
    start = cases.start_C if last is None else np.maximum(cases.start_C, cases.end_C - last)
    length = cases.end_C - start
    case = np.repeat(np.arange(len(cases)), length)
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return case, start[case] + offset


def paired_difference(
    ours: RetrievalResult | Sequence[RetrievalResult],
    theirs: RetrievalResult | Sequence[RetrievalResult],
    metric: str = "ndcg@10",
    seen: str = "removed",
) -> Interval:
    """Interval over users of the mean difference; several seeds of a model are averaged first."""

    def values(results: RetrievalResult | Sequence[RetrievalResult]) -> np.ndarray:
        several = [results] if isinstance(results, RetrievalResult) else list(results)
        return np.mean([r.per_case(metric, seen) for r in several], axis=0)

    user = (ours if isinstance(ours, RetrievalResult) else ours[0]).user_C
    return mean_interval(values(ours) - values(theirs), user)
