"""The engine ``torch``: nothing but a request itself changes its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core import Candidates, Task
from gr_core.collate import collate
from gr_core.contracts import Artifact, EngineOptions, Health, InferenceResult
from gr_core.errors import PlanError, Unavailable
from gr_core.repository import Catalogue
from gr_hstu import engine as engine_module
from gr_hstu.engine import TorchEngine
from gr_hstu.model import HSTUModel
from gr_hstu.testing import (
    CASES,
    CONFIGS,
    IDS,
    ITEMS,
    KINDS,
    a_request,
    encode,
    engine_of,
    load,
    random_module,
    write,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, HSTUModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: load(write(folder, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def engines(models: Mapping[str, HSTUModel]) -> Mapping[str, TorchEngine]:
    return {kind: engine_of(model) for kind, model in models.items()}


def by_item(result: InferenceResult) -> dict[int, float]:
    assert result.indices is not None
    return dict(zip(result.indices.tolist(), result.scores.tolist(), strict=True))


def same(one: InferenceResult, other: InferenceResult) -> None:
    """The same scores; of equal ones any order."""
    np.testing.assert_allclose(one.scores, other.scores, rtol=TOLERANCE, atol=TOLERANCE)
    if one.indices is not None:
        mine, theirs = by_item(one), by_item(other)
        for item in mine.keys() & theirs.keys():
            assert mine[item] == pytest.approx(theirs[item], abs=TOLERANCE)
        # Only items whose scores are that of the last may differ.
        last = float(one.scores[-1]) if len(one.scores) else 0.0
        for item in mine.keys() ^ theirs.keys():
            score = mine.get(item, theirs.get(item, np.inf))
            assert score == pytest.approx(last, abs=TOLERANCE)


# ── What a score depends on ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1000),
            st.sampled_from([0, 1, 2, 7, 23, 24, 25, 40]),
            st.integers(1, 20),
            st.integers(1, 70),
        ),
        min_size=2,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_batch_mates_padding_and_order_change_nothing(
    models: Mapping[str, HSTUModel],
    engines: Mapping[str, TorchEngine],
    kind: str,
    task: Task,
    sizes: list[tuple[int, int, int, int]],
    random,
) -> None:
    model, engine = models[kind], engines[kind]
    batch = [
        encode(model, task, a_request(seed, length, candidates), k)
        for seed, length, candidates, k in sizes
    ]
    alone = [engine.infer([request])[0] for request in batch]
    order = list(range(len(batch)))
    random.shuffle(order)
    together = engine.infer([batch[i] for i in order])
    for i, result in zip(order, together, strict=True):
        same(result, alone[i])


@pytest.mark.parametrize("kind", KINDS)
def test_other_candidates_and_their_order_change_nothing(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine], kind: str
) -> None:
    whole = a_request(candidates=12)
    assert whole.candidates is not None
    (expected,) = engines[kind].infer([encode(models[kind], Task.RANK, whole)])
    for rows in ([3], [11, 0, 5], list(range(11, -1, -1))):
        part = Candidates(
            whole.candidates.item_ids[rows],
            {name: column[rows] for name, column in whole.candidates.features.items()},
        )
        request = dataclasses.replace(whole, candidates=part)
        (result,) = engines[kind].infer([encode(models[kind], Task.RANK, request)])
        np.testing.assert_allclose(result.scores, expected.scores[rows], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_score_does_depend_on(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine], kind: str
) -> None:
    """The other tests could not fail if these did not change anything."""
    base = a_request(length=12, candidates=4)
    history = base.history
    reordered = dataclasses.replace(history, item_ids=history.item_ids[::-1].copy())
    liked = {**history.signals, "is_liked": 1 - history.signals["is_liked"]}
    changes = [
        {"history": reordered},
        {"history": dataclasses.replace(history, signals=liked)},
        {"history": dataclasses.replace(history, timestamps_ms=history.timestamps_ms - 10**8)},
    ]
    if kind != "research":
        assert base.candidates is not None
        dearer = Candidates(base.candidates.item_ids, {"price": np.full(4, 99, np.float32)})
        changes += [
            {"candidates": dearer},
            {"user_features": {"gender": "f"}},
            {"context_features": {"hour": 23}},
        ]
    (before,) = engines[kind].infer([encode(models[kind], Task.RANK, base)])
    for change in changes:
        request = dataclasses.replace(base, **change)
        (after,) = engines[kind].infer([encode(models[kind], Task.RANK, request)])
        assert not np.allclose(before.scores, after.scores, rtol=0, atol=1e-4), change


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_an_empty_history_has_finite_scores(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine], kind: str, task: Task
) -> None:
    (result,) = engines[kind].infer([encode(models[kind], task, a_request(length=0))])
    assert np.isfinite(result.scores).all()
    assert len(result.scores) == (10 if task is Task.RETRIEVE else 5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_candidates_have_no_scores(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine], kind: str
) -> None:
    unknown = encode(models[kind], Task.RANK, a_request(candidates=[1, 2]))
    some = encode(models[kind], Task.RANK, a_request(candidates=3))
    heads = len(models[kind].heads)
    results = engines[kind].infer([unknown, some])
    assert [r.scores.shape for r in results] == [(0, heads), (3, heads)]


# ── Retrieval ─────────────────────────────────────────────────────────────────────────────────


def test_retrieval_is_a_full_sort_of_the_catalogue(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine]
) -> None:
    model = models["research"]
    requests = [encode(model, Task.RETRIEVE, a_request(seed), k=ITEMS) for seed in range(4)]
    arrays = collate(model.inputs(Task.RETRIEVE), requests)
    with torch.no_grad():
        users = model.module(Task.RETRIEVE)(**{n: torch.from_numpy(a) for n, a in arrays.items()})
        scores = users @ model.item_table()[1:].T
    for row, result in enumerate(engines["research"].infer(requests)):
        expected, order = torch.sort(scores[row], descending=True, stable=True)
        np.testing.assert_allclose(result.scores, expected.numpy(), atol=TOLERANCE)
        assert result.indices is not None
        np.testing.assert_array_equal(result.indices, order.numpy() + 1)


def test_retrieval_scores_are_those_of_ranking(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine]
) -> None:
    model, engine = models["research"], engines["research"]
    request = a_request(candidates=list(IDS))
    (found,) = engine.infer([encode(model, Task.RETRIEVE, request, k=ITEMS)])
    (ranked,) = engine.infer([encode(model, Task.RANK, request)])
    assert found.indices is not None
    np.testing.assert_allclose(found.scores, ranked.scores[found.indices - 1, 0], atol=TOLERANCE)


@pytest.mark.parametrize("scores_in_flight", [1, 7, 30, 59, 60, 61, 200])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_catalogue_in_blocks_gives_the_same(
    models: Mapping[str, HSTUModel],
    engines: Mapping[str, TorchEngine],
    monkeypatch: pytest.MonkeyPatch,
    scores_in_flight: int,
    batch_size: int,
) -> None:
    model, engine = models["research"], engines["research"]
    requests = [
        encode(model, Task.RETRIEVE, a_request(seed), k=[5, 60, 1][seed])
        for seed in range(batch_size)
    ]
    whole = engine.infer(requests)
    monkeypatch.setattr(engine_module, "_SCORES_IN_FLIGHT", scores_in_flight)
    for in_blocks, expected in zip(engine.infer(requests), whole, strict=True):
        assert in_blocks.indices is not None
        assert expected.indices is not None
        np.testing.assert_array_equal(in_blocks.indices, expected.indices)
        np.testing.assert_allclose(in_blocks.scores, expected.scores, rtol=0, atol=TOLERANCE)


def test_each_request_gets_as_many_items_as_it_asked_for(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine]
) -> None:
    model = models["research"]
    batch = [encode(model, Task.RETRIEVE, a_request(k), k=k) for k in (1, 30, 60, 500)]
    results = engines["research"].infer(batch)
    assert [len(r.scores) for r in results] == [1, 30, 60, 60]
    for result in results:
        assert result.indices is not None
        assert len(set(result.indices.tolist())) == len(result.indices)
        assert result.indices.min() >= 1, "padding is no item"
        assert np.all(np.diff(result.scores) <= 0)


# ── Many candidates ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, HSTUModel]:
    """Models with more items than candidates are scored at once."""
    items = 1300
    folder = tmp_path_factory.mktemp("large")
    models = {}
    for kind in ("ranking", "mtgr"):
        config = dataclasses.replace(CONFIGS[kind], num_items=items)
        models[kind] = load(
            write(
                folder,
                kind,
                state=dict(random_module(config).state_dict()),
                config=config.to_dict(),
                catalogue=Catalogue(list(range(items))),
            )
        )
    return models


@pytest.mark.parametrize("kind", ["ranking", "mtgr"])
def test_more_candidates_than_fit_at_once_score_as_in_one_pass(
    large: Mapping[str, HSTUModel], kind: str
) -> None:
    model = large[kind]
    batch = [
        encode(model, Task.RANK, a_request(seed, length, list(range(count))))
        for seed, (length, count) in enumerate([(12, 1300), (0, 1030), (30, 3)])
    ]
    in_parts = engine_of(model).infer(batch)
    arrays = collate(model.inputs(Task.RANK), batch)
    with torch.no_grad():
        outputs = model.module(Task.RANK)(**{n: torch.from_numpy(a) for n, a in arrays.items()})
    for row, (result, request) in enumerate(zip(in_parts, batch, strict=True)):
        count = len(request.arrays["candidate_items"])
        assert result.scores.shape == (count, 2)
        np.testing.assert_allclose(
            result.scores, outputs[row, :count].numpy(), rtol=0, atol=TOLERANCE
        )


# ── Precision, life ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_bfloat16_is_close_to_float32(
    models: Mapping[str, HSTUModel], engines: Mapping[str, TorchEngine], kind: str, task: Task
) -> None:
    model = models[kind]
    batch = [encode(model, task, a_request(seed, 20, 20), k=ITEMS) for seed in range(3)]
    half = engine_of(model, dtype="bfloat16").infer(batch)
    for rough, exact in zip(half, engines[kind].infer(batch), strict=True):
        assert rough.scores.dtype == np.float32
        if task is Task.RETRIEVE:
            scores = np.array([by_item(rough)[i] for i in sorted(by_item(rough))])
            expected = np.array([by_item(exact)[i] for i in sorted(by_item(exact))])
        else:
            scores, expected = rough.scores, exact.scores
        # 8 bits of mantissa, through two layers with large weights.
        assert np.abs(scores - expected).max() < 0.1 * np.abs(expected).max()
        assert np.abs(scores - expected).max() > 0, "it really computed in bfloat16"


def test_bfloat16_leaves_the_model_as_it_was(models: Mapping[str, HSTUModel]) -> None:
    model = models["research"]
    engine = engine_of(model, dtype="bfloat16")
    assert all(p.dtype == torch.float32 for p in model.module(Task.RANK).parameters())
    retrieve, rank = engine._modules[Task.RETRIEVE], engine._modules[Task.RANK]
    assert rank.model is retrieve, "both tasks share one copy"


@pytest.mark.parametrize("kind", KINDS)
def test_it_warms_up_and_may_be_closed_twice(models: Mapping[str, HSTUModel], kind: str) -> None:
    model = models[kind]
    engine = engine_of(model)
    engine.warm_up()
    assert engine.health() == Health(True)
    request = encode(model, Task.RANK, a_request())
    (before,) = engine.infer([request])
    for _ in range(2):
        engine.close()
        assert not engine.health().ok
        with pytest.raises(Unavailable, match="closed"):
            engine.infer([request])
    # The model is still whole: another engine may use it.
    same(engine_of(model).infer([request])[0], before)


def test_threads_are_those_that_were_asked_for(models: Mapping[str, HSTUModel]) -> None:
    before = torch.get_num_threads()
    try:
        engine_of(models["research"], threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_it_cannot_run_is_refused(models: Mapping[str, HSTUModel], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="engine torch has no option 'streams', 'graphs'"):
        engine_of(models["research"], extra={"streams": 2, "graphs": True})

    class NoTorch:
        """A model of another format."""

    with pytest.raises(PlanError, match="NoTorch offers no torch module"):
        TorchEngine().load(
            Artifact("torch", tmp_path),
            NoTorch(),  # type: ignore[arg-type]
            [Task.RANK],
            EngineOptions(),
        )
