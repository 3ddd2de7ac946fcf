"""What is checked of every request, whatever the model: all violations, not only the first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.errors import Violation
from gr_core.types import ItemIds, RecommendRequest

_MAX_INTEGER = 2**63 - 1
_FUTURE_MS = 24 * 3600 * 1000
"""Clocks differ; a time further ahead of ours than this is a mistake."""
_MAX_NAMED = 10
"""Rows named for one kind of violation; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request."""

    max_history: int = 100_000
    max_candidates: int = 10_000
    max_k: int = 1_000
    max_features: int = 256
    """Named user, context, signal or cross features, each."""
    max_text: int = 1_024
    """Characters of an id or a feature's value."""


def violations_of(request: RecommendRequest, limits: Limits) -> list[Violation]:
    """All that is wrong with a request."""
    found: list[Violation] = []
    _check_range(found, "k", request.k, 1, limits.max_k)
    now = time.time_ns() // 1_000_000
    if request.request_time_ms is not None:
        _check_range(found, "request_time_ms", request.request_time_ms, 0, now + _FUTURE_MS)

    history = request.history
    n = len(history)
    if n > limits.max_history:
        found.append(Violation("history", f"{n} behaviours, expected at most {limits.max_history}"))
    _check_ids(found, "history.item_ids", history.item_ids, limits)
    times = history.timestamps_ms
    if len(times) != n:
        found.append(
            Violation(
                "history.timestamps_ms", f"{len(times)} times for {n} item ids, give one each"
            )
        )
    wrong = (times < 0) | (times > now + _FUTURE_MS)
    _name_rows(
        found, "history.timestamps_ms", wrong, times, ", expected ms since 1970, not in the future"
    )
    _check_columns(found, "history.signals", history.signals, n, limits)

    if request.candidates is not None:
        _check_candidates(found, request, limits)
    for field, values in (
        ("user_features", request.user_features),
        ("context_features", request.context_features),
    ):
        _check_count(found, field, len(values), limits.max_features)
        for name, value in values.items():
            if isinstance(value, str) and len(value) > limits.max_text:
                found.append(
                    Violation(
                        f"{field}[{name!r}]",
                        f"{len(value)} characters, expected at most {limits.max_text}",
                    )
                )
            elif isinstance(value, float) and not np.isfinite(value):
                found.append(Violation(f"{field}[{name!r}]", f"{value}, expected a finite number"))
            elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
                found.append(
                    Violation(f"{field}[{name!r}]", f"{value!r:.40}, expected at most 2^63 - 1")
                )
    for name, weight in request.head_weights.items():
        if not np.isfinite(weight):
            found.append(
                Violation(f"head_weights[{name!r}]", f"{weight}, expected a finite number")
            )
    for field, text in (("user_id", request.user_id), ("request_id", request.request_id)):
        if len(text) > limits.max_text:
            found.append(
                Violation(field, f"{len(text)} characters, expected at most {limits.max_text}")
            )
    _check_count(found, "exclude_item_ids", len(request.exclude_item_ids), limits.max_history)
    _check_ids(found, "exclude_item_ids", request.exclude_item_ids, limits)
    return found


def _check_candidates(found: list[Violation], request: RecommendRequest, limits: Limits) -> None:
    assert request.candidates is not None
    ids = request.candidates.item_ids
    if len(ids) > limits.max_candidates:
        _check_count(found, "candidates", len(ids), limits.max_candidates)
        return
    _check_ids(found, "candidates.item_ids", ids, limits)
    first_seen: dict[Any, int] = {}
    for row, item in enumerate(ids.tolist()):
        if first_seen.setdefault(item, row) != row:
            found.append(
                Violation(
                    f"candidates.item_ids[{row}]",
                    f"{item!r} is the same as candidates.item_ids[{first_seen[item]}]; "
                    "give each candidate once",
                )
            )
            if len(found) >= _MAX_NAMED:
                break
    _check_columns(found, "candidates.features", request.candidates.features, len(ids), limits)


def _check_ids(found: list[Violation], field: str, ids: ItemIds, limits: Limits) -> None:
    if ids.dtype.kind in "iu":
        return
    lengths = np.fromiter(map(len, map(str, ids.tolist())), np.int64, len(ids))
    expected = f" characters, expected at most {limits.max_text}"
    _name_rows(found, field, lengths > limits.max_text, lengths, expected)


def _check_columns(
    found: list[Violation],
    field: str,
    columns: Any,
    rows: int,
    limits: Limits,
) -> None:
    """Columns of numbers: as long as the ids, and finite where they are not missing (NaN)."""
    _check_count(found, field, len(columns), limits.max_features)
    for name, column in columns.items():
        path = f"{field}[{name!r}]"
        if len(column) != rows:
            found.append(Violation(path, f"{len(column)} values for {rows} rows, give one each"))
        _name_rows(found, path, np.isinf(column), column, ", expected a finite number")


def _check_count(found: list[Violation], field: str, count: int, most: int) -> None:
    if count > most:
        found.append(Violation(field, f"{count} given, expected at most {most}"))


def _check_range(found: list[Violation], field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        found.append(Violation(field, f"{value}, expected {low} to {high}"))


def _name_rows(
    found: list[Violation],
    field: str,
    wrong: npt.NDArray[np.bool_],
    values: npt.NDArray[Any],
    expected: str,
) -> None:
    # Unlike numpy's functions around it, the method costs next to nothing.
    (rows,) = wrong.nonzero()
    for row in rows[:_MAX_NAMED].tolist():
        found.append(Violation(f"{field}[{row}]", f"{values[row]}{expected}"))
    if len(rows) > _MAX_NAMED:
        found.append(Violation(field, f"{len(rows)} rows like these{expected}"))
