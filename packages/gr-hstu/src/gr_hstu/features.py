"""Features: from a history with its signals to the integer arrays that the models take.

The same code runs in training and in serving. Every feature becomes a bucket id: 0 where the value
is missing or unknown, 1.. otherwise; the model has one embedding row for each id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.errors import BundleError
from gr_core.repository import Catalogue
from gr_core.types import Candidates, FeatureValue, History, IntArray

KINDS = ("binary", "bucket", "categorical")


@dataclass(frozen=True, slots=True)
class Feature:
    """How one value becomes a bucket id.

    ``binary``: 1 for zero, 2 otherwise. ``bucket``: 1 + the number of ``boundaries`` not above the
    value, compared in float32, which is what requests carry. ``categorical``: 1 + the place of the
    value in ``values``, compared as text, so that 3 and "3" are the same.
    """

    name: str
    kind: str
    boundaries: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BundleError(f"feature {self.name!r}: kind {self.kind!r}, expected one of {KINDS}")
        if self.kind == "bucket" and (
            not self.boundaries or list(self.boundaries) != sorted(set(self.boundaries))
        ):
            raise BundleError(f"feature {self.name!r}: boundaries must be given, ascending")
        if self.kind == "categorical" and len(set(self.values)) != len(self.values):
            raise BundleError(f"feature {self.name!r}: a value occurs twice")

    @property
    def cardinality(self) -> int:
        """Number of bucket ids, 0 for missing among them."""
        if self.kind == "binary":
            return 3
        return len(self.boundaries) + 2 if self.kind == "bucket" else len(self.values) + 1

    def encode(self, column: npt.NDArray[Any]) -> IntArray:
        """Bucket ids of numbers, shape (n,) -> (n,) int64; NaN is missing."""
        known = ~np.isnan(column)
        if self.kind == "binary":
            ids = np.where(column != 0, 2, 1)
        elif self.kind == "bucket":
            boundaries = np.asarray(self.boundaries, np.float32)
            ids = np.searchsorted(boundaries, column.astype(np.float32), side="right") + 1
        else:
            different, place = np.unique(column, return_inverse=True)
            codes = [self.encode_value(value) for value in different.tolist()]
            ids = np.array(codes, np.int64)[place]
        return np.where(known, ids, 0)

    def encode_value(self, value: FeatureValue | None) -> int:
        """Bucket id of one value; 0 for None, NaN, or what the feature does not know."""
        if self.kind == "categorical":
            if isinstance(value, float):
                if math.isnan(value):
                    return 0
                value = int(value) if value.is_integer() else value
            try:
                return self.values.index(str(value)) + 1
            except ValueError:
                return 0
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return 0
        return int(self.encode(np.array([number]))[0])


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """What a model reads of a request, and how much history it keeps."""

    signals: tuple[Feature, ...] = ()
    """Of each behaviour, e.g. watch_percentage, is_liked."""
    user: tuple[Feature, ...] = ()
    context: tuple[Feature, ...] = ()
    candidate: tuple[Feature, ...] = ()
    """Cross features that come with each candidate."""
    max_history: int = 512
    """Behaviours kept, the newest."""
    truncate_step: int = 64
    """A longer history loses its oldest in multiples of this, so that between two steps it only
    grows at its end and the state of its prefix stays reusable."""
    realtime_window_s: int = 0
    """Behaviours within so many seconds before the request form the real-time group."""
    max_realtime: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.truncate_step <= self.max_history:
            raise BundleError(
                f"features: truncate_step: {self.truncate_step}, expected 1 to max_history "
                f"({self.max_history})"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FeatureSchema:
        """Raises `BundleError` for an unknown or malformed field."""
        try:
            groups: dict[str, Any] = {
                group: tuple(
                    Feature(
                        name=f["name"],
                        kind=f["kind"],
                        boundaries=tuple(f.get("boundaries", ())),
                        values=tuple(map(str, f.get("values", ()))),
                    )
                    for f in data.get(group, ())
                )
                for group in ("signals", "user", "context", "candidate")
            }
            rest = {key: value for key, value in data.items() if key not in groups}
            return FeatureSchema(**groups, **rest)
        except (KeyError, TypeError) as error:
            raise BundleError(f"features: {error}") from error

    def history(self, history: History, catalogue: Catalogue) -> tuple[History, IntArray, int]:
        """The behaviours that the model reads: known items, by time, the newest `max_history`.

        Returns the history, its catalogue indices (n,), and how many were left out as unknown.
        Equal times keep their order.
        """
        indices = catalogue.indices_of(history.item_ids)
        times = history.timestamps_ms
        keep: npt.NDArray[np.int64] | None = None
        known = indices > 0
        unknown = len(indices) - int(np.count_nonzero(known))
        if unknown:
            keep = np.flatnonzero(known)
            times = times[keep]
        if len(times) > 1 and bool(np.any(times[1:] < times[:-1])):
            order = np.argsort(times, kind="stable")
            keep = order if keep is None else keep[order]
        count = len(history) if keep is None else len(keep)
        start = 0
        if count > self.max_history:
            steps = -(-(count - self.max_history) // self.truncate_step)
            start = steps * self.truncate_step
        if keep is None and start == 0:
            return history, indices, unknown
        rows: Any = slice(start, None) if keep is None else keep[start:]
        read = {f.name for f in self.signals}
        return (
            History(
                item_ids=history.item_ids[rows],
                timestamps_ms=history.timestamps_ms[rows],
                signals={n: c[rows] for n, c in history.signals.items() if n in read},
            ),
            indices[rows],
            unknown,
        )

    def history_arrays(
        self, history: History, indices: IntArray, request_time_ms: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Model inputs of a history that `history` returned; times in whole seconds."""
        n = len(history)
        signals = np.zeros((n, len(self.signals)), np.int64)
        for i, feature in enumerate(self.signals):
            column = history.signals.get(feature.name)
            if column is not None:
                signals[:, i] = feature.encode(column)
        since = request_time_ms - self.realtime_window_s * 1000
        recent = n - int(np.searchsorted(history.timestamps_ms, since, side="left"))
        realtime = min(recent, self.max_realtime, n) if self.realtime_window_s else 0
        return {
            "history_items": indices,
            "history_timestamps": history.timestamps_ms // 1000,
            "history_signals": signals,
            "history_lengths": np.array(n, np.int64),
            "realtime_counts": np.array(realtime, np.int64),
            "request_time": np.array(request_time_ms // 1000, np.int64),
        }

    def candidate_arrays(
        self, candidates: Candidates, known: npt.NDArray[np.bool_], indices: IntArray
    ) -> dict[str, npt.NDArray[Any]]:
        """Model inputs of the known candidates, whose catalogue indices are given."""
        cross = np.zeros((len(indices), len(self.candidate)), np.int64)
        for i, feature in enumerate(self.candidate):
            column = candidates.features.get(feature.name)
            if column is not None:
                cross[:, i] = feature.encode(column[known])
        return {
            "candidate_items": indices,
            "candidate_features": cross,
            "candidate_counts": np.array(len(indices), np.int64),
        }

    def user_array(self, values: Mapping[str, FeatureValue]) -> IntArray:
        return _encode_values(self.user, values)

    def context_array(self, values: Mapping[str, FeatureValue]) -> IntArray:
        return _encode_values(self.context, values)


def _encode_values(features: Sequence[Feature], values: Mapping[str, FeatureValue]) -> IntArray:
    return np.array([f.encode_value(values.get(f.name)) for f in features], np.int64)
