"""Requests with known outcomes: their file, and the quality of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import Task
from gr_core.contracts import InferenceResult
from gr_core.errors import InvalidRequest, NotFound
from gr_core.labelled import (
    EVALUATION,
    auc,
    cases,
    gauc,
    labelled_requests,
    quality,
    read_labelled,
)
from gr_core.testing.tiny import TinyModel, write_tiny_bundle

SEEN = {"item_ids": [1000, 1001], "timestamps_ms": [1, 2]}


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return TinyModel(write_tiny_bundle(tmp_path))


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ── The file ──────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_a_request_and_what_came_of_it(model: TinyModel):
    found = {"history": SEEN, "relevant": [1004]}
    ranked = {"candidates": [1002, 1003], "labels": {"like": [0, None]}, "user_id": "u"}
    assert labelled_requests(model) == []
    written(model.bundle.path / EVALUATION, found, ranked)
    first, second = labelled_requests(model)
    assert first.request.history.item_ids.tolist() == [1000, 1001]
    assert first.relevant.tolist() == [1004]
    np.testing.assert_array_equal(second.labels["like"], [0, np.nan])
    assert second.request.user_id == "u"


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("{", ":2", "is not JSON"),
        ("[1]", ":2", "expected an object"),
        ('{"history": []}', ":2", "neither relevant items nor labels"),
        ('{"relevant": 3}', ":2.relevant", "expected a list of item ids"),
        ('{"relevant": [3], "histroy": []}', ":2.histroy", "unknown"),
        ('{"candidates": [3], "labels": [1]}', ":2.labels", "by head"),
        ('{"candidates": [3], "labels": {"like": [1, 0]}}', ":2.labels.like", "a list of 1"),
        ('{"candidates": [3], "labels": {"like": [0.5]}}', ":2.labels.like", "0, 1 or null"),
        ('{"candidates": [3], "labels": {"like": [true]}}', ":2.labels.like", "0, 1 or null"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, line: str, field: str, message: str):
    path = tmp_path / "set.jsonl"
    path.write_text('{"relevant": [1]}\n' + line + "\n")
    with pytest.raises(InvalidRequest) as caught:
        read_labelled(path)
    (violation,) = caught.value.violations
    assert violation.field == f"{path}{field}"
    assert message in violation.message


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(NotFound, match="cannot be read"):
        read_labelled(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b'{"user_id": "\xe9"}\n')
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_labelled(tmp_path / "latin")


# ── Quality ───────────────────────────────────────────────────────────────────────────────────


def retrieved(*items: int) -> InferenceResult:
    return InferenceResult(np.zeros(len(items), np.float32), np.array(items))


def test_retrieval_leaves_out_what_the_user_has_seen(model: TinyModel, tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"history": SEEN, "exclude_item_ids": [1002], "relevant": [1004]},
        {"history": SEEN, "include_seen": True, "relevant": [1000, 1001]},
        {"candidates": [1002], "labels": {"like": [1]}},
    ]
    first, second = cases(model, Task.RETRIEVE, read_labelled(written(tmp_path / "set", *rows)))
    assert first.excluded.tolist() == [1, 2, 3]
    assert (first.request.k, second.request.k) == (13, 10)
    results = [retrieved(2, 1, 9, 3, 5), retrieved(7, 1, 2)]
    assert first.top(results[0]).tolist() == [9, 5]
    found = quality(Task.RETRIEVE, [first, second], results, ())
    # The only one in the second place, and both of two in the second and third.
    ideal = 1 + 1 / np.log2(3)
    expected = [1 / np.log2(3), (1 / np.log2(3) + 1 / 2) / ideal]
    assert found == {"ndcg@10": pytest.approx(np.mean(expected)), "hr@10": 1.0}


def test_an_item_that_the_model_does_not_know_is_not_found(model: TinyModel, tmp_path: Path):
    (case,) = cases(model, Task.RETRIEVE, read_labelled(written(tmp_path / "s", {"relevant": [7]})))
    found = quality(Task.RETRIEVE, [case], [retrieved(*range(1, 11))], ())
    assert found == {"ndcg@10": 0.0, "hr@10": 0.0}


def test_ranking_is_judged_over_all_and_within_users(model: TinyModel, tmp_path: Path):
    rows = [
        {"candidates": [1000, 7, 1001], "labels": {"like": [1, 1, 0]}, "user_id": "a"},
        {"candidates": [1002], "labels": {"like": [1]}, "user_id": "a"},
        {"candidates": [1003, 1004], "labels": {"like": [None, 0]}, "user_id": "b"},
        {"candidates": [1003], "labels": {"share": [0]}},
    ]
    found = cases(model, Task.RANK, read_labelled(written(tmp_path / "set", *rows)))
    assert [len(case.labels_CO) for case in found] == [2, 1, 2, 1]  # 7 is not known
    like = [[0.9, 0.5], [0.1], [0.0, 0.7], [0.0]]
    results = [InferenceResult(np.array([[s, 0] for s in one], np.float32)) for one in like]
    # 0.9 and 0.1 were liked, 0.5 and 0.7 not; within a: 0.9 and 0.1 against 0.5.
    assert quality(Task.RANK, found, results, model.heads) == {"auc:like": 0.5, "gauc:like": 0.5}
    assert quality(Task.RANK, [], [], model.heads) == {}


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40
    )
)
def test_auc_is_the_part_of_pairs_in_order(rows: list[tuple[bool, int, int]]):
    label, score, user = (np.array(column) for column in zip(*rows, strict=True))

    def counted(own: Any) -> float:
        pairs = [
            (one > other) + 0.5 * (one == other)
            for one in score[own & label]
            for other in score[own & ~label]
        ]
        return float(np.mean(pairs)) if pairs else float("nan")

    everyone = np.ones(len(label), bool)
    np.testing.assert_allclose(auc(label, score.astype(np.float32)), counted(everyone))
    values = np.array([counted(user == u) for u in np.unique(user)])
    weights = np.array([(user == u).sum() for u in np.unique(user)])
    known = ~np.isnan(values)
    expected = np.average(values[known], weights=weights[known]) if known.any() else np.nan
    np.testing.assert_allclose(gauc(label, score.astype(np.float32), user), expected)
