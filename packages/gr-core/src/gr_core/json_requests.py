"""Requests and answers as JSON: for files of sample requests, and for commands."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gr_core.errors import InvalidRequest, NotFound, Violation
from gr_core.types import (
    Behaviour,
    Candidates,
    FloatArray,
    History,
    ItemIds,
    Recommendation,
    RecommendRequest,
    Task,
    item_id_array,
)

_FIELDS = {f.name for f in fields(RecommendRequest)} - {"deadline"}


def read_requests(path: Path) -> Sequence[RecommendRequest]:
    """Requests of a file: one JSON object, or a list of them. Raises `InvalidRequest`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequest([Violation(str(path), f"is not JSON: {error}")]) from None
    rows = data if isinstance(data, list) else [data]
    return [request_of(row, where=f"{path}[{i}]") for i, row in enumerate(rows)]


def request_of(data: Any, where: str = "request") -> RecommendRequest:
    """A request from its JSON object, whose keys are the fields of `RecommendRequest`.

    ``history`` is a list of ``{"item_id", "timestamp_ms", "signals": {}}`` or the columns
    ``{"item_ids": [], "timestamps_ms": [], "signals": {name: []}}``; ``candidates`` a list of item
    ids or ``{"item_ids": [], "features": {name: []}}``; ``history_handle`` is in base64. Raises
    `InvalidRequest` that names all fields which are wrong.
    """
    if not isinstance(data, dict):
        raise InvalidRequest([Violation(where, f"{data!r:.60}, expected an object")])
    violations = [
        Violation(f"{where}.{key}", f"unknown; there are: {', '.join(sorted(_FIELDS))}")
        for key in data
        if key not in _FIELDS
    ]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in _FIELDS:
            continue
        try:
            values[key] = _CONVERT[key](value)
        except InvalidRequest as error:
            violations += [Violation(f"{where}.{v.field}", v.message) for v in error.violations]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            violations.append(Violation(f"{where}.{key}", _explained(value, error)))
    if violations:
        raise InvalidRequest(violations)
    return RecommendRequest(**{"history": History(), **values})


def _explained(value: Any, error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else f"{value!r:.60}: {error}"


def answer_as_dict(answer: Recommendation) -> dict[str, Any]:
    """An answer for JSON; times in milliseconds, the history's handle in base64."""
    return {
        "request_id": answer.request_id,
        "items": [
            {
                "item_id": item.item_id,
                "title": item.title,
                "score": item.score,
                "head_scores": dict(item.head_scores),
            }
            for item in answer.items
        ],
        "stages": [
            {
                "task": stage.task.value,
                "model": stage.model,
                "version": stage.version,
                "engine": stage.engine,
                "queue_ms": stage.queue_s * 1e3,
                "compute_ms": stage.compute_s * 1e3,
                "batch_size": stage.batch_size,
                "tokens": stage.tokens,
                "tokens_reused": stage.tokens_reused,
            }
            for stage in answer.stages
        ],
        "features_ms": answer.features_s * 1e3,
        "total_ms": answer.total_s * 1e3,
        "unknown_items": answer.unknown_items,
        "unscored_item_ids": list(answer.unscored_item_ids),
        "history_handle": base64.b64encode(answer.history_handle).decode(),
    }


# ── Fields ────────────────────────────────────────────────────────────────────────────────────


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("expected an integer")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError("expected true or false")
    return value


def _base64(value: Any) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except ValueError:
        raise TypeError("expected base64") from None


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    return value


def _weights(value: Any) -> Mapping[str, float]:
    weights = _table(value)
    if any(type(weight) not in (int, float) for weight in weights.values()):
        raise TypeError("expected numbers by head")
    return {name: float(weight) for name, weight in weights.items()}


def _item_ids(value: Any) -> ItemIds:
    if not isinstance(value, list) or not all(type(i) in (int, str) for i in value):
        raise TypeError("expected a list of item ids, integers or text")
    return item_id_array(value)


def _floats(value: Any) -> FloatArray:
    """A column; null is a missing value."""
    return np.array([np.nan if v is None else v for v in value], np.float32)


def _columns(value: Any) -> Mapping[str, FloatArray]:
    return {name: _floats(column) for name, column in _table(value).items()}


def _history(value: Any) -> History:
    if isinstance(value, list):
        return _history_of_rows(value)
    columns = _table(value)
    return History(
        item_ids=_item_ids(columns["item_ids"]),
        timestamps_ms=np.array([_whole(t) for t in columns["timestamps_ms"]], np.int64),
        signals=_columns(columns.get("signals", {})),
    )


def _history_of_rows(values: Sequence[Any]) -> History:
    rows, violations = [], []
    for index, value in enumerate(values):
        try:
            row = _table(value)
            (item,) = _item_ids([row["item_id"]]).tolist()
            signals = {name: float(v) for name, v in _table(row.get("signals", {})).items()}
            rows.append(Behaviour(item, _whole(row["timestamp_ms"]), signals))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            violations.append(Violation(f"history[{index}]", _explained(value, error)))
    if violations:
        raise InvalidRequest(violations)
    return History.of(rows)


def _candidates(value: Any) -> Candidates | None:
    if value is None:
        return None
    if isinstance(value, list):
        return Candidates(_item_ids(value))
    columns = _table(value)
    return Candidates(_item_ids(columns["item_ids"]), _columns(columns.get("features", {})))


_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "history": _history,
    "candidates": _candidates,
    "k": _whole,
    "model": _text,
    "version": _text,
    "task": lambda value: None if value is None else Task(value),
    "user_id": _text,
    "user_features": _table,
    "context_features": _table,
    "request_time_ms": lambda value: None if value is None else _whole(value),
    "include_seen": _flag,
    "exclude_item_ids": _item_ids,
    "head_weights": _weights,
    "request_id": _text,
    "history_handle": _base64,
}
