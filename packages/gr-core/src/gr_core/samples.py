"""Requests to try a model with: those that its bundle brings, or made up from its catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gr_core.contracts import Model
from gr_core.json_requests import read_requests
from gr_core.types import Candidates, History, RecommendRequest, Task

SAMPLES = "samples.json"
"""A file that a bundle may bring: a list of requests, see `gr_core.json_requests.request_of`."""

_NOW_MS = 1_700_000_000_000
"""When samples ask, unless they say when: fixed, so that the same samples score the same."""
_DAY_MS = 86_400_000


def sample_requests(
    model: Model,
    count: int,
    *,
    seed: int = 0,
    max_history: int = 256,
    candidates: int = 50,
    made_up: bool = False,
) -> Sequence[RecommendRequest]:
    """``count`` requests that a model can encode, the same ones for the same seed.

    They are the bundle's samples, repeated as needed; without any, or with ``made_up``, histories
    of random items whose lengths reach from none to ``max_history``. Those without candidates get
    random ones.
    """
    file = model.bundle.path / SAMPLES
    rng = np.random.default_rng(seed)
    brought = read_requests(file) if file.is_file() and not made_up else []
    requests = [
        brought[i % len(brought)] if brought else _made_up(model, rng, i, max_history)
        for i in range(count)
    ]
    return [
        replace(
            request,
            model="",
            version="",
            request_id=f"sample-{i}",
            request_time_ms=request.request_time_ms or _NOW_MS,
            candidates=request.candidates or _any_items(model, rng, candidates),
        )
        for i, request in enumerate(requests)
    ]


def for_task(request: RecommendRequest, task: Task) -> RecommendRequest:
    """The request for one stage alone; what finds items takes no candidates."""
    return replace(request, task=task, candidates=None if task.finds_items else request.candidates)


def _made_up(
    model: Model, rng: np.random.Generator, index: int, max_history: int
) -> RecommendRequest:
    # The first few are the shortest and the longest, because these are where engines differ.
    edges = [0, 1, max_history]
    length = edges[index] if index < len(edges) else int(rng.integers(1, max_history + 1))
    items = rng.integers(1, len(model.catalogue) + 1, length)
    ages = np.sort(rng.integers(1, 90 * _DAY_MS, length))[::-1]
    history = History(model.catalogue.ids_of(items), _NOW_MS - ages)
    return RecommendRequest(history, user_id=f"sample-user-{index}")


def _any_items(model: Model, rng: np.random.Generator, count: int) -> Candidates:
    items = len(model.catalogue)
    chosen = rng.choice(items, size=min(count, items), replace=False) + 1
    return Candidates(model.catalogue.ids_of(chosen))
