"""Requests as JSON, sample requests, and the measures of parity."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import Task
from gr_core.errors import ConfigurationError, InvalidRequest, NotFound
from gr_core.json_requests import read_requests, request_of
from gr_core.logs import JsonFormatter, LogObserver
from gr_core.observers import LoadEvent, RequestEvent
from gr_core.parity import retrieval_error, score_error
from gr_core.samples import SAMPLES, for_task, sample_requests
from gr_core.testing.tiny import TinyModel, write_tiny_bundle

# ── JSON ──────────────────────────────────────────────────────────────────────────────────────


def test_rows_and_columns_are_the_same_history():
    rows = request_of(
        {
            "history": [
                {"item_id": "a", "timestamp_ms": 1, "signals": {"liked": 1}},
                {"item_id": "b", "timestamp_ms": 2},
            ],
            "candidates": [3, 4],
            "k": 5,
            "task": "rank",
            "head_weights": {"like": 0.5},
        }
    )
    columns = request_of(
        {
            "history": {
                "item_ids": ["a", "b"],
                "timestamps_ms": [1, 2],
                "signals": {"liked": [1, None]},
            },
            "candidates": {"item_ids": [3, 4], "features": {"price": [1.5, None]}},
        }
    )
    for request in (rows, columns):
        assert request.history.item_ids.tolist() == ["a", "b"]
        assert request.history.timestamps_ms.tolist() == [1, 2]
        np.testing.assert_array_equal(request.history.signals["liked"], [1, np.nan])
        assert request.candidates is not None
        assert request.candidates.item_ids.tolist() == [3, 4]
    assert (rows.k, rows.task, rows.head_weights) == (5, Task.RANK, {"like": 0.5})
    assert columns.candidates is not None
    np.testing.assert_array_equal(columns.candidates.features["price"], [1.5, np.nan])


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ([], ["request"]),
        ({"k": True, "task": "dance", "model": 3}, ["request.k", "request.task", "request.model"]),
        ({"history": 3}, ["request.history"]),
        ({"history": {"item_ids": [1]}}, ["request.history"]),
        ({"history": [{"item_id": 1, "timestamp_ms": 1.5}]}, ["request.history[0]"]),
        ({"candidates": [[1]]}, ["request.candidates"]),
        ({"include_seen": "yes"}, ["request.include_seen"]),
        ({"deadline": 3}, ["request.deadline"]),
        ({"history": {"item_ids": [1], "timestamps_ms": [10**30]}}, ["request.history"]),
        ({"head_weights": {"like": "much"}}, ["request.head_weights"]),
        ({"head_weights": {"like": 10**400}}, ["request.head_weights"]),
    ],
)
def test_wrong_requests_name_their_fields(data: object, fields: list[str]):
    with pytest.raises(InvalidRequest) as caught:
        request_of(data)
    assert [violation.field for violation in caught.value.violations] == fields


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["history", "item_id", "timestamp_ms", "k", "candidates", "task"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_request_or_invalid(data: object):
    fields = ["request"]
    try:
        request_of(data)
    except InvalidRequest as error:
        fields = [violation.field for violation in error.violations]
    assert all(field.startswith("request") for field in fields)


def test_files_of_requests(tmp_path: Path):
    file = tmp_path / "requests.json"
    file.write_text('[{"k": 1}, {"k": 2}]')
    assert [request.k for request in read_requests(file)] == [1, 2]
    file.write_text('{"k": 3}')
    assert [request.k for request in read_requests(file)] == [3]
    file.write_text("nonsense")
    with pytest.raises(InvalidRequest, match="is not JSON"):
        read_requests(file)
    with pytest.raises(NotFound, match="No such file"):
        read_requests(tmp_path / "other.json")


# ── Samples ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return TinyModel(write_tiny_bundle(tmp_path))


def test_made_up_requests_are_the_same_for_a_seed_and_of_all_lengths(model: TinyModel):
    one, other = sample_requests(model, 20), sample_requests(model, 20)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.history.item_ids, b.history.item_ids)
        assert a.request_time_ms == b.request_time_ms
    lengths = [len(request.history) for request in one]
    assert lengths[:3] == [0, 1, 256]
    assert len(set(lengths)) > 10
    for request in one:
        known = model.catalogue.indices_of(request.history.item_ids)
        assert np.all(known > 0)
        assert np.all(np.diff(request.history.timestamps_ms) >= 0)
        assert request.request_time_ms is not None
        assert np.all(request.history.timestamps_ms < request.request_time_ms)
        assert request.candidates is not None
        assert len(np.unique(request.candidates.item_ids)) == 50


def test_a_bundle_may_bring_its_own(model: TinyModel):
    rows = [{"history": [{"item_id": 1001, "timestamp_ms": 5}]}, {"candidates": [1002]}]
    (model.bundle.path / SAMPLES).write_text(json.dumps(rows))
    first, second, third = sample_requests(model, 3)
    assert first.history.item_ids.tolist() == third.history.item_ids.tolist() == [1001]
    assert second.candidates is not None
    assert second.candidates.item_ids.tolist() == [1002]
    assert for_task(second, Task.RETRIEVE).candidates is None
    assert for_task(second, Task.RANK).candidates is second.candidates


# ── Parity ────────────────────────────────────────────────────────────────────────────────────

RIGHT_ITEMS = np.array([4, 2, 9, 1, 7])
RIGHT_SCORES = np.array([10, 8, 7.9, 3, 1], np.float32)


def error_of(items: list[int], scores: list[float]) -> tuple[float, float]:
    found = np.array(scores, np.float32)
    return retrieval_error(np.array(items), found, RIGHT_ITEMS, RIGHT_SCORES, 3)


def test_the_same_top_k_has_no_error():
    assert error_of([4, 2, 9], [10, 8, 7.9]) == (0.0, 1.0)


def test_items_may_trade_places_by_what_they_differ_in():
    error, overlap = error_of([4, 9, 2], [10, 7.9, 8])
    assert error == pytest.approx(0.01, rel=1e-3)
    assert overlap == 1.0


def test_an_item_that_does_not_belong_there_is_an_error_whatever_its_score():
    error, overlap = error_of([4, 2, 1], [10, 8, 3])
    assert error == pytest.approx(0.49)
    assert overlap == pytest.approx(2 / 3)
    error, _ = error_of([4, 2, 55], [10, 8, 7.9])
    assert error >= 0.69, "an item that the reference does not even list"


def test_a_wrong_score_is_an_error():
    assert error_of([4, 2, 9], [10, 8, 6.9])[0] == pytest.approx(0.1)


@pytest.mark.parametrize("items", [[4, 2], [4, 2, 2]])
def test_too_few_items_or_one_twice(items: list[int]):
    assert error_of(items, [10.0] * len(items))[0] == np.inf


def test_scores_are_compared_by_the_largest_of_them():
    right = np.array([[100, -1], [2, 3]], np.float32)
    assert score_error(right, right) == 0
    assert score_error(right + np.float32(1), right) == pytest.approx(0.01)
    assert score_error(right[:1], right) == np.inf
    assert score_error(np.empty((0, 2), np.float32), np.empty((0, 2), np.float32)) == 0


# ── Logs ──────────────────────────────────────────────────────────────────────────────────────


def test_json_logs_hold_what_was_said_and_no_user():
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("gr_core.events")
    log.addHandler(handler)
    log.setLevel("INFO")
    try:
        observer = LogObserver({})
        observer.on_request(RequestEvent("r-1", "videos", "ok", total_s=0.25, history_length=3))
        observer.on_load(LoadEvent("videos", "2", "refused", reason="damaged"))
    finally:
        log.removeHandler(handler)
    first, second = (json.loads(JsonFormatter().format(record)) for record in records)
    assert (first["request_id"], first["total_ms"], first["level"]) == ("r-1", 250.0, "info")
    assert first["time"].endswith("+00:00")
    assert second["level"] == "error"
    assert "damaged" in second["message"]
    with pytest.raises(ConfigurationError, match=r"observers\.log: unknown setting 'levle'"):
        LogObserver({"levle": "info"})
    with pytest.raises(ConfigurationError, match=r"observers\.log\.level: 'LOUD'"):
        LogObserver({"level": "loud"})
