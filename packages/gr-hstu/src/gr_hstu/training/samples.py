"""Sample requests that a bundle brings: real users as they stood before the test period."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gr_core.repository import Catalogue
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.training.batches import catalogue_of
from gr_hstu.training.settings import RANKING

HISTORY = 40
SIGNALS = ("is_clicked", "is_long_view", "is_liked", "watch_percentage")


def sample_requests(data: Interactions, test: Cases, count: int, seed: int = 0) -> str:
    """A JSON list of requests of ``count`` users, as of their first test case.

    Users are drawn among those with at least 20 behaviours, 8 of them with their own time. Ids
    are the dataset's anonymous ones.
    """
    catalogue = catalogue_of(data)
    timed_N = np.ones(len(data), bool) if data.timed_N is None else data.timed_N
    _, first = np.unique(data.user_N[test.row_C], return_index=True)
    cases = test.take(first)
    known = np.concatenate([[0], np.cumsum(timed_N)])
    enough = (cases.end_C - cases.start_C >= 20) & (known[cases.end_C] - known[cases.start_C] >= 8)
    chosen = np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(enough))[:count])
    some = cases.take(chosen)
    requests = [
        request_of_rows(data, catalogue, row, range(max(start, end - HISTORY), end), SIGNALS)
        for row, start, end in zip(some.row_C, some.start_C, some.end_C, strict=True)
    ]
    lines = ",\n".join(json.dumps(request, separators=(",", ":")) for request in requests)
    return f"[\n{lines}\n]\n"


def request_of_rows(
    data: Interactions, catalogue: Catalogue, row: int, history: range, signals: Sequence[str]
) -> dict[str, Any]:
    """The JSON request of the user of a row, at its time, with the rows of a history."""
    rows = slice(history.start, history.stop)
    user = int(data.user_N[row]) - 1
    request: dict[str, Any] = {
        "user_id": data.users.ids[user],
        "request_time_ms": int(data.timestamp_ms_N[row]),
        "history": {
            "item_ids": catalogue.ids_of(data.item_N[rows]).tolist(),
            "timestamps_ms": data.timestamp_ms_N[rows].tolist(),
            "signals": {
                name: [None if np.isnan(v) else round(float(v), 3) for v in column[rows]]
                for name, column in data.signals.items()
                if name in signals
            },
        },
    }
    if columns := RANKING[data.name].user_columns if data.name in RANKING else ():
        request["user_features"] = {n: str(data.users.features[n][user]) for n in columns}
    if data.context:
        request["context_features"] = {n: int(c[row]) for n, c in data.context.items()}
    return request
