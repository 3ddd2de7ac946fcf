"""Bootstrap intervals over users: whole users are drawn, for their events are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gr_hstu.evaluation.metrics import Int

SAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval."""

    value: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def user_weights(users: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """How often each user is drawn in each resample: (samples, users) int16, rows sum to users."""
    draw = np.random.default_rng(seed)
    out = np.empty((samples, users), np.int16)
    for row in out:
        row[:] = np.bincount(draw.integers(0, users, users), minlength=users)
    return out


def interval(value: float, replicates: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    tail = (1 - confidence) / 2 * 100
    low, high = np.nanpercentile(replicates, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


def mean_interval(
    value_C: np.ndarray,
    user_C: Int,
    weight_C: np.ndarray | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the (weighted) mean of per-case values, users resampled.

    A paired comparison of two models is the interval of the mean of their differences. All nan
    without a case.
    """
    if len(value_C) == 0:
        return Interval(np.nan, np.nan, np.nan)
    weight = np.ones(len(value_C)) if weight_C is None else np.asarray(weight_C, np.float64)
    _, user = np.unique(user_C, return_inverse=True)
    total = np.bincount(user, weights=np.asarray(value_C, np.float64) * weight)
    size = np.bincount(user, weights=weight)
    drawn = user_weights(len(size), samples, seed).astype(np.float64)
    return interval(total.sum() / size.sum(), (drawn @ total) / (drawn @ size))


def statistic_interval(
    statistic: Callable[[np.ndarray | None], float],
    user_N: Int,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of ``statistic(weight_N)``, any function of rows weighted by their user's draws."""
    users, user = np.unique(user_N, return_inverse=True)
    drawn = user_weights(len(users), samples, seed)
    return interval(statistic(None), np.array([statistic(row[user]) for row in drawn]))
