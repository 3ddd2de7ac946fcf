"""A request's whole way: routes, stages, answers, and everything that may be wrong with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core import Candidates, History, RankedItem, Recommendation, RecommendRequest, Task
from gr_core.batcher import BatchingOptions
from gr_core.caches.memory import MemoryCache
from gr_core.contracts import CacheKind, Health
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from gr_core.observers import DropEvent, LoadEvent, Observer, RequestEvent
from gr_core.pipeline import Pipeline, PipelineSpec
from gr_core.repository import ModelRepository
from gr_core.types import item_id_array
from gr_core.validation import Limits

from .helpers import (
    NOW_MS,
    Lab,
    MeanModel,
    engine_threads,
    environment,
    request,
    serving,
    until,
    write_model,
)

HISTORY = (100, 101, 102)
SHORTS = PipelineSpec("shorts", retrieve="finder", rank="ranker", retrieve_k=10, default=True)


class Platform:
    """The models ``both``, ``finder`` (retrieves) and ``ranker`` (ranks), and one engine's lab."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = Lab()
        write_model(folder, "both")
        write_model(folder, "finder", tasks=(Task.RETRIEVE,), seed=1)
        # It does not know the items 100 and 120, and knows one that the others do not.
        known = [i for i in range(100, 141) if i not in (100, 120)]
        write_model(folder, "ranker", tasks=(Task.RANK,), ids=known, seed=2)

    def model(self, name: str, version: str = "") -> MeanModel:
        return MeanModel(ModelRepository(self.folder).bundle(name, version))

    def environment(self, **options: Any) -> Environment:
        return environment(lab=self.lab, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repository")


@pytest.fixture(scope="module")
def platform(folder: Path) -> Platform:
    return Platform(folder)


class Serve(Protocol):
    def __call__(
        self, models: Sequence[ModelSpec] = (), pipelines: Sequence[PipelineSpec] = ..., **env: Any
    ) -> AbstractAsyncContextManager[Pipeline]: ...


@pytest.fixture
def serve(platform: Platform) -> Iterator[Serve]:
    before = engine_threads()
    platform.lab = Lab()

    @asynccontextmanager
    async def run(
        models: Sequence[ModelSpec] = (),
        pipelines: Sequence[PipelineSpec] = (SHORTS,),
        limits: Limits | None = None,
        **env: Any,
    ) -> AsyncIterator[Pipeline]:
        async with serving(
            platform.folder, platform.environment(**env), models, pipelines, limits=limits
        ) as pipeline:
            try:
                yield pipeline
            finally:
                platform.lab.release()

    yield run
    assert platform.lab.alive == 0
    assert engine_threads() == before


def ids(answer: Recommendation) -> list[int | str]:
    return [item.item_id for item in answer.items]


async def violations(pipeline: Pipeline, wrong: RecommendRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        await pipeline.recommend(wrong)
    return {v.field: v.message for v in refused.value.violations}


# ── One model ─────────────────────────────────────────────────────────────────────────────────


async def test_retrieval_gives_the_best_unseen_items(platform: Platform, serve: Serve) -> None:
    model = platform.model("both")
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(HISTORY, model="both", k=5, request_id="r1"))
    assert ids(answer) == model.best(HISTORY, 5, without=HISTORY)
    scores = model.click_scores(HISTORY)
    for item in answer.items:
        index = model.catalogue.indices_of(np.array([item.item_id])).item()
        assert item.score == pytest.approx(scores[index], rel=1e-5)
        assert item.title == f"title of {item.item_id}"
        assert item.head_scores == {}
    (stage,) = answer.stages
    assert (stage.task, stage.model, stage.version, stage.engine) == (
        Task.RETRIEVE,
        "both",
        "1",
        "numpy",
    )
    assert (stage.batch_size, stage.tokens, stage.tokens_reused) == (1, 3, 0)
    assert answer.request_id == "r1"
    assert 0 <= answer.features_s <= answer.total_s
    assert 0 < stage.compute_s <= answer.total_s
    assert (answer.unknown_items, list(answer.unscored_item_ids)) == (0, [])


async def test_ranking_scores_the_candidates_by_every_head(
    platform: Platform, serve: Serve
) -> None:
    candidates = [130, 110, 125, 111]
    async with serve() as pipeline:
        answer = await pipeline.recommend(
            request(HISTORY, model="both", k=3, candidates=candidates, head_weights={"click": 1})
        )
    model = platform.model("both")
    scores = model.click_scores(HISTORY)
    best = sorted(candidates, key=lambda i: -scores[i - 99])[:3]
    assert ids(answer) == best
    for item in answer.items:
        click = scores[item.item_id - 99]  # type: ignore[operator]
        assert item.head_scores == pytest.approx({"click": click, "like": -click}, rel=1e-5)
        assert item.score == pytest.approx(click, rel=1e-5)
    assert [s.task for s in answer.stages] == [Task.RANK]
    assert answer.stages[0].tokens == 7


async def test_head_weights_make_the_score(platform: Platform, serve: Serve) -> None:
    candidates = [130, 110, 125, 111]
    asked = request(HISTORY, model="both", candidates=candidates, head_weights={"like": 2.0})
    async with serve() as pipeline:
        answer = await pipeline.recommend(asked)
        wrong = await violations(
            pipeline, request(HISTORY, model="both", head_weights={"lik": 1, "click": 1}, k=0)
        )
    assert [item.score for item in answer.items] == sorted(
        (item.score for item in answer.items), reverse=True
    )
    for item in answer.items:
        assert item.score == pytest.approx(2 * item.head_scores["like"], rel=1e-6)
    assert wrong == {
        "k": "0, expected 1 to 1000",
        "head_weights['lik']": "no such head; there are: click, like",
    }


async def test_the_task_can_be_forced(platform: Platform, serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(
            request(HISTORY, model="both", task=Task.RETRIEVE, candidates=[130], k=4)
        )
        assert ids(answer) == platform.model("both").best(HISTORY, 4, without=HISTORY)
        assert "candidates" in await violations(
            pipeline, request(HISTORY, model="both", task=Task.RANK)
        )
        wrong = await violations(pipeline, request(HISTORY, model="both", task=Task.GENERATE))
        assert wrong == {"task": "both has no model that generates"}


@asynccontextmanager
async def generating(
    folder: Path, lab: Lab, pipelines: Sequence[PipelineSpec] = ()
) -> AsyncIterator[tuple[Pipeline, MeanModel]]:
    """Serves ``maker``, which only generates, beside ``ranker`` and ``finder``."""
    maker = write_model(folder, "maker", tasks=(Task.GENERATE,), seed=3)
    write_model(folder, "ranker", tasks=(Task.RANK,), seed=2)
    write_model(folder, "finder", tasks=(Task.RETRIEVE,), seed=1)
    async with serving(folder, environment(lab=lab), (), pipelines) as pipeline:
        yield pipeline, MeanModel(maker)


async def test_a_model_that_only_generates_answers(tmp_path: Path) -> None:
    async with generating(tmp_path, Lab()) as (pipeline, maker):
        for task in (None, Task.GENERATE):
            answer = await pipeline.recommend(request(HISTORY, model="maker", task=task, k=4))
            assert ids(answer) == maker.best(HISTORY, 4, without=HISTORY)
            assert answer.items[0].title == f"title of {answer.items[0].item_id}"
            (stage,) = answer.stages
            assert (stage.task, stage.model, stage.engine) == (Task.GENERATE, "maker", "numpy")
        wrong = await violations(pipeline, request(HISTORY, model="maker", candidates=[110]))
        assert wrong == {"task": "maker has no model that ranks; leave out the candidates"}
        (served,) = (m for m in pipeline.models() if m.name == "maker")
        assert served.stages == {Task.GENERATE: "maker"}
        assert served.versions[0].engines == {Task.GENERATE: "numpy"}


async def test_generated_items_are_ranked(tmp_path: Path) -> None:
    spec = PipelineSpec("made", generate="maker", rank="ranker", retrieve_k=6, default=True)
    async with generating(tmp_path, Lab(), [spec]) as (pipeline, maker):
        answer = await pipeline.recommend(request(HISTORY, k=6))
        assert [s.task for s in answer.stages] == [Task.GENERATE, Task.RANK]
        found = maker.best(HISTORY, 6, without=HISTORY)
        assert sorted(ids(answer), key=str) == sorted(found, key=str)
        ranker = MeanModel(ModelRepository(tmp_path).bundle("ranker"))
        assert ids(answer) == [i for i in ranker.best(HISTORY, 40) if i in found]
        alone = await pipeline.recommend(request(HISTORY, k=3, task=Task.GENERATE))
        assert ids(alone) == found[:3]
        wrong = await violations(pipeline, request(HISTORY, version="1"))
        assert "ranker and maker, in their active versions" in wrong["version"]


async def test_a_request_may_ask_for_generation_beside_retrieval(tmp_path: Path) -> None:
    spec = PipelineSpec("two", retrieve="finder", generate="maker", default=True)
    async with generating(tmp_path, Lab(), [spec]) as (pipeline, maker):
        (stage,) = (await pipeline.recommend(request(HISTORY))).stages
        assert (stage.task, stage.model) == (Task.RETRIEVE, "finder")
        answer = await pipeline.recommend(request(HISTORY, task=Task.GENERATE, k=5))
        assert ids(answer) == maker.best(HISTORY, 5, without=HISTORY)


async def test_seen_and_excluded_items_are_not_generated(tmp_path: Path) -> None:
    lab = Lab()
    twice = (*HISTORY, 100, 100, 101)
    async with generating(tmp_path, lab) as (pipeline, maker):
        banned = maker.best(HISTORY, 3, without=HISTORY)[1:]
        answer = await pipeline.recommend(
            request(twice, model="maker", k=5, exclude_item_ids=item_id_array(banned))
        )
        assert ids(answer) == maker.best(twice, 5, without=(*HISTORY, *banned))
        seen = await pipeline.recommend(request(twice, model="maker", k=5, include_seen=True))
        assert ids(seen) == maker.best(twice, 5)
    asked = [encoded.k for batch in lab.batches for encoded in batch]
    assert asked[-2:] == [5 + 3 + 2, 5], "an item that is left out twice is asked for once"


async def test_seen_and_excluded_items_are_left_out(platform: Platform, serve: Serve) -> None:
    model = platform.model("both")
    best = model.best(HISTORY, 40)
    async with serve() as pipeline:

        async def retrieved(**fields: Any) -> list[int | str]:
            return ids(await pipeline.recommend(request(HISTORY, model="both", k=6, **fields)))

        seen = [i for i in best if i not in HISTORY]
        assert await retrieved() == seen[:6]
        assert await retrieved(include_seen=True) == best[:6]
        banned = item_id_array([seen[0], seen[2], 9999])
        assert (
            await retrieved(exclude_item_ids=banned)
            == [i for i in seen if i not in banned.tolist()][:6]
        )
        assert (
            await retrieved(exclude_item_ids=banned, include_seen=True)
            == [i for i in best if i not in banned.tolist()][:6]
        )


async def test_what_is_seen_may_be_asked_for_as_a_candidate(serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(HISTORY, model="both", candidates=list(HISTORY)))
    assert sorted(ids(answer)) == sorted(HISTORY)


async def test_the_whole_catalogue_may_be_asked_for(platform: Platform, serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(HISTORY, model="both", k=1000))
        assert ids(answer) == platform.model("both").best(HISTORY, 40, without=HISTORY)
        assert len(answer.items) == 37
        everything = tuple(range(100, 140))
        answer = await pipeline.recommend(request(everything, model="both"))
        assert answer.items == []


async def test_unknown_items_are_counted_and_left_out(platform: Platform, serve: Serve) -> None:
    model = platform.model("both")
    async with serve() as pipeline:
        answer = await pipeline.recommend(request((7, 100, "x", 101), model="both", k=5))
        assert answer.unknown_items == 2
        assert ids(answer) == model.best((100, 101), 5, without=(100, 101))
        nobody = await pipeline.recommend(request((7, 8), model="both", k=5))
        empty = await pipeline.recommend(request((), model="both", k=5))
        assert ids(nobody) == ids(empty) == model.best((), 5)
        assert (nobody.unknown_items, empty.unknown_items) == (2, 0)


async def test_unknown_candidates_are_named_and_the_others_scored(serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(
            request(HISTORY, model="ranker", candidates=[110, 120, 5, 111])
        )
        assert sorted(ids(answer)) == [110, 111]
        assert list(answer.unscored_item_ids) == [120, 5]
        assert answer.unknown_items == 1

        answer = await pipeline.recommend(request(HISTORY, model="ranker", candidates=[120, 5]))
        assert answer.items == []
        assert list(answer.unscored_item_ids) == [120, 5]
        assert answer.stages == (), "nothing was computed"


async def test_string_ids_are_answered_by_the_catalogues_own(serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(
            request([str(i) for i in HISTORY], model="both", candidates=["130", "110"])
        )
    assert sorted(ids(answer)) == [110, 130]  # type: ignore[type-var]
    assert answer.unknown_items == 0


async def test_the_order_of_candidates_changes_no_score(serve: Serve) -> None:
    forward, backward = [110, 111, 112, 113], [113, 112, 111, 110]

    def by_id(answer: Recommendation) -> dict[Any, RankedItem]:
        return {item.item_id: item for item in answer.items}

    async with serve() as pipeline:
        answers = [
            by_id(await pipeline.recommend(request(HISTORY, model="both", candidates=order)))
            for order in (forward, backward)
        ]
    assert answers[0] == answers[1]


async def test_a_request_gets_an_id_and_a_time(serve: Serve) -> None:
    asked = RecommendRequest(History(), model="both")
    async with serve() as pipeline:
        first, second = [await pipeline.recommend(asked) for _ in range(2)]
    assert first.request_id
    assert first.request_id != second.request_id


# ── Two models ────────────────────────────────────────────────────────────────────────────────


async def test_what_is_retrieved_is_ranked(platform: Platform, serve: Serve) -> None:
    finder, ranker = platform.model("finder"), platform.model("ranker")
    found = finder.best(HISTORY, 10, without=HISTORY)
    async with serve() as pipeline:
        answer = await pipeline.recommend(
            request(HISTORY, k=4, head_weights={"click": 1}, request_id="r")
        )
    known = [item for item in found if item != 120]
    scores = ranker.click_scores(HISTORY)
    index = ranker.catalogue.indices_of(np.array(known))
    expected = [known[i] for i in np.argsort(-scores[index], kind="stable")]
    assert ids(answer) == expected[:4]
    assert [(s.task, s.model) for s in answer.stages] == [
        (Task.RETRIEVE, "finder"),
        (Task.RANK, "ranker"),
    ]
    assert all(set(item.head_scores) == {"click", "like"} for item in answer.items)
    assert answer.unknown_items == 1, "of the model that knows fewer"
    assert list(answer.unscored_item_ids) == [i for i in found if i == 120]


async def test_a_pipeline_retrieves_at_least_what_is_asked_for(serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(HISTORY, k=30))
    assert len(answer.items) + len(answer.unscored_item_ids) == 30


async def test_a_pipeline_does_one_stage_where_asked(platform: Platform, serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(HISTORY, k=3, task=Task.RETRIEVE))
        assert [s.model for s in answer.stages] == ["finder"]
        assert ids(answer) == platform.model("finder").best(HISTORY, 3, without=HISTORY)
        answer = await pipeline.recommend(request(HISTORY, candidates=[110, 111]))
        assert [s.model for s in answer.stages] == ["ranker"]
        answer = await pipeline.recommend(request(HISTORY, model="finder", k=3))
        assert [s.model for s in answer.stages] == ["finder"]


async def test_a_pipeline_may_leave_retrieved_items_as_they_are(
    platform: Platform, serve: Serve
) -> None:
    spec = PipelineSpec("shorts", retrieve="finder", rank="ranker", rerank=False)
    async with serve(pipelines=[spec]) as pipeline:
        answer = await pipeline.recommend(request(HISTORY, k=3, model="shorts"))
        assert [s.model for s in answer.stages] == ["finder"]
        answer = await pipeline.recommend(request(HISTORY, model="shorts", candidates=[110]))
        assert [s.model for s in answer.stages] == ["ranker"]


async def test_nothing_retrieved_is_nothing_ranked(serve: Serve) -> None:
    async with serve() as pipeline:
        answer = await pipeline.recommend(request(tuple(range(100, 140))))
    assert answer.items == []
    assert [s.task for s in answer.stages] == [Task.RETRIEVE]


# ── Routes ────────────────────────────────────────────────────────────────────────────────────


async def test_an_unknown_model_lists_those_that_are_served(serve: Serve) -> None:
    async with serve() as pipeline:
        with pytest.raises(
            NotFound, match="model: 'botch' is not served; there are: shorts, both, finder, ranker"
        ):
            await pipeline.recommend(request(HISTORY, model="botch"))


async def test_models_are_described(serve: Serve) -> None:
    async with serve() as pipeline:
        served = {model.name: model for model in pipeline.models()}
    assert list(served) == ["shorts", "both", "finder", "ranker"]
    assert [m.name for m in served.values() if m.default] == ["shorts"]
    shorts = served["shorts"]
    assert shorts.stages == {Task.RETRIEVE: "finder", Task.RANK: "ranker"}
    assert [v.model for v in shorts.versions] == ["finder", "ranker"]
    assert served["ranker"].stages == {Task.RANK: "ranker"}
    (both,) = served["both"].versions
    assert (both.version, both.active, both.architecture) == ("1", True, "mean")
    assert (both.tasks, both.heads) == ((Task.RETRIEVE, Task.RANK), ("click", "like"))
    assert both.engines == {Task.RETRIEVE: "numpy", Task.RANK: "numpy"}
    assert both.catalogue_size == 40
    assert both.notes == ("weights: the bundle's own",)
    assert both.plan[Task.RANK].startswith("mean → numpy (cpu, float32): ")


async def test_the_first_is_the_default_where_none_is_named(serve: Serve) -> None:
    async with serve(pipelines=()) as pipeline:
        answer = await pipeline.recommend(request(HISTORY))
        assert answer.stages[0].model == "both"
        assert [m.name for m in pipeline.models() if m.default] == ["both"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PipelineSpec("p", retrieve="nobody"), "pipelines.p.retrieve: 'nobody' is not a served"),
        (PipelineSpec("p", rank="finder"), "task rank; there are: both, ranker"),
        (PipelineSpec("p", retrieve="ranker"), "task retrieve; there are: both, finder"),
        (PipelineSpec("p", generate="both"), "pipelines.p.generate: .*there are: none"),
    ],
)
async def test_a_pipeline_of_models_that_cannot_is_refused(
    platform: Platform, serve: Serve, spec: PipelineSpec, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        async with serve(pipelines=[spec]):
            pass
    with pytest.raises(ConfigurationError, match="'p' occurs twice"):
        async with serve(pipelines=[PipelineSpec("p", rank="both")] * 2):
            pass


async def test_what_a_route_cannot_do_is_said(serve: Serve) -> None:
    async with serve() as pipeline:
        wrong = await violations(pipeline, request(HISTORY, model="finder", candidates=[110]))
        assert wrong == {"task": "finder has no model that ranks; leave out the candidates"}
        for nothing in (None, []):
            wrong = await violations(pipeline, request(HISTORY, model="ranker", candidates=nothing))
            assert wrong == {"candidates": "none given, and ranker has no model that retrieves"}
        wrong = await violations(pipeline, request(HISTORY, model="finder", head_weights={"x": 1}))
        assert wrong == {
            "head_weights['x']": "no such head; there are: none, finder has no model that ranks"
        }


async def test_all_that_is_wrong_is_told_at_once(platform: Platform, serve: Serve) -> None:
    history = History(np.array([100, 101]), np.array([-1, NOW_MS]), {"x": np.array([np.inf, 0])})
    wrong = RecommendRequest(
        history,
        candidates=Candidates(np.array([110, 110])),
        k=0,
        version="1",
        head_weights={"clack": np.nan},
        user_features={"age": np.inf},
    )
    async with serve() as pipeline:
        assert set(await violations(pipeline, wrong)) == {
            "k",
            "history.timestamps_ms[0]",
            "history.signals['x'][0]",
            "candidates.item_ids[1]",
            "head_weights['clack']",
            "user_features['age']",
            "version",
        }
    assert platform.lab.batches == []


async def test_limits_are_those_of_the_configuration(serve: Serve) -> None:
    async with serve(limits=Limits(max_k=3, max_history=2)) as pipeline:
        assert set(await violations(pipeline, request(HISTORY, k=4))) == {"k", "history"}


# ── Versions ──────────────────────────────────────────────────────────────────────────────────


async def test_a_request_may_choose_a_version(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    models = [MeanModel(write_model(folder, version=v)) for v in ("1", "2")]
    write_model(folder, "ranker", tasks=(Task.RANK,))
    spec = PipelineSpec("shorts", retrieve="mean", rank="ranker")
    specs = [ModelSpec("mean", versions=("1", "2")), ModelSpec("ranker")]
    async with serving(folder, environment(lab=Lab()), specs, [spec]) as pipeline:
        for version, model in zip(("1", "2", ""), (*models, models[1]), strict=True):
            answer = await pipeline.recommend(
                request(HISTORY, model="mean", version=version, k=5, task=Task.RETRIEVE)
            )
            assert answer.stages[0].version == (version or "2")
            assert ids(answer) == model.best(HISTORY, 5, without=HISTORY)
        for fields in ({}, {"head_weights": {"click": 1}}):
            with pytest.raises(NotFound, match="'3' of mean is not loaded; there are: 1, 2"):
                await pipeline.recommend(request(HISTORY, model="mean", version="3", **fields))
        wrong = await violations(pipeline, request(HISTORY, model="shorts", version="1"))
        assert "name one of these models" in wrong["version"]
        served = {m.name: m for m in pipeline.models()}
        assert [(v.version, v.active) for v in served["mean"].versions] == [
            ("1", False),
            ("2", True),
        ]


# ── The cache of results ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def results() -> MemoryCache:
    return MemoryCache(2**20)


async def test_the_same_request_is_computed_once(
    platform: Platform, serve: Serve, results: MemoryCache
) -> None:
    asked = request(HISTORY, k=4)
    async with serve(caches={CacheKind.RESULTS: results}) as pipeline:
        first, second = [await pipeline.recommend(asked) for _ in range(2)]
        assert len(platform.lab.batches) == 2
        assert first.items == second.items
        assert [s.tokens_reused for s in first.stages] == [0, 0]
        assert [s.tokens_reused for s in second.stages] == [s.tokens for s in first.stages]
        assert all(s.compute_s == s.queue_s == 0 for s in second.stages)
        told = pipeline.cache_statistics()[CacheKind.RESULTS]
        assert (told.hits, told.misses, told.entries) == (2, 2, 2)


async def test_caches_are_closed_with_the_pipeline(serve: Serve) -> None:
    closed = []

    class Closing(MemoryCache):
        def close(self) -> None:
            closed.append(self.statistics().entries)
            super().close()

    async with serve(caches={CacheKind.RESULTS: Closing(2**20)}) as pipeline:
        await pipeline.recommend(request(HISTORY, k=4))
        assert not closed
    assert closed == [2], "closed once, with what it held"


async def test_whatever_an_answer_depends_on_is_computed_anew(
    platform: Platform, serve: Serve, results: MemoryCache
) -> None:
    async with serve(caches={CacheKind.RESULTS: results}) as pipeline:
        different = [
            request(HISTORY, model="both"),
            request(HISTORY[::-1], model="both"),
            request(HISTORY[:2], model="both"),
            request(HISTORY, model="both", k=5),
            request(HISTORY, model="finder"),
            request(HISTORY, model="both", candidates=[110]),
            request(HISTORY, model="both", candidates=[111]),
            request(HISTORY, model="both", candidates=[110, 111]),
        ]
        for asked in different:
            answer = await pipeline.recommend(asked)
            assert answer.stages[0].tokens_reused == 0
        assert len(platform.lab.batches) == len(different)
        # Weights of heads, and whose request it is, change nothing that the engine computes.
        for fields in ({"head_weights": {"like": 1.0}}, {"user_id": "bob"}, {"request_id": "x"}):
            answer = await pipeline.recommend(
                request(HISTORY, model="both", candidates=[110, 111], **fields)
            )
            assert answer.stages[0].tokens_reused > 0


async def test_a_cached_result_does_not_keep_its_batch_in_memory(
    serve: Serve, results: MemoryCache
) -> None:
    """The engine's results are views of one array a batch, which the cache does not count."""
    kept: list[Any] = []

    class Spy(MemoryCache):
        def put(self, key: bytes, value: Any, size: int, owner: str = "") -> None:
            kept.append((value, size))

    async with serve(caches={CacheKind.RESULTS: Spy(2**20)}) as pipeline:
        await pipeline.recommend(request(HISTORY, model="both"))
    ((value, size),) = kept
    assert value.scores.base is None
    assert value.indices.base is None
    assert size == value.scores.nbytes + value.indices.nbytes


async def test_a_users_entries_are_dropped(
    platform: Platform, serve: Serve, results: MemoryCache
) -> None:
    async with serve(caches={CacheKind.RESULTS: results}) as pipeline:
        for user, history in (("ada", HISTORY), ("bob", HISTORY[:2])):
            await pipeline.recommend(request(history, user_id=user))
        assert pipeline.drop_user("ada") == 3  # two results and a history
        assert pipeline.drop_user("ada") == 0
        assert pipeline.drop_user("") == 0
        batches = len(platform.lab.batches)
        await pipeline.recommend(request(HISTORY[:2], user_id="bob"))
        assert len(platform.lab.batches) == batches
        await pipeline.recommend(request(HISTORY, user_id="ada"))
        assert len(platform.lab.batches) == batches + 2


async def test_a_new_version_never_reads_old_results(tmp_path: Path, results: MemoryCache) -> None:
    """Not even where a version was written anew under the same name."""
    folder, lab = tmp_path / "repository", Lab()
    env = environment(lab=lab, caches={CacheKind.RESULTS: results})
    asked = request(HISTORY, k=5, task=Task.RETRIEVE)
    for version, seed in (("1", 0), ("2", 0), ("1", 5)):
        model = MeanModel(write_model(folder, version=version, seed=seed, overwrite=True))
        async with serving(folder, env, [ModelSpec("mean", versions=(version,))]) as pipeline:
            for reused in (0, 3):
                answer = await pipeline.recommend(asked)
                assert answer.stages[0].tokens_reused == reused
                assert ids(answer) == model.best(HISTORY, 5, without=HISTORY)
    assert lab.sizes == [1, 1, 1]


# ── Load ──────────────────────────────────────────────────────────────────────────────────────


async def test_cancelling_a_request_drops_it_from_its_queue(
    platform: Platform, serve: Serve
) -> None:
    lab = platform.lab
    async with serve() as pipeline:
        lab.hold()
        first = asyncio.ensure_future(pipeline.recommend(request(HISTORY, model="both")))
        await lab.entered()
        second = asyncio.ensure_future(pipeline.recommend(request((103,), model="both")))
        await until(lambda: pipeline.queue_depths()["both/1/numpy"] == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        lab.release()
        await first
    assert lab.sizes == [1]


async def test_a_late_request_is_dropped(platform: Platform, serve: Serve) -> None:
    lab = platform.lab
    async with serve() as pipeline:
        with pytest.raises(DeadlineExceeded):
            await pipeline.recommend(request(HISTORY, deadline=time.monotonic() - 1))
        assert lab.batches == []
        lab.hold()
        first = asyncio.ensure_future(pipeline.recommend(request(HISTORY, model="both")))
        await lab.entered()
        deadline = time.monotonic() + 0.005
        late = asyncio.ensure_future(
            pipeline.recommend(request(HISTORY, model="both", deadline=deadline))
        )
        await until(lambda: time.monotonic() > deadline)
        lab.release()
        with pytest.raises(DeadlineExceeded, match="queue of both/numpy"):
            await late
        await first
    assert lab.sizes == [1]


async def test_overload_is_refused_at_once(platform: Platform, serve: Serve) -> None:
    lab = platform.lab
    async with serve(batching=BatchingOptions(max_queue=2)) as pipeline:
        lab.hold()
        asked = request(HISTORY, model="both")
        first = asyncio.ensure_future(pipeline.recommend(asked))
        await lab.entered()
        waiting = [asyncio.ensure_future(pipeline.recommend(asked)) for _ in range(2)]
        await until(lambda: pipeline.queue_depths()["both/1/numpy"] == 2)
        with pytest.raises(Overloaded, match="queue of both/numpy is full"):
            await pipeline.recommend(asked)
        # The other models have queues of their own.
        other = asyncio.ensure_future(pipeline.recommend(request(HISTORY, model="finder")))
        await lab.entered()
        lab.release()
        answers = await asyncio.gather(first, *waiting, other)
    assert answers[0].items == answers[1].items == answers[2].items


async def test_closing_answers_what_was_accepted(platform: Platform, serve: Serve) -> None:
    lab = platform.lab
    async with serve() as pipeline:
        lab.hold()
        first = asyncio.ensure_future(pipeline.recommend(request(HISTORY)))
        await lab.entered()
        waiting = [asyncio.ensure_future(pipeline.recommend(request(HISTORY))) for _ in range(3)]
        await until(lambda: pipeline.queue_depths()["finder/1/numpy"] == 3)
        closing = asyncio.ensure_future(pipeline.close())
        await asyncio.sleep(0)
        assert pipeline.health() == Health(False, "stopping")
        with pytest.raises(Unavailable, match="the server is stopping"):
            await pipeline.recommend(request(HISTORY))
        lab.release()
        answers = await asyncio.gather(first, *waiting)
        await closing
    assert all([s.task for s in a.stages] == [Task.RETRIEVE, Task.RANK] for a in answers)


async def test_health_follows_the_engines(platform: Platform, serve: Serve) -> None:
    async with serve() as pipeline:
        assert pipeline.health() == Health(True)
        platform.lab.health = Health(False, "the context is lost")
        assert pipeline.health() == Health(False, "both/1: the context is lost")
        platform.lab.health = Health(True)


async def test_the_longest_history_does_not_hold_up_the_event_loop(
    platform: Platform, serve: Serve
) -> None:
    """100,000 behaviours, as strings, with as many items to leave out."""
    n = 100_000
    many = request([str(100 + i % 60) for i in range(n)], model="both", k=5)
    gaps = []

    async def watch() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - before)

    async with serve() as pipeline:
        watching = asyncio.ensure_future(watch())
        answer = await pipeline.recommend(many)
        watching.cancel()
    assert answer.items == [], "all of the catalogue was seen"
    assert answer.unknown_items == sum(i % 60 >= 40 for i in range(n))
    assert answer.stages[0].tokens == n - answer.unknown_items
    assert max(gaps) < 0.2


# ── Observers ─────────────────────────────────────────────────────────────────────────────────


class Diary(Observer):
    def __init__(self) -> None:
        self.requests: list[RequestEvent] = []
        self.drops: list[DropEvent] = []
        self.loads: list[LoadEvent] = []

    def on_request(self, event: RequestEvent) -> None:
        self.requests.append(event)

    def on_drop(self, event: DropEvent) -> None:
        self.drops.append(event)

    def on_load(self, event: LoadEvent) -> None:
        self.loads.append(event)


async def test_every_request_is_told_with_its_outcome(serve: Serve) -> None:
    diary = Diary()
    late = time.monotonic() - 1
    async with serve(observers=[diary]) as pipeline:
        answer = await pipeline.recommend(request(HISTORY, request_id="a", candidates=[110, 111]))
        for wrong in (
            request(HISTORY, k=0, model="both"),
            request(HISTORY, model="nobody"),
            request(HISTORY, deadline=late),
        ):
            with pytest.raises((InvalidRequest, NotFound, DeadlineExceeded)):
                await pipeline.recommend(wrong)
    first = diary.requests[0]
    assert (first.request_id, first.history_length, first.candidates) == ("a", 3, 2)
    assert list(first.stages) == list(answer.stages)
    assert first.features_s > 0
    assert [(e.model, e.outcome) for e in diary.requests] == [
        ("shorts", "ok"),
        ("both", "InvalidRequest"),
        ("", "NotFound"),
        ("shorts", "DeadlineExceeded"),
    ]
    assert all(e.total_s >= 0 for e in diary.requests)
    assert [(d.model, d.engine, d.reason) for d in diary.drops] == [("finder", "numpy", "deadline")]
    assert sorted(f"{e.model} {e.state}" for e in diary.loads) == [
        f"{model} {state}"
        for model in ("both", "finder", "ranker")
        for state in ("ready", "unloaded")
    ]


async def test_a_cancelled_request_is_told_too(platform: Platform, serve: Serve) -> None:
    diary = Diary()
    async with serve(observers=[diary]) as pipeline:
        platform.lab.hold()
        task = asyncio.ensure_future(pipeline.recommend(request(HISTORY, model="both")))
        await platform.lab.entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        platform.lab.release()
    assert [e.outcome for e in diary.requests] == ["CancelledError"]


async def test_an_observer_that_fails_fails_no_request(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Observer):
        def fail(self, event: object) -> None:
            raise RuntimeError("the disk of the log is full")

        on_request = on_batch = on_drop = on_load = fail  # type: ignore[assignment]

    with caplog.at_level(logging.CRITICAL):
        async with serve(observers=[Broken()]) as pipeline:
            for _ in range(3):
                assert (await pipeline.recommend(request(HISTORY))).items


# ── All together ──────────────────────────────────────────────────────────────────────────────

items_st = st.lists(st.integers(95, 145), max_size=12)


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(
            items_st,
            st.integers(1, 50),
            st.booleans(),
            st.one_of(st.none(), st.lists(st.integers(95, 145), unique=True, max_size=12)),
            items_st,
        ),
        min_size=1,
        max_size=12,
    )
)
def test_requests_together_are_answered_as_alone(
    platform: Platform, asked: list[tuple[list[int], int, bool, list[int] | None, list[int]]]
) -> None:
    """Whatever comes with it in a batch, an answer is what plain numpy says."""
    model = platform.model("both")

    async def answers() -> list[Recommendation]:
        lab = Lab()
        env = environment(lab=lab)
        async with serving(platform.folder, env, [ModelSpec("both")]) as pipeline:
            lab.hold()
            asyncio.get_running_loop().call_later(0.005, lab.release)
            return await asyncio.gather(
                *(
                    pipeline.recommend(
                        request(
                            history,
                            k=k,
                            include_seen=include_seen,
                            candidates=candidates,
                            exclude_item_ids=item_id_array(excluded),
                            head_weights={"click": 1},
                        )
                    )
                    for history, k, include_seen, candidates, excluded in asked
                )
            )

    for (history, k, include_seen, candidates, excluded), answer in zip(
        asked, asyncio.run(answers()), strict=True
    ):
        scores = model.click_scores(history)
        assert answer.unknown_items == sum(not 100 <= i < 140 for i in history)
        if candidates:
            known = [i for i in candidates if 100 <= i < 140]
            expected = sorted(known, key=lambda i: -scores[i - 99])[:k]
            assert list(answer.unscored_item_ids) == [i for i in candidates if i not in known]
        else:
            without = [*excluded, *([] if include_seen else history)]
            expected = model.best(history, k, without=without)
        got = [item.score for item in answer.items]
        assert got == pytest.approx([float(scores[i - 99]) for i in expected], abs=1e-5)
        assert len(set(ids(answer))) == len(expected)
