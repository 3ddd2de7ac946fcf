"""Triton's steps by themselves: any text in, one answer or one clear message out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_core import Candidates, History, RecommendRequest, Task
from gr_core.contracts import Artifact, EncodedRequest, EngineOptions, InferenceResult
from gr_core.errors import BundleError, InvalidRequest
from gr_core.json_requests import request_of
from gr_core.testing.tiny import TinyEngine, TinyModel, write_tiny_bundle
from gr_core.types import item_id_array
from gr_trt.triton.answer import Answers
from gr_trt.triton.engine import EngineStep
from gr_trt.triton.features import Features
from gr_trt.triton.layout import ITEMS, SIZES, STATE, Step, step_inputs
from gr_trt.triton.requests import request_text
from gr_trt.triton.text_format import Word, text_format

TASKS = (Task.RETRIEVE, Task.RANK)
NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(write_tiny_bundle(tmp_path_factory.mktemp("bundles")))


class Steps:
    """Features, the engine of `gr_core.testing.tiny`, answer."""

    def __init__(self, model: TinyModel, task: Task) -> None:
        self.engine = TinyEngine()
        self.engine.load(Artifact("numpy", model.bundle.path), model, [task], EngineOptions())
        self.features = Features(model, task, step_inputs(model, task), {})
        self.step = EngineStep(self.engine, task, model.inputs(task), len(model.heads))
        self.answers = Answers(model, task, "numpy")

    def ask(self, texts: Sequence[bytes]) -> list[dict[str, Any]]:
        """As one call, so that all are padded to the longest."""
        tensors = self.features.tensors([self.features.row(text) for text in texts])
        tensors |= self.step.tensors(self.step.compute(self.step.requests(tensors)))
        return [json.loads(text) for text in self.answers.texts(tensors)]


IDS = st.integers(1000, 1049) | st.sampled_from([7, 10**15])
COLUMN = st.floats(0, 1, width=32) | st.just(float("nan"))


@st.composite
def requests(draw: st.DrawFn) -> RecommendRequest:
    items = draw(st.lists(IDS, max_size=30))
    times = draw(st.lists(st.integers(0, NOW_MS), min_size=len(items), max_size=len(items)))
    column = draw(st.lists(COLUMN, min_size=len(items), max_size=len(items)))
    return RecommendRequest(
        History(
            item_id_array(items), np.array(times, np.int64), {"s": np.array(column, np.float32)}
        ),
        candidates=Candidates(
            item_id_array(draw(st.lists(IDS, min_size=1, max_size=20, unique=True)))
        ),
        k=draw(st.integers(1, 60)),
        include_seen=draw(st.booleans()),
        exclude_item_ids=item_id_array(draw(st.lists(IDS, max_size=9))),
        head_weights=draw(st.dictionaries(st.sampled_from(["like", "share"]), st.floats(-2, 2))),
        user_features={"country": draw(st.text(max_size=5))},
        request_id=draw(st.text(max_size=5)) or "x",
        request_time_ms=NOW_MS,
    )


@given(request=requests())
def test_requests_are_read_as_they_were_written(request: RecommendRequest) -> None:
    read = request_of(json.loads(request_text(request)))
    np.testing.assert_array_equal(read.history.item_ids, request.history.item_ids)
    np.testing.assert_array_equal(read.history.timestamps_ms, request.history.timestamps_ms)
    np.testing.assert_array_equal(read.history.signals["s"], request.history.signals["s"])
    assert read.candidates is not None
    assert request.candidates is not None
    np.testing.assert_array_equal(read.candidates.item_ids, request.candidates.item_ids)
    np.testing.assert_array_equal(read.exclude_item_ids, request.exclude_item_ids)
    columns = {"history": request.history, "candidates": None, "exclude_item_ids": None}
    assert replace(read, **columns) == replace(request, **columns)


@pytest.mark.parametrize("task", TASKS)
@given(together=st.lists(requests(), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_requests_of_one_call_are_answered_as_alone(
    model: TinyModel, task: Task, together: list[RecommendRequest]
) -> None:
    steps = Steps(model, task)
    texts = [request_text(replace(request, task=task)) for request in together]
    for request, text, answer in zip(together, texts, steps.ask(texts), strict=True):
        (alone,) = steps.ask([text])
        both = [[item["score"] for item in one["items"]] for one in (answer, alone)]
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
        assert answer["request_id"] == request.request_id
        check(model, task, request, answer)


def check(model: TinyModel, task: Task, request: RecommendRequest, answer: Any) -> None:
    """Against scores of every item, computed here."""
    everything = RecommendRequest(
        request.history, Candidates(model.catalogue.ids), request_time_ms=NOW_MS
    )
    encoded = model.encode(everything, Task.RANK).request
    engine = TinyEngine()
    engine.load(Artifact("numpy", model.bundle.path), model, [Task.RANK], EngineOptions())
    (result,) = engine.infer([encoded])
    ids = model.catalogue.ids.tolist()
    given = [item["item_id"] for item in answer["items"]]
    if task is Task.RETRIEVE:
        scores = dict(zip(ids, result.scores[:, 0].tolist(), strict=True))
        left_out = {*request.exclude_item_ids.tolist()}
        if not request.include_seen:
            left_out |= {*request.history.item_ids.tolist()}
        allowed = [item for item in ids if item not in left_out]
    else:
        final, heads = model.decode(Task.RANK, result, request.head_weights)
        scores = dict(zip(ids, final.tolist(), strict=True))
        assert request.candidates is not None
        asked = request.candidates.item_ids.tolist()
        allowed = [item for item in asked if item in scores]
        assert answer["unscored_item_ids"] == [item for item in asked if item not in scores]
        by_head = dict(zip(ids, heads.tolist(), strict=True))
        for item in answer["items"]:
            np.testing.assert_allclose(
                list(item["head_scores"].values()), by_head[item["item_id"]], rtol=1e-4, atol=1e-5
            )
    assert len(given) == min(request.k, len(allowed))
    assert {*given} <= {*allowed}
    best = sorted((scores[item] for item in allowed), reverse=True)[: request.k]
    np.testing.assert_allclose([scores[item] for item in given], best, rtol=1e-4, atol=1e-5)


# ── Mistakes ──────────────────────────────────────────────────────────────────────────────────

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("history", "candidates", "k", "model", "version", "task", "user_id", "user_features"),
        *("context_features", "request_time_ms", "include_seen", "exclude_item_ids"),
        *("head_weights", "request_id", "history_handle", "deadline", "colour"),
    ]
)
COLUMNS = st.fixed_dictionaries(
    {}, optional={"item_ids": VALUES, "timestamps_ms": VALUES, "signals": VALUES}
)


@pytest.mark.parametrize("task", TASKS)
@given(data=VALUES | st.dictionaries(FIELDS, VALUES | COLUMNS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_whatever_is_sent_is_answered_or_refused(model: TinyModel, task: Task, data: Any) -> None:
    features = Features(model, task, step_inputs(model, task), {})
    with suppress(InvalidRequest):
        features.tensors([features.row(json.dumps(data).encode())])


@given(text=st.binary(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_json_is_refused(model: TinyModel, text: bytes) -> None:
    features = Features(model, Task.RETRIEVE, step_inputs(model, Task.RETRIEVE), {})
    try:
        json.loads(text)
    except ValueError:
        with pytest.raises(InvalidRequest, match="request: is not JSON"):
            features.row(text)


@pytest.mark.parametrize(
    "field", ['"k": %d', '"head_weights": {"like": %d}', '"history": {"item_ids": [%d]}']
)
def test_a_number_that_is_too_large(model: TinyModel, field: str) -> None:
    features = Features(model, Task.RETRIEVE, step_inputs(model, Task.RETRIEVE), {})
    with pytest.raises(InvalidRequest):
        features.row(b"{%s}" % (field % 10**400).encode())


def test_all_mistakes_are_named_at_once(model: TinyModel) -> None:
    features = Features(model, Task.RETRIEVE, step_inputs(model, Task.RETRIEVE), {})
    with pytest.raises(InvalidRequest) as caught:
        features.row(b'{"model": "another", "k": 0, "history_handle": "AAAA"}')
    assert {v.field for v in caught.value.violations} == {"model", "k", "history_handle"}


# ── Padding ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("length", "padded"), [(0, 8), (1, 8), (8, 8), (9, 16), (33, 64), (65, 100), (100, 100)]
)
def test_histories_are_padded_to_powers_of_two(model: TinyModel, length: int, padded: int) -> None:
    longest = {"history": 100, "candidate": 4}
    features = Features(model, Task.RANK, step_inputs(model, Task.RANK), longest)
    request = a_request(length, 3)
    tensors = features.tensors([features.row(request_text(request))])
    assert tensors["items"].shape == (1, padded)
    assert tensors["candidates"].shape == (1, 4)
    assert tensors["length"].tolist() == [[length]]
    assert tensors[ITEMS].tolist() == [[1, 2, 3]]
    assert tensors[SIZES].tolist() == [[3, length + 3, length, 3]]
    assert tensors[STATE].shape == (1, 1)


def test_more_than_the_graph_takes_is_refused(model: TinyModel) -> None:
    longest = {"history": 100, "candidate": 4}
    features = Features(model, Task.RANK, step_inputs(model, Task.RANK), longest)
    with pytest.raises(InvalidRequest, match=r"candidates: 5 known ones, .* at most 4; send fewer"):
        features.row(request_text(a_request(3, 5)))
    with pytest.raises(InvalidRequest, match=r"history: 101 known ones, .* at most 100"):
        features.row(request_text(a_request(101, 4)))


def a_request(length: int, candidates: int) -> RecommendRequest:
    history = History(1000 + np.arange(length) % 50, NOW_MS + np.arange(length))
    return RecommendRequest(history, Candidates(1000 + np.arange(candidates)))


# ── The engine ────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_computed_where_no_candidate_is_known(model: TinyModel) -> None:
    class Never:
        def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
            raise AssertionError

    steps = Steps(model, Task.RANK)
    steps.step = EngineStep(Never(), Task.RANK, model.inputs(Task.RANK), 2)  # type: ignore[arg-type]
    (answer,) = steps.ask([b'{"candidates": [7, 8]}'])
    assert answer["items"] == []
    assert answer["unscored_item_ids"] == [7, 8]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────


def test_a_step_is_read_as_written_and_refused_when_damaged(tmp_path: Path) -> None:
    step = Step(Task.RANK, "onnxruntime", "cpu", "float16", 32, 2, {"history": 64})
    step.write(tmp_path)
    assert Step.read(tmp_path) == step
    file = tmp_path / "step.json"
    for text in ("", "[]", "{}", file.read_text().replace('version": 1', 'version": 2')):
        file.write_text(text)
        with pytest.raises(BundleError, match=r"step\.json: not a step .* export the model again"):
            Step.read(tmp_path)


def test_text_format() -> None:
    text = text_format(
        {"name": 'a"b\\c\nä', "kind": Word("KIND_CPU"), "dims": [1, -1], "on": True, "all": {}}
    )
    assert text == (
        'name: "a\\"b\\\\c\\012\\303\\244"\nkind: KIND_CPU\ndims: 1\ndims: -1\non: true\nall {\n}\n'
    )
