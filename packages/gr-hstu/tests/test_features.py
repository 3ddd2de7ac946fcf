"""Features: what becomes of values, histories and their order, against naive rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gr_core import Behaviour, Candidates, History
from gr_core.errors import BundleError
from gr_core.repository import Catalogue
from gr_hstu.features import Feature, FeatureSchema

BINARY = Feature("is_liked", "binary")
BUCKET = Feature("watch_percentage", "bucket", boundaries=(0.1, 0.5, 0.9))
CATEGORY = Feature("tab", "categorical", values=("1", "3", "evening", "0.5"))
numbers = st.one_of(st.just(math.nan), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0, 3.0]))
columns = st.lists(numbers, max_size=30).map(lambda rows: np.array(rows, np.float32))


# ── One feature ───────────────────────────────────────────────────────────────────────────────


def naive_bucket(value: float, boundaries: Sequence[float]) -> int:
    if math.isnan(value):
        return 0
    return 1 + sum(np.float32(boundary) <= np.float32(value) for boundary in boundaries)


boundaries_st = st.lists(
    st.floats(-2, 2).map(lambda b: round(b, 2)), min_size=1, max_size=8, unique=True
).map(lambda b: tuple(sorted(b)))


@given(columns, boundaries_st)
def test_buckets_are_those_of_a_loop(column: np.ndarray, boundaries: tuple[float, ...]) -> None:
    feature = Feature("f", "bucket", boundaries=boundaries)
    assert feature.encode(column).tolist() == [naive_bucket(v, boundaries) for v in column]
    assert all(0 <= i < feature.cardinality for i in feature.encode(column).tolist())


@given(boundaries_st, st.data())
def test_a_value_on_a_boundary_belongs_above_it_in_any_precision(
    boundaries: tuple[float, ...], data: st.DataObject
) -> None:
    """What is trained on in float64 and served in float32 gets the same bucket."""
    value = data.draw(st.sampled_from(boundaries))
    feature = Feature("f", "bucket", boundaries=boundaries)
    expected = 2 + boundaries.index(value)
    assert feature.encode(np.array([value], np.float64)).item() == expected
    assert feature.encode(np.array([value], np.float32)).item() == expected
    assert feature.encode_value(value) == expected


@given(columns)
def test_binary_tells_missing_from_zero(column: np.ndarray) -> None:
    expected = [0 if math.isnan(v) else 1 if v == 0 else 2 for v in column.tolist()]
    assert BINARY.encode(column).tolist() == expected


@given(columns)
def test_categories_of_a_column_are_those_of_its_values(column: np.ndarray) -> None:
    assert CATEGORY.encode(column).tolist() == [CATEGORY.encode_value(float(v)) for v in column]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        ("1", 1),
        (1.0, 1),
        ("3", 2),
        (3, 2),
        ("evening", 3),
        (0.5, 4),
        ("0.5", 4),
        ("Evening", 0),
        ("01", 0),
        (2, 0),
        (1.5, 0),
        ("", 0),
        (None, 0),
        (math.nan, 0),
        (math.inf, 0),
    ],
)
def test_categories_are_compared_as_text(value: object, expected: int) -> None:
    assert CATEGORY.encode_value(value) == expected  # type: ignore[arg-type]


def test_a_category_called_nan_is_not_what_is_missing() -> None:
    feature = Feature("f", "categorical", values=("nan", "None"))
    assert feature.encode_value(math.nan) == 0
    assert feature.encode(np.array([math.nan])).tolist() == [0]
    assert feature.encode_value("nan") == 1


@pytest.mark.parametrize("value", [None, "much", math.nan, "nan"])
@pytest.mark.parametrize("feature", [BINARY, BUCKET])
def test_what_is_no_number_is_missing(feature: Feature, value: object) -> None:
    assert feature.encode_value(value) == 0  # type: ignore[arg-type]


@given(columns)
@pytest.mark.parametrize("feature", [BINARY, BUCKET, CATEGORY], ids=lambda f: f.kind)
def test_a_column_and_its_values_agree(feature: Feature, column: np.ndarray) -> None:
    assert feature.encode(column).tolist() == [feature.encode_value(float(v)) for v in column]
    assert feature.encode(column).dtype == np.int64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "text"}, "feature 'f': kind 'text', expected one of"),
        ({"kind": "bucket"}, "feature 'f': boundaries must be given"),
        ({"kind": "bucket", "boundaries": (2.0, 1.0)}, "feature 'f': boundaries .* ascending"),
        ({"kind": "bucket", "boundaries": (1.0, 1.0)}, "feature 'f': boundaries .* ascending"),
        ({"kind": "categorical", "values": ("a", "a")}, "feature 'f': a value occurs twice"),
    ],
)
def test_a_wrong_feature_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Feature("f", **fields)


# ── The schema ────────────────────────────────────────────────────────────────────────────────

SCHEMA = FeatureSchema(
    signals=(BINARY, BUCKET),
    user=(Feature("gender", "categorical", values=("m", "f")),),
    context=(Feature("hour", "bucket", boundaries=(6.0, 12.0, 18.0)),),
    candidate=(Feature("price", "bucket", boundaries=(1.0, 10.0)),),
    max_history=20,
    truncate_step=5,
    realtime_window_s=60,
    max_realtime=3,
)


def test_a_schema_survives_json() -> None:
    assert FeatureSchema.from_dict(SCHEMA.to_dict()) == SCHEMA
    loose = FeatureSchema.from_dict(
        {"signals": [{"name": "tab", "kind": "categorical", "values": [1, "x"]}]}
    )
    assert loose.signals[0].values == ("1", "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"signals": [{"kind": "binary"}]}, "features: 'name'"),
        ({"signals": [{"name": "x", "kind": "wrong"}]}, "feature 'x': kind 'wrong'"),
        ({"signals": 5}, "features: "),
        ({"user": ["is_liked"]}, "features: "),
        ({"max_histroy": 3}, "features: .*max_histroy"),
        ({"max_history": 8, "truncate_step": 9}, "features: truncate_step: 9, expected 1 to"),
        ({"max_history": "many"}, "features: "),
        ({"truncate_step": 0}, "features: truncate_step: 0"),
    ],
)
def test_a_wrong_schema_is_refused(data: dict, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        FeatureSchema.from_dict(data)


# ── Histories ─────────────────────────────────────────────────────────────────────────────────

CATALOGUE = Catalogue(list(range(1000, 1050)))
behaviours = st.lists(
    st.tuples(
        st.integers(995, 1055),  # some unknown
        st.integers(0, 30),  # many at the same time
        st.one_of(st.none(), st.floats(0, 1, width=32)),
    ),
    max_size=60,
)


def history_of(rows: Sequence[tuple[int, int, float | None]]) -> History:
    return History.of(
        [
            Behaviour(item, time * 1000, {} if watched is None else {"watch_percentage": watched})
            for item, time, watched in rows
        ]
    )


def naive_history(rows: Sequence[tuple[int, int, float | None]], schema: FeatureSchema) -> list:
    known = [row for row in rows if 1000 <= row[0] < 1050]
    known = [row for _, row in sorted(enumerate(known), key=lambda e: (e[1][1], e[0]))]
    while len(known) > schema.max_history:
        known = known[schema.truncate_step :]
    return known


@given(behaviours, st.integers(1, 25), st.data())
@example([(1000 + i % 50, i, 0.5) for i in range(60)], 1, None)
def test_a_history_is_that_of_a_loop(
    rows: list[tuple[int, int, float | None]], max_history: int, data: st.DataObject | None
) -> None:
    step = 1 if data is None else data.draw(st.integers(1, max_history))
    schema = FeatureSchema(signals=(BUCKET,), max_history=max_history, truncate_step=step)
    expected = naive_history(rows, schema)

    history, indices, unknown = schema.history(history_of(rows), CATALOGUE)
    arrays = schema.history_arrays(history, indices, 31_000)

    assert indices.tolist() == [row[0] - 999 for row in expected]
    assert history.item_ids.tolist() == [row[0] for row in expected]
    assert arrays["history_timestamps"].tolist() == [row[1] for row in expected]
    assert arrays["history_signals"][:, 0].tolist() == [
        naive_bucket(math.nan if row[2] is None else row[2], BUCKET.boundaries) for row in expected
    ]
    assert unknown == len(rows) - sum(1000 <= row[0] < 1050 for row in rows)
    assert len(indices) <= max_history
    assert arrays["history_lengths"] == len(indices)


@given(st.integers(1, 40), st.data())
def test_appending_moves_the_start_only_in_steps(max_history: int, data: st.DataObject) -> None:
    """Between two steps a history only grows at its end, so that cached state stays true."""
    step = data.draw(st.integers(1, max_history))
    schema = FeatureSchema(max_history=max_history, truncate_step=step)
    starts, lengths = [], []
    for count in range(1, 3 * max_history):
        rows = [(1000 + i % 50, i, None) for i in range(count)]
        history, _, _ = schema.history(history_of(rows), CATALOGUE)
        starts.append(int(history.timestamps_ms[0]) // 1000)
        lengths.append(len(history))
    assert all(start % step == 0 for start in starts)
    moves = np.diff(starts)
    assert set(moves.tolist()) <= {0, step}
    assert np.all(np.diff(np.flatnonzero(moves)) == step), "at most once in a step"
    assert max(lengths) <= max_history
    assert all(n > max_history - step for n in lengths[max_history:]), "as much as fits is kept"


def test_late_behaviours_are_put_in_their_place() -> None:
    rows = [(1001, 5, None), (1002, 1, None), (1003, 5, None), (1004, 3, None)]
    history, _, _ = SCHEMA.history(history_of(rows), CATALOGUE)
    assert history.item_ids.tolist() == [1002, 1004, 1001, 1003]


def test_an_empty_history_and_one_of_unknown_items_are_alike() -> None:
    for rows, unknown in (([], 0), ([(5, 1, 0.5), (6, 2, 0.5)], 2)):
        history, indices, left_out = SCHEMA.history(history_of(rows), CATALOGUE)
        arrays = SCHEMA.history_arrays(history, indices, 1000)
        assert left_out == unknown
        assert arrays["history_items"].shape == (0,)
        assert arrays["history_signals"].shape == (0, 2)
        assert arrays["history_lengths"] == 0
        assert arrays["realtime_counts"] == 0


def test_signals_that_the_model_does_not_read_are_ignored() -> None:
    plain = history_of([(1001, 1, 0.5), (1002, 2, 0.95)])
    more = History(
        plain.item_ids, plain.timestamps_ms, {**plain.signals, "mood": np.ones(2, np.float32)}
    )
    for history in (plain, more):
        kept, indices, _ = SCHEMA.history(history, CATALOGUE)
        arrays = SCHEMA.history_arrays(kept, indices, 3000)
        assert arrays["history_signals"].tolist() == [[0, 3], [0, 4]]


def test_string_ids_find_integer_items() -> None:
    history = History.of([Behaviour("1001", 1, {}), Behaviour("x", 2, {}), Behaviour(1002, 3, {})])
    _, indices, unknown = SCHEMA.history(history, CATALOGUE)
    assert indices.tolist() == [2, 3]
    assert unknown == 1


@given(st.lists(st.integers(0, 200), max_size=12), st.integers(0, 250))
def test_the_realtime_group_is_the_end_of_the_history(times: list[int], now: int) -> None:
    rows = [(1000 + i, time, None) for i, time in enumerate(times)]
    history, indices, _ = SCHEMA.history(history_of(rows), CATALOGUE)
    count = int(SCHEMA.history_arrays(history, indices, now * 1000)["realtime_counts"])
    recent = sum(time >= now - SCHEMA.realtime_window_s for time in times)
    assert count == min(recent, SCHEMA.max_realtime)


def test_without_a_window_there_is_no_realtime_group() -> None:
    schema = FeatureSchema(max_history=20, truncate_step=5)
    history, indices, _ = schema.history(history_of([(1000, 9, None)]), CATALOGUE)
    assert schema.history_arrays(history, indices, 9000)["realtime_counts"] == 0


# ── Candidates, users, context ────────────────────────────────────────────────────────────────


def test_cross_features_stay_with_their_candidates() -> None:
    candidates = Candidates(
        np.array([1003, 7, 1001]), {"price": np.array([5, 50, np.nan], np.float32)}
    )
    found = CATALOGUE.indices_of(candidates.item_ids)
    arrays = SCHEMA.candidate_arrays(candidates, found > 0, found[found > 0])
    assert arrays["candidate_items"].tolist() == [4, 2]
    assert arrays["candidate_features"].tolist() == [[2], [0]]
    assert arrays["candidate_counts"] == 2


def test_user_and_context_features() -> None:
    assert SCHEMA.user_array({"gender": "f", "shoe_size": 44}).tolist() == [2]
    assert SCHEMA.user_array({}).tolist() == [0]
    assert SCHEMA.context_array({"hour": 12}).tolist() == [3]
    assert SCHEMA.context_array({"hour": "12"}).tolist() == [3]
    assert FeatureSchema().user_array({"gender": "f"}).shape == (0,)
