"""The vocabulary: what a request, a history, candidates and an answer are.

Everything here is frozen and columnar. A history of n behaviours is a handful of arrays of
length n and never n objects, because a history of 512 rows would otherwise cost more than a small
model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
ItemId: TypeAlias = int | str
ItemIds: TypeAlias = npt.NDArray[Any]
"""External item ids, shape (n,): int64, or ``object``/``str`` where ids are strings."""
FeatureValue: TypeAlias = int | float | str
Features: TypeAlias = Mapping[str, FeatureValue]

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Task(enum.StrEnum):
    """What is asked of a model."""

    RETRIEVE = "retrieve"
    """The top-k items of the whole catalogue."""
    RANK = "rank"
    """Scores of given candidates, one for each head of the model."""
    GENERATE = "generate"
    """The same, by semantic ids that are decoded step by step."""

    @property
    def finds_items(self) -> bool:
        """Whether it answers items of the catalogue; otherwise it scores given candidates."""
        return self is not Task.RANK


def _no_ids() -> ItemIds:
    return np.empty(0, np.int64)


def _no_times() -> IntArray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One past behaviour as a row. Convenient for people; `History.of` makes columns of them."""

    item_id: ItemId
    timestamp_ms: int
    signals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """A user's past behaviours as parallel columns, oldest first.

    ``item_ids`` has shape (n,), ``timestamps_ms`` shape (n,) int64, milliseconds since the Unix
    epoch, and each column of ``signals`` shape (n,) float32, NaN where a behaviour lacks it.
    """

    item_ids: ItemIds = field(default_factory=_no_ids)
    timestamps_ms: IntArray = field(default_factory=_no_times)
    signals: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)

    @staticmethod
    def of(behaviours: Sequence[Behaviour]) -> History:
        """Columns from rows; a signal that a row lacks becomes NaN."""
        names = sorted({name for b in behaviours for name in b.signals})
        return History(
            item_ids=item_id_array([b.item_id for b in behaviours]),
            timestamps_ms=np.array([b.timestamp_ms for b in behaviours], np.int64),
            signals={
                name: np.array([b.signals.get(name, np.nan) for b in behaviours], np.float32)
                for name in names
            },
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """Items to rank: ``item_ids`` (c,), and cross features, each a column of shape (c,) float32."""

    item_ids: ItemIds = field(default_factory=_no_ids)
    features: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)


def item_id_array(ids: Sequence[ItemId]) -> ItemIds:
    """Item ids as an array of shape (n,): int64 if all are such integers, else objects of str."""
    if all(type(i) is int for i in ids):
        with suppress(OverflowError):
            return np.array(ids, np.int64)
    return np.array([str(i) for i in ids], object)


@dataclass(frozen=True, slots=True)
class RecommendRequest:
    """What is recommended to whom.

    Without ``candidates`` the answer is retrieved from the catalogue and, where the model has a
    ranker, ranked; with candidates, these are ranked. ``task`` forces one stage alone.
    """

    history: History
    """What the user did; with ``history_handle``, only what is new since the answer it is from."""
    candidates: Candidates | None = None
    k: int = 10
    """How many items to return, at least 1."""
    model: str = ""
    """Name of a model or pipeline; empty means the default one."""
    version: str = ""
    """A version of it that is loaded; empty means the active one."""
    task: Task | None = None
    user_id: str = ""
    user_features: Features = field(default_factory=dict)
    context_features: Features = field(default_factory=dict)
    request_time_ms: int | None = None
    """The time of the request, ms since the Unix epoch; None means now."""
    include_seen: bool = False
    """Whether items of the history may be retrieved again."""
    exclude_item_ids: ItemIds = field(default_factory=_no_ids)
    head_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the heads in the final score of a ranked item; empty means the model's own."""
    request_id: str = ""
    history_handle: bytes = b""
    """Of an earlier answer to the same user by the same models; ``history`` is appended to the
    history that it was computed from. Empty means that ``history`` is all."""
    deadline: float | None = None
    """`time.monotonic()` seconds after which the answer is of no use."""


@dataclass(frozen=True, slots=True)
class RankedItem:
    """One recommended item. A larger score is better."""

    item_id: ItemId
    score: float
    head_scores: Mapping[str, float] = field(default_factory=dict)
    title: str = ""


@dataclass(frozen=True, slots=True)
class StageReport:
    """How one stage of the plan answered."""

    task: Task
    model: str
    version: str
    engine: str
    queue_s: float
    """Seconds waited for a place in a batch."""
    compute_s: float
    """Seconds in the engine."""
    batch_size: int
    tokens: int
    """Tokens that the engine had to consider for this request."""
    tokens_reused: int
    """Tokens of these whose state came from a cache."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer: items, best first, and how they came about."""

    request_id: str
    items: Sequence[RankedItem]
    stages: Sequence[StageReport]
    features_s: float
    """Seconds spent on validation and features."""
    total_s: float
    """Seconds from the request's arrival in the pipeline to its answer."""
    unknown_items: int = 0
    """Behaviours of the history whose item the model does not know; they were left out."""
    unscored_item_ids: Sequence[ItemId] = ()
    """Candidates that the model does not know and therefore could not score."""
    history_handle: bytes = b""
    """For the user's next request, see `RecommendRequest.history_handle`. Empty if the history was
    not stored: there is no ``user_id``, or the server keeps no histories."""
