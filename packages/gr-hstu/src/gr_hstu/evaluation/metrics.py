"""Metrics of retrieval and ranking, vectorised over cases.

Every metric is made of a numerator and a denominator per user, so that one bootstrap over users
(:mod:`gr_hstu.evaluation.bootstrap`) serves all of them. AUC over all impressions is the one
exception; it takes weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]

EPSILON = 1e-7  # probabilities are kept this far from 0 and 1 in logarithms


def ranks(scores_BN: np.ndarray, target_B: Int) -> Int:
    """Rank of each target, counted from 1, among the N scores of its row; (B,) int64.

    Ties count against the target, so that a model which scores everything alike gains nothing.
    Excluded items carry a score of -inf. A nan anywhere in a row makes its target last.
    """
    target_B1 = np.take_along_axis(scores_BN, target_B[:, None], axis=1)
    return (~(scores_BN < target_B1)).sum(axis=1).astype(np.int64)


def hit_rate(rank_C: Int, k: int) -> Float:
    """1 where the target is within the first k, else 0; (C,)."""
    return (rank_C <= k).astype(np.float64)


def ndcg(rank_C: Int, k: int) -> Float:
    """NDCG@k with one relevant item: 1 / log2(1 + rank) within the first k, else 0; (C,)."""
    return np.where(rank_C <= k, 1.0 / np.log2(1.0 + rank_C), 0.0)


def auc(label_N: np.ndarray, score_N: np.ndarray, weight_N: np.ndarray | None = None) -> float:
    """Area under the ROC curve, ties counted half; nan unless both classes are there.

    The probability that a positive outscores a negative, over weighted pairs.
    """
    return auc_of_ranks(label_N, dense_ranks(score_N), weight_N)


def auc_of_ranks(label_N: np.ndarray, group: Int, weight_N: np.ndarray | None = None) -> float:
    """`auc` of scores whose `dense_ranks` are known; for many weights of the same scores."""
    label = np.asarray(label_N, dtype=bool)
    weight = np.ones(len(label)) if weight_N is None else np.asarray(weight_N, np.float64)
    positive = np.bincount(group, weights=weight * label)
    negative = np.bincount(group, weights=weight * ~label)
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + 0.5 * negative)).sum() / pairs) if pairs else float("nan")


def auc_per_user(label_N: np.ndarray, score_N: np.ndarray, user_N: Int) -> tuple[Int, Float, Int]:
    """AUC of each user who has both classes: (users, AUC, number of impressions)."""
    label = np.asarray(label_N, dtype=np.float64)
    users, user = np.unique(user_N, return_inverse=True)
    order = np.lexsort((score_N, user))
    user, label, score = user[order], label[order], np.asarray(score_N)[order]
    size = np.bincount(user)
    # Mean rank of each run of equal scores inside one user, counted from 1.
    new = np.ones(len(user), dtype=bool)
    new[1:] = (user[1:] != user[:-1]) | (score[1:] != score[:-1])
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(user)) - 1
    offset = (np.cumsum(size) - size)[user]
    rank = (first + last)[run] / 2 + 1 - offset
    positive = np.bincount(user, weights=label)
    negative = size - positive
    both = (positive > 0) & (negative > 0)
    rank_sum = np.bincount(user, weights=rank * label)
    value = (rank_sum - positive * (positive + 1) / 2)[both] / (positive * negative)[both]
    return users[both], value, size[both]


def log_loss(label_N: np.ndarray, probability_N: np.ndarray) -> Float:
    """Binary cross-entropy of each row in nats; (N,)."""
    p = np.clip(np.asarray(probability_N, np.float64), EPSILON, 1 - EPSILON)
    label = np.asarray(label_N, np.float64)
    return -(label * np.log(p) + (1 - label) * np.log1p(-p))


def normalised_entropy(label_N: np.ndarray, probability_N: np.ndarray) -> float:
    """Mean log loss over that of always answering the rows' own positive rate (He et al., 2014).

    1 is no better than a constant; nan unless both classes are there.
    """
    rate = float(np.mean(label_N))
    if not 0 < rate < 1:
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(label_N, probability_N).mean() / entropy)


def dense_ranks(score_N: np.ndarray) -> Int:
    """Places of scores among their distinct values, from 0 up, (N,)."""
    return np.unique(np.asarray(score_N), return_inverse=True)[1].reshape(-1)
