"""How long the histories of a model are: what shapes are compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gr_core.contracts import EncodedRequest, Model
from gr_core.samples import for_task, sample_requests
from gr_core.steps import CANDIDATE, PAST, TOKEN
from gr_core.types import Candidates, History, RecommendRequest, Task
from gr_trt.ensemble import Lengths

SAMPLES = 32
_NOW_MS = 1_700_000_000_000
_LONG = 1 << 16
"""Behaviours more than any model takes."""


def examples(model: Model, task: Task) -> Sequence[EncodedRequest]:
    """Requests of very different lengths, one of several behaviours first."""
    requests = [
        model.encode(for_task(request, task), task).request
        for request in sample_requests(model, SAMPLES, max_history=_LONG)
    ]
    by_length = sorted(requests, key=_history)
    middle = next((r for r in by_length[len(by_length) // 2 :] if _history(r) > 1), by_length[-1])
    return [middle, by_length[0], by_length[-1], made_up(model, task, 0), made_up(model, task, 3)]


def made_up(model: Model, task: Task, behaviours: int, candidates: int = 5) -> EncodedRequest:
    """A request of random items."""
    rng = np.random.default_rng(behaviours)
    size = len(model.catalogue)
    items = model.catalogue.ids_of(rng.integers(1, size + 1, behaviours))
    times_ms = _NOW_MS - 60_000 * np.arange(behaviours, 0, -1, dtype=np.int64)
    wanted = rng.choice(size, min(candidates, size), replace=False) + 1
    request = RecommendRequest(
        History(items, times_ms),
        candidates=Candidates(model.catalogue.ids_of(wanted)),
        request_time_ms=_NOW_MS,
    )
    return model.encode(for_task(request, task), task).request


def lengths(model: Model, tasks: Sequence[Task], max_candidates: int) -> Mapping[str, Lengths]:
    """By axis. Tokens are what a prefill or decode takes, past what a decode finds cached."""
    task = Task.RANK if Task.RANK in tasks else tasks[0]
    samples = sample_requests(model, SAMPLES, max_history=_LONG)
    requests = [model.encode(for_task(request, task), task).request for request in samples]
    longest = made_up(model, task, _LONG)
    behaviours = [_history(request) for request in requests]
    history = Lengths(1, max(1, int(np.median(behaviours))), max(1, _history(longest)))
    prefix = longest.tokens - _history(longest) - _candidates(longest)
    tokens = Lengths(1, history.typical + prefix, history.maximum + prefix)
    found = {"history": history, TOKEN: tokens, PAST: tokens}
    if task is Task.RANK:
        candidates = max(1, int(np.median([_candidates(request) for request in requests])))
        found[CANDIDATE] = Lengths(1, min(candidates, max_candidates), max_candidates)
    return found


def _history(request: EncodedRequest) -> int:
    return len(request.arrays["history_items"])


def _candidates(request: EncodedRequest) -> int:
    items = request.arrays.get("candidate_items")
    return 0 if items is None else len(items)
