"""Requests with known outcomes, and how well an engine's results foresee them.

A bundle may bring `EVALUATION`: a request a line, see `gr_core.json_requests.request_of`, each with
``"relevant"``, a list of the item ids that should have been retrieved, or ``"labels"``, by head a
list of 0, 1 or null (not known) for each candidate. So whatever makes an engine less precise can
be judged by what it does to quality. Shapes: C candidates, O heads, N all candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import EncodedRequest, InferenceResult, Model
from gr_core.errors import InvalidRequest, NotFound, Violation
from gr_core.json_requests import request_of
from gr_core.samples import for_task
from gr_core.types import FloatArray, IntArray, ItemIds, RecommendRequest, Task, item_id_array

EVALUATION = "evaluation.jsonl"
"""A file that a bundle may bring."""
K = 10

_NOW_MS = 1_700_000_000_000
_MAX_BYTES = 256 * 2**20
_MAX_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class LabelledRequest:
    """A request and what came of it."""

    request: RecommendRequest
    relevant: ItemIds = field(default_factory=lambda: np.empty(0, np.int64))
    """Item ids, those that should be found."""
    labels: Mapping[str, FloatArray] = field(default_factory=dict)
    """By head, (candidates,) float32: 0, 1, or NaN where it is not known."""


def read_labelled(path: Path) -> Sequence[LabelledRequest]:
    """Raises `InvalidRequest` that names the line and the field, `NotFound` without the file."""
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise _wrong(str(path), f"{size} bytes, expected at most {_MAX_BYTES}")
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise NotFound(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _wrong(str(path), f"is not UTF-8: {error}") from None
    if len(lines) > _MAX_REQUESTS:
        raise _wrong(str(path), f"{len(lines)} lines, expected at most {_MAX_REQUESTS}")
    return [
        _labelled(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]


def labelled_requests(model: Model) -> Sequence[LabelledRequest]:
    """Those that the model's bundle brings; none if it brings no such file."""
    path = model.bundle.path / EVALUATION
    return read_labelled(path) if path.is_file() else []


def _labelled(line: str, where: str) -> LabelledRequest:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _wrong(where, f"{data!r:.60}, expected an object")
    relevant = data.pop("relevant", [])
    if not isinstance(relevant, list) or not all(type(i) in (int, str) for i in relevant):
        raise _wrong(f"{where}.relevant", f"{relevant!r:.60}, expected a list of item ids")
    labels = data.pop("labels", {})
    if not isinstance(labels, dict):
        raise _wrong(f"{where}.labels", f"{labels!r:.60}, expected an object of lists by head")
    request = request_of(data, where)
    count = len(request.candidates or ())
    columns = {
        head: _column(values, count, f"{where}.labels.{head}") for head, values in labels.items()
    }
    if not relevant and not columns:
        raise _wrong(where, "has neither relevant items nor labels; add one of them")
    return LabelledRequest(request, item_id_array(relevant), columns)


def _column(values: Any, count: int, where: str) -> FloatArray:
    if not isinstance(values, list) or len(values) != count:
        raise _wrong(where, f"{values!r:.60}, expected a list of {count}, one a candidate")
    for value in values:
        if value is not None and (type(value) not in (int, float) or value not in (0, 1)):
            raise _wrong(where, f"{value!r:.60}, expected 0, 1 or null")
    return np.array([np.nan if v is None else v for v in values], np.float32)


def _wrong(where: str, message: str) -> InvalidRequest:
    return InvalidRequest([Violation(where, message)])


# ── Quality ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Case:
    """A labelled request as an engine gets it."""

    request: EncodedRequest
    """Where items are to be found, its ``k`` reaches beyond what may not be answered."""
    excluded: IntArray
    """Catalogue indices that may not be answered: what the user has seen, unless asked for."""
    relevant: IntArray
    """Catalogue indices; 0 for an item that the model does not know and so cannot find."""
    labels_CO: FloatArray
    """In the order of the engine's scores, NaN where unknown."""

    def top(self, result: InferenceResult, k: int = K) -> IntArray:
        """The best ``k`` catalogue indices that may be answered, best first."""
        assert result.indices is not None
        return result.indices[~np.isin(result.indices, self.excluded)][:k]


def cases(
    model: Model,
    task: Task,
    requests: Sequence[LabelledRequest],
    k: int = K,
    *,
    unlabelled: bool = False,
) -> Sequence[Case]:
    """Requests that say something of the task, or all of them if ``unlabelled``, encoded."""
    finds = task.finds_items
    return [
        _finding_case(model, task, labelled, k) if finds else _ranking_case(model, labelled)
        for labelled in requests
        if unlabelled or (len(labelled.relevant) if finds else labelled.labels)
    ]


def quality(
    task: Task, cases: Sequence[Case], results: Sequence[InferenceResult], heads: Sequence[str]
) -> Mapping[str, float]:
    """Metrics by name, larger is better; without cases, none.

    Of found items: ``ndcg@10`` and ``hr@10``, the mean over cases. Ranking: ``auc:HEAD`` over all
    candidates, and ``gauc:HEAD``, the AUC within each user who shows both outcomes, weighted by
    candidates (Zhu et al., 2017); those that no candidate decides are left out.
    """
    if not cases:
        return {}
    if task.finds_items:
        pairs = [(case, case.top(result)) for case, result in zip(cases, results, strict=True)]
        return {
            f"ndcg@{K}": float(np.mean([_ndcg(case, top) for case, top in pairs])),
            f"hr@{K}": float(np.mean([np.isin(case.relevant, top).any() for case, top in pairs])),
        }
    scores_NO = np.concatenate([result.scores for result in results])
    labels_NO = np.concatenate([case.labels_CO for case in cases])
    user_N = np.repeat(_users(cases), [len(case.labels_CO) for case in cases])
    found = {}
    for column, head in enumerate(heads):
        known_N = np.isfinite(labels_NO[:, column])
        label, score = labels_NO[known_N, column] > 0, scores_NO[known_N, column]
        found[f"auc:{head}"] = auc(label, score)
        found[f"gauc:{head}"] = gauc(label, score, user_N[known_N])
    return {name: value for name, value in found.items() if not np.isnan(value)}


def auc(label_N: npt.NDArray[np.bool_], score_N: FloatArray) -> float:
    """Part of the pairs of both outcomes that are in order, ties counted half; NaN without any."""
    positives = int(label_N.sum())
    pairs = positives * (len(label_N) - positives)
    if not pairs:
        return float("nan")
    _, group_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    # Mean rank of each group of equal scores, counted from 1.
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[group_N][label_N].sum() - positives * (positives + 1) / 2) / pairs)


def gauc(label_N: npt.NDArray[np.bool_], score_N: FloatArray, user_N: IntArray) -> float:
    """AUC within users, weighted by their candidates; NaN where no user shows both outcomes."""
    total = weight = 0.0
    for user in np.unique(user_N):
        own = user_N == user
        value = auc(label_N[own], score_N[own])
        if not np.isnan(value):
            total, weight = total + value * own.sum(), weight + own.sum()
    return float(total / weight) if weight else float("nan")


def _ndcg(case: Case, top: IntArray) -> float:
    discount = 1 / np.log2(np.arange(2, K + 2))
    gained = discount[: len(top)][np.isin(top, case.relevant)].sum()
    return float(gained / discount[: len(case.relevant)].sum())


def _users(cases: Sequence[Case]) -> IntArray:
    """A number for each case's user; requests without an id are users of their own."""
    names = [case.request.user_id or f"\0{i}" for i, case in enumerate(cases)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _finding_case(model: Model, task: Task, labelled: LabelledRequest, k: int) -> Case:
    request = _asked(labelled, task)
    seen = request.history.item_ids[:0] if request.include_seen else request.history.item_ids
    excluded = np.unique(
        np.concatenate(
            [model.catalogue.indices_of(request.exclude_item_ids), model.catalogue.indices_of(seen)]
        )
    )
    excluded = excluded[excluded > 0]
    encoded = model.encode(request, task).request
    fetched = min(len(model.catalogue), k + len(excluded))
    relevant = model.catalogue.indices_of(labelled.relevant)
    return Case(
        request=replace(encoded, k=fetched),
        excluded=excluded,
        relevant=relevant,
        labels_CO=np.empty((0, 0), np.float32),
    )


def _ranking_case(model: Model, labelled: LabelledRequest) -> Case:
    request = _asked(labelled, Task.RANK)
    encoding = model.encode(request, Task.RANK)
    unknown = np.full(len(request.candidates or ()), np.nan, np.float32)
    labels_CO = np.stack([labelled.labels.get(head, unknown) for head in model.heads], axis=1)
    return Case(
        request=encoding.request,
        excluded=np.empty(0, np.int64),
        relevant=np.empty(0, np.int64),
        labels_CO=labels_CO[~encoding.unscored],
    )


def _asked(labelled: LabelledRequest, task: Task) -> RecommendRequest:
    request = for_task(labelled.request, task)
    return replace(request, request_time_ms=request.request_time_ms or _NOW_MS)
