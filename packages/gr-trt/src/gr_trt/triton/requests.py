"""A request as the JSON that an ensemble takes; for clients, warm-ups and checks."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.types import RecommendRequest


def request_text(request: RecommendRequest) -> bytes:
    """What `gr_core.json_requests.request_of` reads, without what is left at its default."""
    data: dict[str, Any] = {
        "history": {
            "item_ids": request.history.item_ids.tolist(),
            "timestamps_ms": request.history.timestamps_ms.tolist(),
            "signals": _columns(request.history.signals),
        },
        "k": request.k,
        "include_seen": request.include_seen,
        "exclude_item_ids": request.exclude_item_ids.tolist(),
        "user_features": dict(request.user_features),
        "context_features": dict(request.context_features),
        "head_weights": dict(request.head_weights),
        "model": request.model,
        "version": request.version,
        "user_id": request.user_id,
        "request_id": request.request_id,
        "request_time_ms": request.request_time_ms,
        "task": request.task and request.task.value,
        "history_handle": base64.b64encode(request.history_handle).decode(),
    }
    if request.candidates is not None:
        data["candidates"] = {
            "item_ids": request.candidates.item_ids.tolist(),
            "features": _columns(request.candidates.features),
        }
    return json.dumps({k: v for k, v in data.items() if v not in ("", None, [], {})}).encode()


def _columns(columns: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, list[float | None]]:
    """Missing values are null."""
    return {
        name: [None if value != value else value for value in column.tolist()]
        for name, column in columns.items()
    }
