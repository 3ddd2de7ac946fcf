"""Metrics against naive definitions, intervals, splits without leaks, baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs gr-hstu[train]")

from gr_hstu.data.interactions import Interactions, Table
from gr_hstu.evaluation import metrics, protocols
from gr_hstu.evaluation.baselines import (
    CoOccurrence,
    ItemRate,
    OneHotLogisticRegression,
    Popularity,
)
from gr_hstu.evaluation.bootstrap import mean_interval, user_weights
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.evaluation.ranking import auc_difference, evaluate_ranking
from gr_hstu.evaluation.retrieval import evaluate_retrieval, history_rows, paired_difference

scores = st.lists(st.integers(0, 5), min_size=2, max_size=30)


def interactions(rows: list[tuple[int, int, int]], items: int = 0) -> Interactions:
    """From (user, item, time in ms), in any order."""
    user, item, time = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    items = items or int(item.max())
    return Interactions.sort(
        Interactions(
            name="test",
            user_N=user,
            item_N=item,
            timestamp_ms_N=time,
            users=Table(tuple(str(u) for u in range(1, int(user.max()) + 1))),
            items=Table(tuple(str(i) for i in range(1, items + 1))),
        )
    )


def naive_auc(labels: list[bool], values: list[float]) -> float:
    pairs = [
        (p > n) + 0.5 * (p == n)
        for p, lp in zip(values, labels, strict=True)
        if lp
        for n, ln in zip(values, labels, strict=True)
        if not ln
    ]
    return sum(pairs) / len(pairs) if pairs else float("nan")


@given(scores, st.data())
def test_auc_is_the_share_of_ordered_pairs(values: list[int], data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    found = metrics.auc(np.array(labels), np.array(values, float))
    assert found == pytest.approx(naive_auc(labels, values), nan_ok=True)


@given(scores, st.data())
def test_a_weight_is_a_repetition(values: list[int], data: st.DataObject) -> None:
    same = {"min_size": len(values), "max_size": len(values)}
    labels = np.array(data.draw(st.lists(st.booleans(), **same)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), **same)))
    value = np.array(values, float)
    repeated = metrics.auc(np.repeat(labels, weights), np.repeat(value, weights))
    assert metrics.auc(labels, value, weights) == pytest.approx(repeated, nan_ok=True)


@given(scores, st.data())
def test_auc_per_user_is_auc_of_each_user(values: list[int], data: st.DataObject) -> None:
    same = {"min_size": len(values), "max_size": len(values)}
    labels = np.array(data.draw(st.lists(st.booleans(), **same)))
    users = np.array(data.draw(st.lists(st.integers(1, 4), **same)))
    value = np.array(values, float)
    found = dict(
        zip(*(a.tolist() for a in metrics.auc_per_user(labels, value, users)[:2]), strict=True)
    )
    for user in set(users.tolist()):
        expected = metrics.auc(labels[users == user], value[users == user])
        assert found.get(user, float("nan")) == pytest.approx(expected, nan_ok=True)


@given(scores, st.integers(0, 29))
def test_a_rank_counts_what_is_not_worse(values: list[int], place: int) -> None:
    target = place % len(values)
    row = np.array([values], np.float32)
    others = [v for i, v in enumerate(values) if i != target]
    expected = 1 + sum(v >= values[target] for v in others)
    assert metrics.ranks(row, np.array([target]))[0] == expected


def test_ranks_of_excluded_tied_and_undefined_scores() -> None:
    row = np.array([[-np.inf, 1.0, 2.0, -np.inf], [0.0, 0.0, 0.0, 0.0], [1.0, np.nan, 5.0, 2.0]])
    assert metrics.ranks(row, np.array([1, 3, 2])).tolist() == [2, 4, 2]
    assert metrics.ranks(row[2:], np.array([1])).tolist() == [4]


def test_hit_rate_and_ndcg_by_hand() -> None:
    rank = np.array([1, 2, 10, 11])
    assert metrics.hit_rate(rank, 10).tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(metrics.ndcg(rank, 10), [1, 1 / math.log2(3), 1 / math.log2(11), 0])


def test_entropy_of_a_constant_is_one() -> None:
    label = np.array([1, 0, 0, 0.0])
    assert metrics.normalised_entropy(label, np.full(4, 0.25)) == pytest.approx(1)
    assert metrics.normalised_entropy(label, np.array([0.9, 0.1, 0.1, 0.1])) < 1
    assert math.isnan(metrics.normalised_entropy(np.zeros(3), np.full(3, 0.5)))
    assert metrics.log_loss(np.array([1.0]), np.array([0.5]))[0] == pytest.approx(math.log(2))


def test_users_are_resampled_whole() -> None:
    weights = user_weights(7, samples=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    # One user with many equal events is one draw: the interval is that of three users.
    user = np.array([1] * 1000 + [2, 3])
    found = mean_interval(np.array([1.0] * 1000 + [0.0, 0.0]), user)
    assert found.value == pytest.approx(1000 / 1002)
    assert found.low == 0
    assert found.high == 1


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        found = mean_interval(draw.normal(size=200), np.arange(200), samples=200)
        covered += found.low <= 0 <= found.high
    assert 88 <= covered <= 100


def test_unobserved_labels_do_not_count() -> None:
    label = np.array([1, 0, np.nan, 1, 0])
    user = np.array([1, 1, 1, 2, 2])
    ours, theirs = np.array([0.9, 0.1, 0.5, 0.8, 0.3]), np.array([0.1, 0.9, 0.5, 0.8, 0.3])
    result = evaluate_ranking(label, ours, user, samples=20)
    assert (result.rows, result.users, result.auc.value, result.gauc.value) == (4, 2, 1.0, 1.0)
    auc, gauc = auc_difference(label, ours, theirs, user, samples=20)
    assert auc.value == pytest.approx(1.0 - 0.25)
    assert gauc.value == pytest.approx(0.5)


rows = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 8)), min_size=4, max_size=40
)


@given(rows)
def test_leave_last_out_has_no_leak(events: list[tuple[int, int, int]]) -> None:
    data = interactions(events, items=6)
    split = protocols.leave_last_out(data)
    for cases, allowed in ((split.validation, split.train_N), (split.test, split.refit_N)):
        for row, start, end in zip(cases.row_C, cases.start_C, cases.end_C, strict=True):
            assert (data.user_N[start : row + 1] == data.user_N[row]).all()
            assert end == row
            assert allowed[start:end].all()
            assert not allowed[row]
    assert not (split.train_N & ~split.refit_N).any()
    users, count = np.unique(data.user_N, return_counts=True)
    assert len(split.test) == (count >= 3).sum()
    assert len(users) >= len(split.test)


@given(rows, st.integers(1, 8), st.integers(0, 4))
def test_a_split_by_time_has_no_leak(
    events: list[tuple[int, int, int]], validation_ms: int, later: int
) -> None:
    data = interactions(events, items=6)
    test_ms = validation_ms + later + 1
    positive = data.item_N % 2 == 0
    retrieval = protocols.retrieval_by_time(data, validation_ms, test_ms, positive)
    ranking = protocols.ranking_by_time(data, validation_ms, test_ms)
    for split in (retrieval, ranking):
        assert (data.timestamp_ms_N[split.train_N] < validation_ms).all()
        assert (data.timestamp_ms_N[split.refit_N] < test_ms).all()
        assert (data.timestamp_ms_N[split.validation.row_C] < test_ms).all()
        assert not split.refit_N[split.test.row_C].any()
        for cases in (split.validation, split.test):
            for row, start, end in zip(cases.row_C, cases.start_C, cases.end_C, strict=True):
                assert (data.user_N[start : row + 1] == data.user_N[row]).all()
                assert (data.timestamp_ms_N[start:end] < data.timestamp_ms_N[row]).all()
    for cases in (ranking.validation, ranking.test):
        period = (data.timestamp_ms_N - test_ms) // (test_ms - validation_ms)
        for row, start, end in zip(cases.row_C, cases.start_C, cases.end_C, strict=True):
            before = (data.user_N == data.user_N[row]) & (period < period[row])
            assert np.array_equal(np.flatnonzero(before), np.arange(start, end))
    assert len(ranking.test) == (data.timestamp_ms_N >= test_ms).sum()
    for row, start in zip(retrieval.test.row_C, retrieval.test.start_C, strict=True):
        assert positive[row]
        assert data.item_N[row] not in data.item_N[start:row]


class Fixed:
    """Scores items by their index."""

    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        return np.tile(np.arange(len(data.items) + 1, dtype=np.float32), (len(cases), 1))


def test_seen_items_are_removed_but_never_the_target() -> None:
    data = interactions([(1, 5, 1), (1, 4, 2), (1, 3, 3), (2, 5, 1), (2, 1, 2), (2, 5, 3)])
    split = protocols.leave_last_out(data)
    result = evaluate_retrieval(Fixed(), data, split.test, batch=1)
    assert result.rank_seen_kept_C.tolist() == [3, 1]
    assert result.rank_seen_removed_C.tolist() == [1, 1]  # item 5 of user 2 was seen, and is found
    assert result.mean("hr@1") == 1.0
    assert result.mean("hr@1", "kept") == 0.5
    assert paired_difference(result, result).value == 0


def test_history_rows_take_the_newest() -> None:
    cases = Cases(np.array([5, 9]), np.array([0, 6]), np.array([4, 6]))
    case, row = history_rows(cases, last=2)
    assert case.tolist() == [0, 0]
    assert row.tolist() == [2, 3]
    assert history_rows(cases)[1].tolist() == [0, 1, 2, 3]


def test_popularity_and_co_occurrence_by_hand() -> None:
    # Users 1 and 2 went from item 1 to 2; user 3 has met item 1 only.
    data = interactions([(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2), (3, 1, 1), (3, 3, 9)])
    fitted = data.timestamp_ms_N < 9
    last = np.flatnonzero(data.item_N == 3)
    case = Cases(last, data.start_N[last], last)
    assert Popularity(data, fitted).score(data, case)[0].tolist() == [0, 3, 2, 0]
    cosine = CoOccurrence(data, fitted).score(data, case)[0]
    assert cosine[2] == pytest.approx(2 / math.sqrt(3 * 2), abs=1e-5)
    assert cosine[1] == pytest.approx(0, abs=1e-5)  # an item does not recommend itself
    directed = CoOccurrence(data, fitted, window=10, last=5, powers=(1, 0)).score(data, case)[0]
    assert directed[2] == pytest.approx(2 / 3, abs=1e-5)
    back = CoOccurrence(data, fitted, window=10, powers=(0, 0)).matrix_VV.todense()
    assert back[1, 2] == 2
    assert back[2, 1] == 0


def test_item_rate_is_smoothed_and_ignores_unknown_labels() -> None:
    rate = ItemRate(np.array([1, 1, 2, 2]), np.array([1, 1, 0, np.nan]), items=3, strength=3)
    np.testing.assert_allclose(rate.predict(np.array([1, 2, 3])), [(2 + 2) / 5, (0 + 2) / 4, 2 / 3])


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_logistic_regression_finds_what_is_there(seed: int) -> None:
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(seed)
    feature = draw.integers(0, 4, (10_000, 2))
    probability = np.array([0.1, 0.3, 0.6, 0.9])[feature[:, 1]]
    label = (draw.random(10_000) < probability).astype(float)
    model = OneHotLogisticRegression([4, 4], strength=1.0).fit(feature[:9000], label[:9000])
    np.testing.assert_allclose(model.predict(feature[9000:]), probability[9000:], atol=0.1)
