"""The one evaluator of ranking: AUC, per-user AUC (GAUC), log loss and normalised entropy.

Labels are float with nan where the outcome is not observed; such rows do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr_hstu.evaluation import metrics
from gr_hstu.evaluation.bootstrap import SAMPLES, Interval, mean_interval, statistic_interval


@dataclass(frozen=True)
class RankingResult:
    """Quality of one head: intervals over users, and losses where scores are probabilities."""

    rows: int
    users: int
    positive_rate: float
    auc: Interval
    gauc: Interval
    log_loss: float
    normalised_entropy: float


def evaluate_ranking(
    label_N: np.ndarray, probability_N: np.ndarray, user_N: np.ndarray, samples: int = SAMPLES
) -> RankingResult:
    """Evaluates one head on impressions of known outcome.

    GAUC is the mean of per-user AUCs weighted by impressions, over users with both outcomes
    (Zhu et al., 2017).
    """
    label, probability, user = _observed(label_N, user_N, probability_N)
    users, value, weight = metrics.auc_per_user(label, probability, user)
    ranks = metrics.dense_ranks(probability)
    return RankingResult(
        rows=len(label),
        users=len(np.unique(user)),
        positive_rate=float(label.mean()),
        auc=statistic_interval(lambda w: metrics.auc_of_ranks(label, ranks, w), user, samples),
        gauc=mean_interval(value, users, weight, samples),
        log_loss=float(metrics.log_loss(label, probability).mean()),
        normalised_entropy=metrics.normalised_entropy(label, probability),
    )


def auc_difference(
    label_N: np.ndarray,
    ours_N: np.ndarray,
    theirs_N: np.ndarray,
    user_N: np.ndarray,
    samples: int = SAMPLES,
) -> tuple[Interval, Interval]:
    """Paired intervals over users of (AUC, GAUC) of ours minus theirs."""
    label, ours, user = _observed(label_N, user_N, ours_N)
    theirs = _observed(label_N, user_N, theirs_N)[1]

    ranks = [metrics.dense_ranks(score) for score in (ours, theirs)]

    def difference(weight: np.ndarray | None) -> float:
        mine, other = (metrics.auc_of_ranks(label, group, weight) for group in ranks)
        return mine - other

    users, value, weight = metrics.auc_per_user(label, ours, user)
    other = metrics.auc_per_user(label, theirs, user)[1]
    return (
        statistic_interval(difference, user, samples),
        mean_interval(value - other, users, weight, samples),
    )


def _observed(
    label_N: np.ndarray, user_N: np.ndarray, score_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    known = np.isfinite(label_N)
    return label_N[known], np.asarray(score_N)[known], user_N[known]
