"""Requests and answers survive the way through messages; columns are what protobuf says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import (
    Behaviour,
    Candidates,
    History,
    RankedItem,
    Recommendation,
    RecommendRequest,
    StageReport,
    Task,
)
from gr_core.errors import FailedPrecondition, InvalidRequest, Overloaded, UnknownHistory
from gr_core.types import item_id_array
from gr_core.validation import Limits
from gr_serve_grpc import columns
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import types_pb2
from gr_serve_grpc.convert import (
    message_from_recommendation,
    message_from_request,
    recommendation_from_message,
    request_from_message,
)
from gr_serve_grpc.status import error_of, status_of

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXT = st.text(min_size=1, max_size=8)
IDS = st.lists(INT64, max_size=20) | st.lists(TEXT, max_size=20)
FEATURES = st.dictionaries(
    TEXT, INT64 | TEXT | st.floats(allow_nan=False, allow_infinity=False), max_size=3
)


@given(st.lists(INT64, max_size=300))
def test_integer_columns(values: list[int]):
    by_hand = types_pb2.Int64Column(values=values)
    assert columns.integers(by_hand).tolist() == values
    filled = columns.fill(types_pb2.Int64Column(), np.array(values, np.int64))
    assert filled == by_hand


@given(st.lists(st.floats(width=32), max_size=300), st.lists(st.integers(0, 9), max_size=3))
def test_float_columns(values: list[float], missing: list[int]):
    by_hand = types_pb2.FloatColumn(values=values, missing=missing)
    np.testing.assert_array_equal(columns.floats(by_hand), np.array(values, np.float32))
    filled = columns.fill(types_pb2.FloatColumn(missing=missing), np.array(values, np.float32))
    assert filled.SerializeToString() == by_hand.SerializeToString()


def test_columns_of_a_newer_client_may_have_more_fields():
    newer = types_pb2.Int64Column(values=[1, -2, 3]).SerializeToString() + b"\x78\x07"
    column = types_pb2.Int64Column.FromString(newer)
    assert columns.integers(column).tolist() == [1, -2, 3]


def test_columns_that_are_not_packed_are_read_all_the_same():
    one, two = (b"\x09" + value.to_bytes(8, "little", signed=True) for value in (5, -6))
    assert columns.integers(types_pb2.Int64Column.FromString(one + two)).tolist() == [5, -6]


@st.composite
def requests(draw: st.DrawFn) -> RecommendRequest:
    ids = draw(IDS)
    n = len(ids)
    signal = st.lists(FLOAT32 | st.just(math.nan), min_size=n, max_size=n)
    history = History(
        item_id_array(ids),
        np.array(draw(st.lists(st.integers(0, 10**12), min_size=n, max_size=n)), np.int64),
        {
            name: np.array(values, np.float32)
            for name, values in draw(st.dictionaries(TEXT, signal, max_size=3)).items()
        },
    )
    candidates = draw(st.none() | IDS.filter(bool))
    return RecommendRequest(
        history=history,
        candidates=candidates and Candidates(item_id_array(candidates)),
        k=draw(st.integers(1, 1000)),
        model=draw(st.text(max_size=8)),
        version=draw(st.text(max_size=8)),
        task=draw(st.none() | st.sampled_from(Task)),
        user_id=draw(st.text(max_size=8)),
        user_features=draw(FEATURES),
        context_features=draw(FEATURES),
        request_time_ms=draw(st.none() | st.integers(0, 10**12)),
        include_seen=draw(st.booleans()),
        exclude_item_ids=item_id_array(draw(IDS)),
        head_weights=draw(st.dictionaries(TEXT, FLOAT32, max_size=3)),
        history_handle=draw(st.binary(max_size=8)),
    )


def assert_same(a: RecommendRequest, b: RecommendRequest) -> None:
    for field in RecommendRequest.__dataclass_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if field == "history":
            if len(x):  # a history without rows has no columns either
                np.testing.assert_array_equal(x.item_ids, y.item_ids)
                np.testing.assert_array_equal(x.timestamps_ms, y.timestamps_ms)
                assert x.signals.keys() == y.signals.keys()
                for name in x.signals:
                    np.testing.assert_array_equal(x.signals[name], y.signals[name])
                    assert y.signals[name].dtype == np.float32
        elif field == "candidates" and x is not None:
            np.testing.assert_array_equal(x.item_ids, y.item_ids)
        elif field == "exclude_item_ids":
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y, field


@given(requests())
def test_requests_survive(request: RecommendRequest):
    data = message_from_request(request).SerializeToString()
    message = pb.RecommendRequest.FromString(data)
    read = request_from_message(message, Limits())
    assert_same(request, read)


@given(requests())
def test_rows_and_columns_mean_the_same(request: RecommendRequest):
    message = message_from_request(request)
    columned = request_from_message(message, Limits())
    history = request.history
    message.history.rows.SetInParent()
    for i, item_id in enumerate(history.item_ids.tolist()):
        row = message.history.rows.behaviours.add(timestamp_ms=int(history.timestamps_ms[i]))
        if isinstance(item_id, str):
            row.item_id.text = item_id
        else:
            row.item_id.integer = item_id
        for name, values in history.signals.items():
            if not math.isnan(values[i]):
                row.signals[name] = values[i]
    rowed = request_from_message(message, Limits())
    # A signal that every row lacks is no column.
    signals = {n: v for n, v in columned.history.signals.items() if not np.isnan(v).all()}
    assert signals.keys() == rowed.history.signals.keys()
    for name, values in signals.items():
        np.testing.assert_array_equal(values, rowed.history.signals[name])
    np.testing.assert_array_equal(columned.history.item_ids, rowed.history.item_ids)
    np.testing.assert_array_equal(columned.history.timestamps_ms, rowed.history.timestamps_ms)


@pytest.mark.parametrize("ids", [[4, 2], ["a", "b"]])
def test_answers_survive(ids):
    answer = Recommendation(
        request_id="r",
        items=[RankedItem(i, 0.5, {"up": 1.0, "down": -2.0}, f"Title of {i}") for i in ids],
        stages=[StageReport(Task.RANK, "m", "1", "torch", 0.25, 0.5, 3, 400, 128)],
        features_s=0.125,
        total_s=1.0,
        unknown_items=2,
        unscored_item_ids=ids,
        history_handle=b"\x00opaque\xff",
    )
    data = message_from_recommendation(answer).SerializeToString()
    assert recommendation_from_message(pb.RecommendResponse.FromString(data)) == answer


@given(st.dictionaries(TEXT, st.lists(st.floats(width=32), max_size=20), max_size=3))
def test_a_nan_never_gets_through_and_nothing_else_is_called_one(signals: dict[str, list[float]]):
    message = pb.RecommendRequest()
    message.history.columns.item_ids.integers.SetInParent()
    for name, values in signals.items():
        message.history.columns.signals[name].values.extend(values)
    nans = {
        f"history.signals[{name!r}][{i}]"
        for name, values in signals.items()
        for i in [i for i, value in enumerate(values) if math.isnan(value)][:10]
    }
    try:
        request_from_message(message, Limits())
    except InvalidRequest as error:
        named = {v.field for v in error.violations if v.message.startswith("NaN")}
        assert named == nans
    else:
        assert not nans


def test_errors_survive():
    status = status_of(Overloaded("full", 0.75), "r")
    error = error_of(status)
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 0.75
    assert str(error) == "full"
    for kind in (FailedPrecondition, UnknownHistory):
        assert type(error_of(status_of(kind("because"), "r"))) is kind


def test_rows_read_into_columns_once():
    rows = [Behaviour(1, 5, {"a": 1.0}), Behaviour(2, 6)]
    message = message_from_request(RecommendRequest(History.of(rows)))
    assert list(message.history.columns.signals["a"].missing) == [1]


def test_signals_of_rows_are_bounded_by_cells():
    message = pb.RecommendRequest()
    for i in range(20_000):
        message.history.rows.behaviours.add(timestamp_ms=1).item_id.integer = i
    for i in range(210):
        message.history.rows.behaviours[i].signals[f"s{i}"] = 1.0
    with pytest.raises(InvalidRequest, match=r"history.signals: more than 209 names"):
        request_from_message(message, Limits())
