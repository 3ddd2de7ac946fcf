"""Item vectors from co-occurrence counts: where training starts, for HSTU and SASRec alike.

Tens of thousands of short histories teach item similarities slowly by gradient steps. The leading
eigenvectors of the co-occurrence matrix hold most of them from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gr_hstu.data.interactions import BoolArray, Interactions
from gr_hstu.evaluation.baselines import CoOccurrence

WINDOW = 50
OVERSAMPLING = 32
ITERATIONS = 4


def item_vectors(data: Interactions, rows_N: BoolArray, width: int, norm: float) -> np.ndarray:
    """(1 + items, width) float32 in which items are alike that co-occur alike in ``rows_N``: left
    singular vectors of the normalised counts, times the roots of the singular values. ``norm`` is
    the mean length. Row 0 and items that never occur are zero.
    """
    matrix_VV = CoOccurrence(data, rows_N, window=WINDOW, powers=(0.5, 0.5)).matrix_VV
    symmetric_VV = (matrix_VV + matrix_VV.T) / 2
    value_K, vector_VK = leading_eigenvectors(
        lambda x: symmetric_VV @ x, len(data.items) + 1, width
    )
    out = (vector_VK * np.sqrt(np.abs(value_K))).astype(np.float32)
    out[np.asarray(symmetric_VV.sum(axis=0)).reshape(-1) == 0] = 0  # rounding errors only
    length = np.linalg.norm(out[1:], axis=1)
    return out * (norm / max(float(length[length > 0].mean()), 1e-9))


def leading_eigenvectors(
    multiply: Callable[[np.ndarray], np.ndarray], size: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (count,) of the largest magnitude and their vectors (size, count) of a symmetric
    matrix, by randomised subspace iteration (Halko et al., 2011)."""
    columns = min(size, 2 * count + OVERSAMPLING)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, columns)))
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(multiply(basis))
    value, rotation = np.linalg.eigh(basis.T @ multiply(basis))
    best = np.argsort(-np.abs(value))[:count]
    # A matrix of few items has fewer eigenvectors than the model has columns.
    vectors = np.zeros((size, count))
    values = np.zeros(count)
    vectors[:, : len(best)] = basis @ rotation[:, best]
    values[: len(best)] = value[best]
    return values, vectors
