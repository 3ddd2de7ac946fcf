"""Users who return: what they did so far, and what they ask for each time.

A user comes with a history, and at every visit a few behaviours more. All of it is made up from a
seed, so that every server is asked the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gr_core.types import Candidates, FloatArray, History, IntArray, RecommendRequest

SIGNALS = ("is_long_view", "is_liked", "is_clicked", "watch_percentage")
"""What histories bring: the signals that the shipped models read."""

_START_MS = 1_700_000_000_000
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Visits:
    """The shape of the work."""

    items: Sequence[int]
    """Ids of the catalogue."""
    first: int
    """Behaviours at the first visit."""
    new: int
    """Behaviours more at each visit after it."""
    returns: int
    """Visits after the first one."""
    candidates: int
    """To rank; 0: items are retrieved instead."""

    @property
    def longest(self) -> int:
        return self.first + self.returns * self.new


class User:
    """One user for all visits. ``visit`` counts from 0, the first one."""

    def __init__(self, work: Visits, number: int, seed: int, *, model: str = "") -> None:
        random = np.random.default_rng((seed, number))
        n = work.longest
        items = np.asarray(work.items, np.int64)
        self.id = f"user-{seed}-{number}"
        self._work = work
        self._model = model
        self._items: IntArray = items[random.integers(0, len(items), n)]
        self._times: IntArray = _START_MS + np.cumsum(random.integers(1_000, 600_000, n))
        self._signals: Mapping[str, FloatArray] = {
            name: random.integers(0, 2, n).astype(np.float32) for name in SIGNALS[:3]
        } | {SIGNALS[3]: random.random(n, np.float32)}
        self._candidates: list[IntArray] = [
            items[random.choice(len(items), work.candidates, replace=False)]
            for _ in range(work.returns + 1)
        ]

    def request(self, visit: int, *, handle: bytes | None = None) -> RecommendRequest:
        """With the whole history; with a handle, even an empty one, only with what is new."""
        stop = self._work.first + visit * self._work.new
        start = 0 if handle is None else stop - self._work.new
        rows = slice(start, stop)
        candidates = self._candidates[visit]
        return RecommendRequest(
            History(
                self._items[rows],
                self._times[rows],
                {name: column[rows] for name, column in self._signals.items()},
            ),
            candidates=Candidates(candidates) if len(candidates) else None,
            k=10,
            model=self._model,
            user_id=self.id,
            context_features={"hour": visit % 24},
            request_time_ms=int(self._times[stop - 1]) + _HOUR_MS,
            history_handle=handle or b"",
        )
