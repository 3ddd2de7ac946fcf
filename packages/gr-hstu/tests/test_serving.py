"""HSTU and MTGR behind the pipeline: what a client gets is what the model itself says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import Candidates, History, Recommendation, RecommendRequest, Task
from gr_core.caches.memory import MemoryCache
from gr_core.collate import collate
from gr_core.contracts import CacheKind
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import BundleError, InvalidRequest, PlanError
from gr_core.pipeline import Pipeline, PipelineSpec
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry
from gr_core.repository import ModelRepository
from gr_hstu import plugin
from gr_hstu.model import HSTUModel
from gr_hstu.testing import (
    IDS,
    ITEMS,
    KINDS,
    NOW_MS,
    SID,
    a_request,
    encode,
    engine_of,
    load,
    load_sid,
    write,
)

DEMO = PipelineSpec("demo", retrieve="research", rank="mtgr", retrieve_k=20, default=True)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> ModelRepository:
    folder = tmp_path_factory.mktemp("repository")
    for kind in KINDS:
        write(folder, kind)
    return ModelRepository(folder)


@pytest.fixture(scope="module")
def models(repository: ModelRepository) -> dict[str, HSTUModel]:
    return {kind: load(repository.bundle(kind)) for kind in KINDS}


def registry() -> Registry:
    return Registry.of(*plugin.gr_register_models(), *plugin.gr_register_engines())


@asynccontextmanager
async def serving(
    repository: ModelRepository, specs: Sequence[ModelSpec] = (), **environment: Any
) -> AsyncIterator[Pipeline]:
    models = specs or [ModelSpec(kind) for kind in KINDS]
    pipelines = [] if specs else [DEMO]
    env = Environment(registry(), **environment)
    pipeline = Pipeline(repository, models, pipelines, env, poll_seconds=0)
    await pipeline.start()
    try:
        yield pipeline
    finally:
        await pipeline.close()


def rank_scores(model: HSTUModel, request: RecommendRequest) -> dict[Any, list[float]]:
    """Head scores by item, straight from the torch module."""
    encoding = model.encode(request, Task.RANK)
    arrays = collate(model.inputs(Task.RANK), [encoding.request])
    with torch.no_grad():
        output = model.module(Task.RANK)(**{n: torch.from_numpy(a) for n, a in arrays.items()})[0]
    scores = output if model.heads == ("recommendation",) else torch.sigmoid(output)
    ids = model.catalogue.ids_of(encoding.candidate_indices).tolist()
    return dict(zip(ids, scores[: len(ids)].tolist(), strict=True))


def retrieved(model: HSTUModel, request: RecommendRequest) -> list[tuple[Any, float]]:
    """Unseen items, best first, with their scores, straight from the torch module."""
    every = dataclasses.replace(request, candidates=Candidates(np.array(IDS)))
    scores = {item: heads[0] for item, heads in rank_scores(model, every).items()}
    seen = set(request.history.item_ids.tolist())
    unseen = [(item, score) for item, score in scores.items() if item not in seen]
    return sorted(unseen, key=lambda pair: -pair[1])


def check_ranked(
    answer: Recommendation, model: HSTUModel, expected: dict[Any, list[float]]
) -> None:
    for item in answer.items:
        heads = expected[item.item_id]
        assert list(item.head_scores) == list(model.heads)
        assert list(item.head_scores.values()) == pytest.approx(heads, abs=TOLERANCE)
        assert item.score == pytest.approx(sum(heads) / len(heads), abs=TOLERANCE)
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)


async def test_the_installed_plugin_is_found_and_ready() -> None:
    found = PluginHost.discover().registry
    assert {"hstu", "mtgr"} <= set(found.models)
    assert "torch" in found.engines
    assert found.engines["torch"].devices == ("cpu", "cuda")


async def test_retrieval(repository: ModelRepository, models: dict[str, HSTUModel]) -> None:
    request = a_request(3, length=15, model="research", k=12)
    request = dataclasses.replace(request, candidates=None, task=Task.RETRIEVE)
    async with serving(repository) as pipeline:
        answer = await pipeline.recommend(request)
    expected = retrieved(models["research"], request)[:12]
    assert [item.item_id for item in answer.items] == [item for item, _ in expected]
    assert [item.score for item in answer.items] == pytest.approx(
        [score for _, score in expected], abs=TOLERANCE
    )
    assert answer.items[0].title == f"title {answer.items[0].item_id}"
    assert (answer.stages[0].engine, answer.stages[0].tokens) == ("torch", 15)


@pytest.mark.parametrize("kind", KINDS)
async def test_ranking(
    repository: ModelRepository, models: dict[str, HSTUModel], kind: str
) -> None:
    request = a_request(5, length=15, candidates=9, model=kind, k=7)
    async with serving(repository) as pipeline:
        answer = await pipeline.recommend(request)
    assert len(answer.items) == 7
    check_ranked(answer, models[kind], rank_scores(models[kind], request))


async def test_retrieve_then_rank(
    repository: ModelRepository, models: dict[str, HSTUModel]
) -> None:
    request = dataclasses.replace(a_request(8, length=20, k=5), candidates=None)
    async with serving(repository) as pipeline:
        answer = await pipeline.recommend(request)
    found = [item for item, _ in retrieved(models["research"], request)[:20]]
    expected = rank_scores(
        models["mtgr"], dataclasses.replace(request, candidates=Candidates(np.array(found)))
    )
    best = sorted(expected, key=lambda item: -sum(expected[item]))[:5]
    assert [item.item_id for item in answer.items] == best
    check_ranked(answer, models["mtgr"], expected)
    assert [(s.task, s.model) for s in answer.stages] == [
        (Task.RETRIEVE, "research"),
        (Task.RANK, "mtgr"),
    ]


async def test_generation(tmp_path: Path) -> None:
    """Alone, and as what a ranker ranks: never what was seen, and as the engine itself says."""
    model = load_sid(write(tmp_path, SID))
    write(tmp_path, "mtgr")
    repository = ModelRepository(tmp_path)
    made = PipelineSpec("made", generate=SID, rank="mtgr", retrieve_k=20, default=True)
    plain = dataclasses.replace(a_request(8, length=15, k=5), candidates=None)
    env = Environment(registry())
    pipeline = Pipeline(repository, [ModelSpec(SID), ModelSpec("mtgr")], [made], env)
    await pipeline.start()
    try:
        alone = await pipeline.recommend(dataclasses.replace(plain, model=SID))
        ranked = await pipeline.recommend(plain)
    finally:
        await pipeline.close()
    seen = set(plain.history.item_ids.tolist())

    def found(k: int) -> list[tuple[int, float]]:
        encoded = encode(model, Task.GENERATE, plain, k + len(seen))
        (result,) = engine_of(model).infer([encoded])
        assert result.indices is not None
        ids = model.catalogue.ids_of(result.indices).tolist()
        pairs = zip(ids, result.scores.tolist(), strict=True)
        return [(item, score) for item, score in pairs if item not in seen][:k]

    assert [item.item_id for item in alone.items] == [item for item, _ in found(5)]
    scores = [score for _, score in found(5)]
    assert [item.score for item in alone.items] == pytest.approx(scores, abs=TOLERANCE)
    assert [(s.task, s.engine, s.tokens) for s in alone.stages] == [(Task.GENERATE, "torch", 46)]
    assert [(s.task, s.model) for s in ranked.stages] == [
        (Task.GENERATE, SID),
        (Task.RANK, "mtgr"),
    ]
    candidates = Candidates(np.array([item for item, _ in found(20)]))
    ranker = load(repository.bundle("mtgr"))
    expected = rank_scores(ranker, dataclasses.replace(plain, candidates=candidates))
    best = sorted(expected, key=lambda item: -sum(expected[item]))[:5]
    assert [item.item_id for item in ranked.items] == best
    check_ranked(ranked, ranker, expected)


async def test_many_at_once_are_answered_as_alone(
    repository: ModelRepository, models: dict[str, HSTUModel]
) -> None:
    requests = [
        a_request(seed, length=(7 * seed) % 31, candidates=1 + seed % 9, model=KINDS[seed % 3])
        for seed in range(24)
    ]
    async with serving(repository) as pipeline:
        answers = await asyncio.gather(*map(pipeline.recommend, requests))
    assert max(stage.batch_size for a in answers for stage in a.stages) > 1
    for request, answer in zip(requests, answers, strict=True):
        model = models[request.model]
        check_ranked(answer, model, rank_scores(model, request))


async def test_histories_of_every_kind(
    repository: ModelRepository, models: dict[str, HSTUModel]
) -> None:
    """Empty, unknown, out of order, as strings, and as long as there is."""
    plain = a_request(2, length=20, candidates=6)
    shuffled = np.random.default_rng(0).permutation(20)
    out_of_order = History(
        plain.history.item_ids[shuffled],
        plain.history.timestamps_ms[shuffled],
        {name: column[shuffled] for name, column in plain.history.signals.items()},
    )
    as_text = dataclasses.replace(
        plain.history, item_ids=plain.history.item_ids.astype(str).astype(object)
    )
    n = 100_000
    long = History(
        np.resize(np.array(IDS), n),
        NOW_MS - 1000 * np.arange(n, 0, -1),
        {"watched": np.ones(n, np.float32)},
    )
    unknown = History(np.arange(5), np.full(5, NOW_MS - 1))
    async with serving(repository) as pipeline:
        for kind in KINDS:

            async def scores(history: History, kind: str = kind) -> dict[Any, float]:
                answer = await pipeline.recommend(
                    dataclasses.replace(plain, history=history, model=kind)
                )
                assert len(answer.items) == 6
                return {item.item_id: item.score for item in answer.items}

            expected = await scores(plain.history)
            for same in (out_of_order, as_text):
                assert await scores(same) == pytest.approx(expected, abs=TOLERANCE)
            assert await scores(unknown) == pytest.approx(await scores(History()), abs=TOLERANCE)
            kept = long.timestamps_ms[-24:]
            newest = History(long.item_ids[-24:], kept, {"watched": long.signals["watched"][-24:]})
            assert await scores(long) == pytest.approx(await scores(newest), abs=TOLERANCE)
        answer = await pipeline.recommend(
            dataclasses.replace(plain, history=long, candidates=None, model="research")
        )
        assert answer.items == [], "everything was seen"
        assert answer.stages[0].tokens == 24


async def test_a_repeated_request_is_answered_from_the_cache(repository: ModelRepository) -> None:
    caches = {CacheKind.RESULTS: MemoryCache(2**20)}
    async with serving(repository, caches=caches) as pipeline:
        request = dataclasses.replace(a_request(length=10), candidates=None)
        first, second = [await pipeline.recommend(request) for _ in range(2)]
        assert first.items == second.items
        assert [s.tokens_reused for s in second.stages] == [s.tokens for s in first.stages]
        # A feature of the user, a second, or a behaviour more is another request.
        later = dataclasses.replace(request, request_time_ms=NOW_MS + 1000)
        for other in (later, dataclasses.replace(request, user_features={"gender": "f"})):
            third = await pipeline.recommend(other)
            assert third.stages[-1].tokens_reused == 0


async def test_what_is_wrong_is_named(repository: ModelRepository) -> None:
    async with serving(repository) as pipeline:
        wrong = a_request(model="mtgr", head_weights={"retention": 1.0}, k=10**9)
        with pytest.raises(InvalidRequest) as refused:
            await pipeline.recommend(wrong)
        assert {v.field: v.message for v in refused.value.violations} == {
            "k": "1000000000, expected 1 to 1000",
            "head_weights['retention']": "no such head; there are: recommendation, engagement",
        }
        nothing = dataclasses.replace(a_request(model="mtgr"), candidates=None)
        with pytest.raises(InvalidRequest, match="mtgr has no model that retrieves"):
            await pipeline.recommend(nothing)


async def test_models_are_described(repository: ModelRepository) -> None:
    async with serving(repository) as pipeline:
        served = {model.name: model for model in pipeline.models()}
    assert served["demo"].stages == {Task.RETRIEVE: "research", Task.RANK: "mtgr"}
    (mtgr,) = served["mtgr"].versions
    assert (mtgr.architecture, mtgr.catalogue_size) == ("mtgr", ITEMS)
    assert mtgr.heads == ("recommendation", "engagement")
    assert mtgr.notes == ("weights: the bundle's own",)
    assert mtgr.plan[Task.RANK].startswith("mtgr → torch (")


async def test_a_damaged_new_version_never_replaces_a_good_one(tmp_path: Path) -> None:
    write(tmp_path, "ranking")
    repository = ModelRepository(tmp_path)
    request = a_request(model="ranking")
    async with serving(repository, [ModelSpec("ranking")]) as pipeline:
        before = await pipeline.recommend(request)
        write(tmp_path, "ranking", version="2", state={"x": torch.zeros(1)})
        await pipeline._rollout.follow()
        after = await pipeline.recommend(request)
        assert after.stages[0].version == "1"
        assert after.items == before.items
        write(tmp_path, "ranking", version="3")
        await pipeline._rollout.follow()
        newest = await pipeline.recommend(request)
        assert newest.stages[0].version == "3"


async def test_a_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    write(tmp_path, "mtgr", state={"x": torch.zeros(1)})
    with pytest.raises(BundleError, match=r"model\.safetensors: .* is missing"):
        async with serving(ModelRepository(tmp_path), [ModelSpec("mtgr")]):
            pass
    write(tmp_path, "mtgr")
    for spec, message in (
        (ModelSpec("mtgr", strategy="tensorrt"), "tensorrt"),
        (ModelSpec("mtgr", strategy="baseline", dtype="int8"), "int8"),
        (ModelSpec("mtgr", strategy="baseline", options={"graphs": True}), "no option 'graphs'"),
    ):
        with pytest.raises(PlanError, match=message):
            async with serving(ModelRepository(tmp_path), [spec]):
                pass
