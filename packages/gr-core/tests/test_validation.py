"""What is checked of every request: each wrong field by its name, all at once, and quickly."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import Candidates, History, RecommendRequest
from gr_core.types import item_id_array
from gr_core.validation import Limits, violations_of

DAY_MS = 24 * 3600 * 1000
LIMITS = Limits(max_history=50, max_candidates=20, max_k=100, max_features=3, max_text=10)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def history(n: int = 3, times: Any = None, **signals: Any) -> History:
    if times is None:
        times = [now_ms() - 1000 * i for i in range(n)]
    return History(
        np.arange(1, n + 1),
        np.array(times, np.int64),
        {name: np.array(column, np.float32) for name, column in signals.items()},
    )


def found(limits: Limits = LIMITS, **fields: Any) -> dict[str, str]:
    fields.setdefault("history", history())
    return {v.field: v.message for v in violations_of(RecommendRequest(**fields), limits)}


def candidates(*ids: int | str, **features: Any) -> Candidates:
    return Candidates(
        item_id_array(list(ids)), {n: np.array(c, np.float32) for n, c in features.items()}
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"history": History()},
        {"history": history(3, watch_percentage=[0.1, np.nan, 1.0])},
        {"history": history(2, [now_ms() + DAY_MS // 2, 0])},
        {"history": history(3, [5, 1, 3])},
        {"history": history(50)},
        {"candidates": candidates(1, 2, 3, price=[1, np.nan, 3])},
        {"candidates": candidates(*range(20))},
        {"candidates": candidates()},
        {"k": 1},
        {"k": 100},
        {"user_features": {"age": 30, "name": "ten chars.", "weight": 1.5}},
        {"head_weights": {"click": -1.0}},
        {"request_time_ms": 0},
        {"exclude_item_ids": np.arange(50)},
        {"user_id": "x" * 10},
    ],
)
def test_what_is_right_is_let_through(fields: dict[str, Any]) -> None:
    assert found(**fields) == {}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"k": 0}, "k", "0, expected 1 to 100"),
        ({"k": -1}, "k", "-1, expected 1 to 100"),
        ({"k": 10**9}, "k", "1000000000, expected 1 to 100"),
        ({"request_time_ms": -1}, "request_time_ms", "-1, expected 0 to"),
        ({"request_time_ms": 2**62}, "request_time_ms", "expected 0 to"),
        ({"history": history(51)}, "history", "51 behaviours, expected at most 50"),
        (
            {"history": history(3, [1, 2])},
            "history.timestamps_ms",
            "2 times for 3 item ids, give one each",
        ),
        (
            {"history": history(3, [1, -5, 2])},
            "history.timestamps_ms[1]",
            "-5, expected ms since 1970, not in the future",
        ),
        (
            {"history": history(2, [1, now_ms() + 2 * DAY_MS])},
            "history.timestamps_ms[1]",
            "not in the future",
        ),
        (
            {"history": history(3, liked=[0, 1])},
            "history.signals['liked']",
            "2 values for 3 rows, give one each",
        ),
        (
            {"history": history(3, liked=[0, np.inf, 1])},
            "history.signals['liked'][1]",
            "inf, expected a finite number",
        ),
        (
            {"history": history(1, a=[0], b=[0], c=[0], d=[0])},
            "history.signals",
            "4 given, expected at most 3",
        ),
        ({"candidates": candidates(*range(21))}, "candidates", "21 given, expected at most 20"),
        (
            {"candidates": candidates(7, 8, 7)},
            "candidates.item_ids[2]",
            "7 is the same as candidates.item_ids[0]; give each candidate once",
        ),
        (
            {"candidates": candidates("a", "b", "b")},
            "candidates.item_ids[2]",
            "'b' is the same as candidates.item_ids[1]",
        ),
        (
            {"candidates": candidates(1, 2, price=[1])},
            "candidates.features['price']",
            "1 values for 2 rows",
        ),
        (
            {"candidates": candidates(1, 2, price=[1, -np.inf])},
            "candidates.features['price'][1]",
            "-inf, expected a finite number",
        ),
        (
            {"user_features": {"name": "x" * 11}},
            "user_features['name']",
            "11 characters, expected at most 10",
        ),
        ({"user_features": {"age": np.nan}}, "user_features['age']", "nan, expected a finite"),
        ({"context_features": {"t": np.inf}}, "context_features['t']", "inf, expected a finite"),
        ({"user_features": {"age": 10**400}}, "user_features['age']", "expected at most 2^63 - 1"),
        (
            {"context_features": dict.fromkeys("abcd", 1)},
            "context_features",
            "4 given, expected at most 3",
        ),
        ({"head_weights": {"click": np.nan}}, "head_weights['click']", "nan, expected a finite"),
        ({"user_id": "x" * 11}, "user_id", "11 characters, expected at most 10"),
        ({"request_id": "x" * 11}, "request_id", "11 characters, expected at most 10"),
        (
            {"exclude_item_ids": np.arange(51)},
            "exclude_item_ids",
            "51 given, expected at most 50",
        ),
        (
            {"history": History(item_id_array(["a", "x" * 11]), np.zeros(2, np.int64))},
            "history.item_ids[1]",
            "11 characters, expected at most 10",
        ),
        (
            {"candidates": candidates("a", "x" * 11)},
            "candidates.item_ids[1]",
            "11 characters, expected at most 10",
        ),
        (
            {"exclude_item_ids": item_id_array(["x" * 11])},
            "exclude_item_ids[0]",
            "11 characters, expected at most 10",
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    wrong = found(**fields)
    assert list(wrong) == [field]
    assert message in wrong[field]


def test_everything_that_is_wrong_is_named_at_once() -> None:
    wrong = found(
        k=0,
        history=history(3, [-1, 2, -3], liked=[1], watched=[np.inf, 0, 0]),
        candidates=candidates(1, 1, 2, 2, price=[1]),
        user_features={"age": np.nan},
        context_features={"hour": np.inf},
        head_weights={"click": np.nan},
        user_id="x" * 11,
        request_id="y" * 11,
    )
    assert set(wrong) == {
        "k",
        "history.timestamps_ms[0]",
        "history.timestamps_ms[2]",
        "history.signals['liked']",
        "history.signals['watched'][0]",
        "candidates.item_ids[1]",
        "candidates.item_ids[3]",
        "candidates.features['price']",
        "user_features['age']",
        "context_features['hour']",
        "head_weights['click']",
        "user_id",
        "request_id",
    }


def test_many_wrong_rows_are_counted_not_listed() -> None:
    wrong = found(history=history(50, [-1] * 50))
    assert len(wrong) == 11
    assert "50 rows like these" in wrong["history.timestamps_ms"]
    wrong = found(Limits(), candidates=candidates(*[7] * 5000), k=0)
    assert len(wrong) <= 13


@given(
    st.lists(st.integers(-3, 3), max_size=20),
    st.lists(st.floats(width=32), max_size=20),
    st.integers(-3, 200),
)
def test_it_never_raises_and_finds_each_wrong_row(
    times: list[int], signal: list[float], k: int
) -> None:
    rows = History(
        np.arange(len(times)), np.array(times, np.int64), {"s": np.array(signal, np.float32)}
    )
    wrong = violations_of(RecommendRequest(rows, k=k), Limits(max_k=100))
    fields = {v.field for v in wrong}
    assert ("k" in fields) == (not 1 <= k <= 100)
    negative = [i for i, t in enumerate(times) if t < 0]
    assert {f"history.timestamps_ms[{i}]" for i in negative[:10]} <= fields
    infinite = [i for i, s in enumerate(signal) if np.isinf(s)]
    assert {f"history.signals['s'][{i}]" for i in infinite[:10]} <= fields
    assert ("history.signals['s']" in fields) == (len(signal) != len(times) or len(infinite) > 10)


def test_the_longest_request_is_checked_in_a_moment() -> None:
    """It is checked on the event loop, where everybody waits."""
    n = 100_000
    ids = item_id_array([str(i) for i in range(n)])
    request = RecommendRequest(
        History(ids, np.full(n, 1), {"s": np.zeros(n, np.float32)}),
        candidates=Candidates(ids[:10_000]),
    )
    started = time.thread_time()
    assert violations_of(request, Limits()) == []
    assert time.thread_time() - started < 0.25
