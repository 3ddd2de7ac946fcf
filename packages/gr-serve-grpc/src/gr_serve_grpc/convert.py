"""Between the messages of gr.v1 and the vocabulary of gr-core, both ways.

Here is checked only what the vocabulary cannot express, such as a missing id or a NaN where a value
should be; the pipeline checks the rest, and both kinds of violations are reported together. They
name fields as columns are named, in whichever form a history came (see History in types.proto).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gr_core.errors import InvalidRequest, Violation
from gr_core.pipeline import ServedModel, ServedVersion
from gr_core.types import (
    Candidates,
    Features,
    FeatureValue,
    FloatArray,
    History,
    ItemId,
    ItemIds,
    RankedItem,
    Recommendation,
    RecommendRequest,
    StageReport,
    Task,
    item_id_array,
)
from gr_core.validation import Limits, violations_of
from gr_serve_grpc import columns
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import types_pb2 as types_pb

DEFAULT_K = 10
ROWS_NAMED = 10
"""Wrong rows of one column that are named; the rest is counted."""
MAX_CELLS = 1 << 22
"""Rows times names of signals of a history in rows. Signals that few rows have take little of a
message, but a column of memory each."""

TASKS: Mapping[int, Task | None] = {
    types_pb.TASK_UNSPECIFIED: None,
    types_pb.TASK_RETRIEVE: Task.RETRIEVE,
    types_pb.TASK_RANK: Task.RANK,
    types_pb.TASK_GENERATE: Task.GENERATE,
}
TASK_NUMBERS: Mapping[Task | None, Any] = {task: number for number, task in TASKS.items()}


# ── Messages to requests ─────────────────────────────────────────────────────────────────────────


def request_from_message(
    message: pb.RecommendRequest,
    limits: Limits,
    *,
    request_id: str = "",
    deadline: float | None = None,
    arrived_ms: int | None = None,
) -> RecommendRequest:
    """The request, with columns that view the message's bytes (read-only).

    ``arrived_ms`` is the time of a request that names none.

    Raises `InvalidRequest` if the message cannot be expressed, with all its violations, those of
    `violations_of` too.
    """
    wrong: list[Violation] = []
    if message.task not in TASKS:
        wrong.append(Violation("task", f"{message.task}, expected 0 to {max(TASKS)}"))
    request = RecommendRequest(
        history=_history(message.history, limits, wrong)
        if message.HasField("history")
        else History(),
        candidates=_candidates(message.candidates, wrong)
        if message.HasField("candidates")
        else None,
        k=message.k if message.HasField("k") else DEFAULT_K,
        model=message.model,
        version=message.version,
        task=TASKS.get(message.task),
        user_id=message.user_id,
        user_features=_features("user_features", message.user_features, wrong),
        context_features=_features("context_features", message.context_features, wrong),
        request_time_ms=message.request_time_ms
        if message.HasField("request_time_ms")
        else arrived_ms,
        include_seen=message.include_seen,
        exclude_item_ids=_item_ids(message.exclude_item_ids)
        if message.HasField("exclude_item_ids")
        else _NO_IDS,
        head_weights=dict(message.head_weights) if message.head_weights else {},
        request_id=request_id,
        history_handle=message.history_handle,
        deadline=deadline,
    )
    if wrong:
        raise InvalidRequest([*wrong, *violations_of(request, limits)])
    return request


_NO_IDS: ItemIds = np.empty(0, np.int64)
_NO_IDS.flags.writeable = False


def _history(message: types_pb.History, limits: Limits, wrong: list[Violation]) -> History:
    form = message.WhichOneof("form")
    if form == "columns":
        behaviours = message.columns
        return History(
            _item_ids(behaviours.item_ids),
            columns.integers(behaviours.timestamps_ms),
            _float_columns("history.signals", behaviours.signals, wrong),
        )
    if form == "rows":
        return _from_rows(message.rows.behaviours, limits, wrong)
    return History()


def _from_rows(
    rows: Sequence[types_pb.Behaviour], limits: Limits, wrong: list[Violation]
) -> History:
    n = len(rows)
    if n > limits.max_history:
        # Said before the costly loop over rows, and as violations_of says it.
        wrong.append(Violation("history", f"{n} behaviours, expected at most {limits.max_history}"))
        return History()
    kinds = [row.item_id.WhichOneof("id") for row in rows]
    item_ids: ItemIds
    if "text" in kinds:
        expected = "text"
        item_ids = np.empty(n, object)
        item_ids[:] = [row.item_id.text for row in rows]
    else:
        expected = "integer"
        item_ids = np.array([row.item_id.integer for row in rows], np.int64)
    if kinds.count(expected) != n:
        bad = [i for i, kind in enumerate(kinds) if kind != expected]
        found = [kinds[i] or "no id" for i in bad]
        _name_rows("history.item_ids", bad, found, f"expected an {expected} as elsewhere", wrong)
    signals: dict[str, list[float]] = {}
    nans: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_row = row.signals
        for name in of_row:  # twice as quick as its items
            value = of_row[name]
            if name not in signals:
                most = min(limits.max_features, MAX_CELLS // n)
                if len(signals) == most:
                    problem = f"more than {most} names, expected fewer for {n} rows"
                    wrong.append(Violation("history.signals", problem))
                    return History()
                signals[name] = [np.nan] * n
            signals[name][i] = value
            if value != value:
                nans.setdefault(name, []).append(i)
    for name, bad in nans.items():
        _name_nans(f"history.signals[{name!r}]", bad, wrong)
    return History(
        item_ids,
        np.array([row.timestamp_ms for row in rows], np.int64),
        {name: np.array(column, np.float32) for name, column in signals.items()},
    )


def _item_ids(message: types_pb.ItemIds) -> ItemIds:
    kind = message.WhichOneof("ids")
    if kind == "integers":
        return columns.integers(message.integers)
    if kind == "texts":
        return columns.texts(message.texts)
    return _NO_IDS


def _float_columns(
    field: str, message: Mapping[str, types_pb.FloatColumn], wrong: list[Violation]
) -> Mapping[str, FloatArray]:
    found: dict[str, FloatArray] = {}
    for name, column in message.items():
        values = columns.floats(column)
        if (nans := np.isnan(values)).any():
            _name_nans(f"{field}[{name!r}]", np.flatnonzero(nans).tolist(), wrong)
        if column.missing:
            missing = np.array(column.missing, np.uint32)
            if missing.max() >= len(values):
                wrong.append(
                    Violation(
                        f"{field}[{name!r}].missing",
                        f"{missing.max()}, expected indices less than {len(values)}",
                    )
                )
                continue
            values = values.copy()
            values[missing] = np.nan
        found[name] = values
    return found


def _candidates(message: types_pb.Candidates, wrong: list[Violation]) -> Candidates:
    item_ids = _item_ids(message.item_ids)
    if not len(item_ids):
        wrong.append(
            Violation(
                "candidates.item_ids",
                "empty; give at least one item, or leave out candidates to retrieve items",
            )
        )
    return Candidates(item_ids, _float_columns("candidates.features", message.features, wrong))


def _features(
    field: str, message: Mapping[str, types_pb.FeatureValue], wrong: list[Violation]
) -> Features:
    if not message:
        return {}
    found: dict[str, FeatureValue] = {}
    for name, value in message.items():
        kind = value.WhichOneof("value")
        if kind is None:
            wrong.append(
                Violation(f"{field}[{name!r}]", "no value; expected an integer, a number or a text")
            )
        else:
            found[name] = getattr(value, kind)
    return found


def _name_nans(field: str, rows: Sequence[int], wrong: list[Violation]) -> None:
    expected = "expected a finite number, or the row to be missing"
    _name_rows(field, rows, ["NaN"] * len(rows), expected, wrong)


def _name_rows(
    field: str,
    rows: Sequence[int],
    found: Sequence[str],
    expected: str,
    wrong: list[Violation],
) -> None:
    for row, value in zip(rows[:ROWS_NAMED], found, strict=False):
        wrong.append(Violation(f"{field}[{row}]", f"{value}, {expected}"))
    if len(rows) > ROWS_NAMED:
        wrong.append(Violation(field, f"{len(rows)} rows like these, {expected}"))


# ── Requests to messages ─────────────────────────────────────────────────────────────────────────


def message_from_request(request: RecommendRequest) -> pb.RecommendRequest:
    """The request as a message with columns. Its deadline travels with the call instead."""
    message = pb.RecommendRequest(
        request_id=request.request_id,
        model=request.model,
        version=request.version,
        task=TASK_NUMBERS[request.task],
        k=request.k,
        user_id=request.user_id,
        request_time_ms=request.request_time_ms,
        include_seen=request.include_seen,
        head_weights=request.head_weights,
        history_handle=request.history_handle,
    )
    if len(request.history):
        history = message.history.columns
        _fill_ids(history.item_ids, request.history.item_ids)
        columns.fill(history.timestamps_ms, request.history.timestamps_ms)
        _fill_columns(history.signals, request.history.signals)
    if request.candidates is not None:
        message.candidates.SetInParent()
        _fill_ids(message.candidates.item_ids, request.candidates.item_ids)
        _fill_columns(message.candidates.features, request.candidates.features)
    if len(request.exclude_item_ids):
        _fill_ids(message.exclude_item_ids, request.exclude_item_ids)
    _fill_features(message.user_features, request.user_features)
    _fill_features(message.context_features, request.context_features)
    return message


def _fill_ids(message: types_pb.ItemIds, ids: ItemIds) -> None:
    if not len(ids):
        return
    if np.issubdtype(ids.dtype, np.integer):
        columns.fill(message.integers, ids)
    else:
        message.texts.values.extend(ids.tolist())


def _fill_columns(message: Any, arrays: Mapping[str, FloatArray]) -> None:
    for name, values in arrays.items():
        column = message[name]
        missing = np.isnan(values)
        if missing.any():
            column.missing.extend(np.flatnonzero(missing).tolist())
            values = np.where(missing, np.float32(0), values)
        columns.fill(column, values)


def _fill_features(message: Any, features: Features) -> None:
    for name, value in features.items():
        if isinstance(value, str):
            message[name].text = value
        elif isinstance(value, int):
            message[name].integer = value
        else:
            message[name].number = value


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def message_from_recommendation(answer: Recommendation) -> pb.RecommendResponse:
    """The answer as a message, filled field by field, which is the quickest way with protobuf."""
    message = pb.RecommendResponse(
        request_id=answer.request_id,
        features_seconds=answer.features_s,
        total_seconds=answer.total_s,
        unknown_items=answer.unknown_items,
        history_handle=answer.history_handle,
    )
    heads = tuple(answer.items[0].head_scores) if answer.items else ()
    message.heads.extend(heads)
    add = message.items.add
    for item in answer.items:
        to = add()
        if isinstance(item.item_id, str):
            to.item_id.text = item.item_id
        else:
            to.item_id.integer = item.item_id
        to.score = item.score
        if heads:
            to.head_scores.extend([item.head_scores[head] for head in heads])
        if item.title:
            to.title = item.title
    for stage in answer.stages:
        message.stages.add(
            task=TASK_NUMBERS[stage.task],
            model=stage.model,
            version=stage.version,
            engine=stage.engine,
            queue_seconds=stage.queue_s,
            compute_seconds=stage.compute_s,
            batch_size=stage.batch_size,
            tokens=stage.tokens,
            tokens_reused=stage.tokens_reused,
        )
    if len(answer.unscored_item_ids):
        _fill_ids(message.unscored_item_ids, item_id_array(list(answer.unscored_item_ids)))
    return message


def recommendation_from_message(message: pb.RecommendResponse) -> Recommendation:
    heads = tuple(message.heads)
    return Recommendation(
        request_id=message.request_id,
        items=[
            RankedItem(
                item_id=_item_id(item.item_id),
                score=item.score,
                head_scores=dict(zip(heads, item.head_scores, strict=True)),
                title=item.title,
            )
            for item in message.items
        ],
        stages=[
            StageReport(
                task=_task(stage.task),
                model=stage.model,
                version=stage.version,
                engine=stage.engine,
                queue_s=stage.queue_seconds,
                compute_s=stage.compute_seconds,
                batch_size=stage.batch_size,
                tokens=stage.tokens,
                tokens_reused=stage.tokens_reused,
            )
            for stage in message.stages
        ],
        features_s=message.features_seconds,
        total_s=message.total_seconds,
        unknown_items=message.unknown_items,
        unscored_item_ids=_item_id_list(message.unscored_item_ids),
        history_handle=message.history_handle,
    )


def _item_id(message: types_pb.ItemId) -> ItemId:
    return message.text if message.WhichOneof("id") == "text" else message.integer


def _item_id_list(message: types_pb.ItemIds) -> Sequence[ItemId]:
    if message.WhichOneof("ids") == "texts":
        return list(message.texts.values)
    return list(message.integers.values)


# ── Models ───────────────────────────────────────────────────────────────────────────────────────


def message_from_model(model: ServedModel) -> pb.Model:
    return pb.Model(
        name=model.name,
        default=model.default,
        stages=[
            pb.ModelStage(task=TASK_NUMBERS[task], model=name)
            for task, name in model.stages.items()
        ],
        versions=[
            pb.ModelVersion(
                model=version.model,
                version=version.version,
                active=version.active,
                architecture=version.architecture,
                plans=[
                    pb.TaskPlan(
                        task=TASK_NUMBERS[task],
                        engine=version.engines[task],
                        explanation=version.plan[task],
                    )
                    for task in version.tasks
                ],
                heads=version.heads,
                catalogue_size=version.catalogue_size,
                description=version.description,
                notes=version.notes,
            )
            for version in model.versions
        ],
    )


def models_from_message(messages: Iterable[pb.Model]) -> Sequence[ServedModel]:
    return [
        ServedModel(
            name=message.name,
            default=message.default,
            stages={_task(stage.task): stage.model for stage in message.stages},
            versions=[_version(version) for version in message.versions],
        )
        for message in messages
    ]


def _version(message: pb.ModelVersion) -> ServedVersion:
    return ServedVersion(
        model=message.model,
        version=message.version,
        active=message.active,
        architecture=message.architecture,
        tasks=[_task(plan.task) for plan in message.plans],
        heads=list(message.heads),
        engines={_task(plan.task): plan.engine for plan in message.plans},
        plan={_task(plan.task): plan.explanation for plan in message.plans},
        catalogue_size=message.catalogue_size,
        description=message.description,
        notes=list(message.notes),
    )


def _task(number: int) -> Task:
    """A task of an answer. Raises ValueError for one of a newer server."""
    task = TASKS.get(number)
    if task is None:
        raise ValueError(f"task {number} is unknown to this client; update it")
    return task
