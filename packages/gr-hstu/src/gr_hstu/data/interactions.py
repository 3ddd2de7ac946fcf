"""One in-memory form for every dataset: columns of events, sorted by user, time and row.

Because the rows are sorted, everything that a user did before row ``r`` is the slice
``start_of_user[r] : r``: histories are never copied, and a split by time is a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Table:
    """Users or items: external ids and side features, row ``i`` belonging to entity ``i + 1``.

    ``features`` maps a name to a column of strings or float32 numbers (nan where unknown).
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...] | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.features.items()}
        if self.titles is not None:
            lengths["titles"] = len(self.titles)
        for name, length in lengths.items():
            assert length == len(self.ids), f"{name}: {length} values for {len(self.ids)} ids"

    def __len__(self) -> int:
        return len(self.ids)

    def title(self, index: int) -> str:
        """Title of entity ``index`` (1-based); the external id where there is none."""
        return self.titles[index - 1] if self.titles is not None else self.ids[index - 1]


@dataclass(frozen=True)
class Interactions:
    """Events of a dataset as columns of N rows, sorted by (user, time, row in the source).

    ``user_N``, ``item_N`` int64, counted from 1 (0 is padding); ``timestamp_ms_N`` int64, Unix
    milliseconds; ``signals`` name -> float32 (N,), nan where not recorded; ``context`` name ->
    int64 (N,), facts about the request; ``timed_N`` False where the event's own time is not
    recorded and ``timestamp_ms`` is an upper bound of it.
    """

    name: str
    user_N: IntArray
    item_N: IntArray
    timestamp_ms_N: IntArray
    users: Table
    items: Table
    signals: Mapping[str, FloatArray] = field(default_factory=dict)
    context: Mapping[str, IntArray] = field(default_factory=dict)
    timed_N: BoolArray | None = None
    attribution: str = ""
    licence: str = ""
    licence_text: str = ""

    @classmethod
    def sort(cls, interactions: Interactions) -> Interactions:
        """The same events in the order that every other function relies on."""
        i = interactions
        row_N = np.arange(len(i.user_N))
        return i.take(np.lexsort((row_N, i.timestamp_ms_N, i.user_N)))

    def take(self, rows: NDArray[np.integer] | BoolArray) -> Interactions:
        """The given rows (indices or mask) only; the tables of users and items are kept whole."""
        return replace(
            self,
            user_N=self.user_N[rows],
            item_N=self.item_N[rows],
            timestamp_ms_N=self.timestamp_ms_N[rows],
            signals={name: column[rows] for name, column in self.signals.items()},
            context={name: column[rows] for name, column in self.context.items()},
            timed_N=None if self.timed_N is None else self.timed_N[rows],
        )

    def __len__(self) -> int:
        return len(self.user_N)

    @cached_property
    def start_N(self) -> IntArray:
        """For each row the first row of its user: (N,) int64."""
        first = np.searchsorted(self.user_N, np.arange(len(self.users) + 2))
        return first[self.user_N].astype(np.int64)

    @cached_property
    def strictly_before_N(self) -> IntArray:
        """For each row the end of what its user did at an earlier time: (N,) int64.

        Rows that share their user's timestamp do not see each other through it.
        """
        new_N = np.ones(len(self), dtype=bool)
        new_N[1:] = (self.user_N[1:] != self.user_N[:-1]) | (
            self.timestamp_ms_N[1:] != self.timestamp_ms_N[:-1]
        )
        return np.maximum.accumulate(np.where(new_N, np.arange(len(self)), 0)).astype(np.int64)


def number(values: list[str]) -> tuple[IntArray, tuple[str, ...]]:
    """Numbers strings 1, 2, … (integers by value, else by text): (indices (N,), ids by index)."""
    unique = list(set(values))
    try:
        unique.sort(key=int)
    except ValueError:
        unique.sort()
    index = {value: i for i, value in enumerate(unique, start=1)}
    return np.fromiter((index[v] for v in values), np.int64, len(values)), tuple(unique)
