"""Sample requests that a graph takes, to warm up and to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gr_core.contracts import Model
from gr_core.errors import InvalidRequest, PlanError
from gr_core.samples import for_task, sample_requests
from gr_core.types import Candidates, History, RecommendRequest, Task
from gr_trt.triton.features import Features, Row
from gr_trt.triton.requests import request_text


def sample_rows(
    features: Features, model: Model, task: Task, longest: Mapping[str, int], count: int
) -> Sequence[tuple[bytes, Row]]:
    """``count`` requests at most, cut to what the graph takes, as JSON and as rows.

    Raises `PlanError` where none of them can be cut to it.
    """
    found = []
    refused = ""
    for request in sample_requests(model, count):
        text = request_text(for_task(_cut(request, longest), task))
        try:
            found.append((text, features.row(text)))
        except InvalidRequest as error:
            refused = str(error)
    if not found:
        raise PlanError(f"{model.bundle.name}: the graph takes none of its samples: {refused}")
    return found


def _cut(request: RecommendRequest, longest: Mapping[str, int]) -> RecommendRequest:
    """The newest behaviours and the first candidates, as many as the graph takes."""
    history, candidates = request.history, request.candidates
    if (most := longest.get("history", len(history))) < len(history):
        history = History(
            history.item_ids[-most:],
            history.timestamps_ms[-most:],
            {name: column[-most:] for name, column in history.signals.items()},
        )
    if candidates is not None and (most := longest.get("candidate", len(candidates))):
        candidates = Candidates(
            candidates.item_ids[:most],
            {name: column[:most] for name, column in candidates.features.items()},
        )
    return replace(request, history=history, candidates=candidates)
