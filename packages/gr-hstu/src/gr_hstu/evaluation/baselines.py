"""Counting baselines, fitted on the same rows as the models and measured by the same evaluator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from gr_hstu.data.interactions import BoolArray, IntArray, Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.evaluation.retrieval import history_rows

# Popularity settles ties of co-occurrence and answers where it is silent; too small to reorder.
TIE_BREAK = 1e-6


class Popularity:
    """Scores an item by how often it occurs in the fitted rows."""

    def __init__(self, data: Interactions, rows_N: BoolArray) -> None:
        self.count_V = np.bincount(data.item_N[rows_N], minlength=len(data.items) + 1)

    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        return np.broadcast_to(self.count_V.astype(np.float32), (len(cases), len(self.count_V)))


class CoOccurrence:
    """Item-to-item counts summed over the history; every parameter is chosen on validation cases.

    ``window`` None: cosine of the items' sets of users, symmetric, ``powers`` have no effect.
    ``window`` w: how often an item followed another within w steps of one user, each pair counted
    ``distance ** -discount``, times ``count ** -power`` of the earlier and of the later item.
    A query sums the rows of its ``last`` newest items (None: all), each weighted
    ``age ** -recency`` where the newest has age 1.
    """

    def __init__(
        self,
        data: Interactions,
        rows_N: BoolArray,
        window: int | None = None,
        last: int | None = None,
        discount: float = 0.0,
        powers: tuple[float, float] = (0.5, 0.25),
        recency: float = 0.0,
    ) -> None:
        self.last, self.recency = last, recency
        size = len(data.items) + 1
        fitted = data.take(rows_N)
        count_V = np.bincount(fitted.item_N, minlength=size).astype(np.float32)
        if window is None:
            matrix_VV, count_V = _same_user_pairs(fitted, size)
            powers = (0.5, 0.5)
        else:
            matrix_VV = _directed_pairs(fitted, size, window, discount)
        matrix_VV.setdiag(0)
        once_V = np.maximum(count_V, 1)
        self.matrix_VV = sp.csr_array(
            sp.diags_array(once_V ** -powers[0]) @ matrix_VV @ sp.diags_array(once_V ** -powers[1])
        )
        self.tie_break_V = (TIE_BREAK * count_V / max(count_V.max(), 1)).astype(np.float32)

    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        case, row = history_rows(cases, self.last)
        weight = (cases.end_C[case] - row).astype(np.float32) ** -self.recency
        shape = (len(cases), self.matrix_VV.shape[0])
        query = sp.csr_array((weight, (case, data.item_N[row])), shape)
        return np.asarray((query @ self.matrix_VV).todense(), np.float32) + self.tie_break_V


def _same_user_pairs(data: Interactions, size: int) -> tuple[sp.csr_array, np.ndarray]:
    """How many users met both items (V, V), and how many met each (V,)."""
    ones = np.ones(len(data), np.float32)
    seen = sp.csr_array((ones, (data.user_N, data.item_N)), (len(data.users) + 1, size))
    seen.data[:] = 1
    return sp.csr_array(seen.T @ seen), np.asarray(seen.sum(axis=0), np.float32)


def _directed_pairs(data: Interactions, size: int, window: int, discount: float) -> sp.csr_array:
    total = sp.csr_array((size, size), dtype=np.float32)
    for step in range(1, window + 1):
        same = data.user_N[step:] == data.user_N[:-step]
        source, target = data.item_N[:-step][same], data.item_N[step:][same]
        weight = np.full(len(source), step**-discount, np.float32)
        total = total + sp.csr_array((weight, (source, target)), (size, size))
    return total


class ItemRate:
    """Popularity-by-item for ranking: each item's smoothed positive rate in the fitted rows.

    ``rate = (positives + strength · mean) / (impressions + strength)``.
    """

    def __init__(
        self, item_N: IntArray, label_N: np.ndarray, items: int, strength: float = 20.0
    ) -> None:
        known = np.isfinite(label_N)
        mean = label_N[known].mean()
        shown = np.bincount(item_N[known], minlength=items + 1)
        positive = np.bincount(item_N[known], weights=label_N[known], minlength=items + 1)
        self.rate_V = (positive + strength * mean) / (shown + strength)

    def predict(self, item_N: IntArray) -> np.ndarray:
        return self.rate_V[item_N]


class OneHotLogisticRegression:
    """Logistic regression on one-hot integer features (scikit-learn), with a bias.

    ``sizes`` is the number of values of each column of the (N, F) features. ``strength`` is the
    inverse of the L2 penalty, scikit-learn's C.
    """

    def __init__(self, sizes: Sequence[int], strength: float = 0.1) -> None:
        self.offset_F = np.concatenate([[0], np.cumsum(sizes)])
        self.strength = strength

    def _one_hot(self, feature_NF: IntArray) -> sp.csr_array:
        n, f = feature_NF.shape
        column = (feature_NF + self.offset_F[:-1]).reshape(-1)
        row = np.arange(0, n * f + 1, f)
        return sp.csr_array((np.ones(n * f, np.float64), column, row), (n, int(self.offset_F[-1])))

    def fit(self, feature_NF: IntArray, label_N: np.ndarray) -> OneHotLogisticRegression:
        from sklearn.linear_model import LogisticRegression

        known = np.isfinite(label_N)
        self.model = LogisticRegression(C=self.strength, max_iter=500)
        self.model.fit(self._one_hot(feature_NF[known]), label_N[known])
        return self

    def predict(self, feature_NF: IntArray) -> np.ndarray:
        return np.asarray(self.model.predict_proba(self._one_hot(feature_NF))[:, 1])
