"""One loaded version of a model: which engine it gets, and what requests to it may expect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gr_core import Task
from gr_core.batcher import BatchingOptions
from gr_core.contracts import EncodedRequest, Health
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.errors import (
    BundleError,
    DeadlineExceeded,
    Overloaded,
    PlanError,
    PluginError,
    Unavailable,
)
from gr_core.observers import BatchEvent, DropEvent, Observer
from gr_core.repository import ModelRepository

from .helpers import (
    PATIENCE_S,
    AsyncMeanEngine,
    Lab,
    MeanEngine,
    MeanModel,
    engine_descriptor,
    engine_threads,
    environment,
    request,
    until,
    write_model,
)

SPEC = ModelSpec("mean")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = engine_threads()
    yield
    assert engine_threads() == before


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    write_model(tmp_path / "repository")
    return ModelRepository(tmp_path / "repository")


@contextmanager
def loaded(
    repository: ModelRepository, env: Environment, spec: ModelSpec = SPEC
) -> Iterator[Deployment]:
    deployment = Deployment.load(repository.bundle("mean"), spec, env)
    try:
        yield deployment
    finally:
        deployment.close()


def encoded(
    deployment: Deployment, history: tuple[int, ...] = (100, 101), k: int = 3
) -> EncodedRequest:
    encoding = deployment.model.encode(request(history), Task.RETRIEVE)
    return EncodedRequest(Task.RETRIEVE, encoding.request.arrays, encoding.request.tokens, k=k)


def ids(deployment: Deployment, batched: Any) -> list[int]:
    found: list[int] = deployment.model.catalogue.ids_of(batched.result.indices).tolist()
    return found


# ── Which engine ──────────────────────────────────────────────────────────────────────────────


def test_the_tasks_share_an_engine(repository: ModelRepository, lab: Lab) -> None:
    with loaded(repository, environment(lab=lab)) as deployment:
        assert lab.loads == lab.alive == 1
        assert deployment.tasks == (Task.RETRIEVE, Task.RANK)
        assert {deployment.engine_name(task) for task in deployment.tasks} == {"numpy"}
        assert deployment.health().ok
        assert deployment.queue_depths() == {"mean/1/numpy": 0}
    assert lab.alive == 0
    assert isinstance(deployment.model, MeanModel)
    assert deployment.model.closed
    deployment.close()


def two_engines(lab: Lab, better: Lab, **changes: Any) -> Environment:
    return environment(
        engine_descriptor(lambda: MeanEngine(better), name="better", priority=5, **changes),
        lab=lab,
    )


async def test_auto_falls_back_when_the_best_engine_fails_to_load(
    repository: ModelRepository, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    better = Lab()

    def no_memory(model: object) -> None:
        raise MemoryError("8 GiB wanted")

    better.break_load = no_memory
    with caplog.at_level(logging.INFO), loaded(repository, two_engines(lab, better)) as deployment:
        assert deployment.engine_name(Task.RANK) == "numpy"
        assert "not better: failed to load: 8 GiB wanted" in deployment.plans[Task.RANK].reason
        answer = await deployment.infer(Task.RETRIEVE, encoded(deployment), None)
        assert ids(deployment, answer) == deployment.model.best([100, 101], 3)
    said = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in said] == [
        "mean: engine better failed to load, trying the next: 8 GiB wanted"
    ], "once, not once a task"
    assert better.loads == 1
    assert better.alive == 0


def test_an_explicit_strategy_raises_what_went_wrong(repository: ModelRepository, lab: Lab) -> None:
    better = Lab()

    def no_memory(model: object) -> None:
        raise MemoryError("8 GiB wanted")

    better.break_load = no_memory
    env, bundle = two_engines(lab, better), repository.bundle("mean")
    with pytest.raises(MemoryError, match="8 GiB wanted"):
        Deployment.load(bundle, ModelSpec("mean", strategy="better"), env)
    assert (lab.loads, better.alive) == (0, 0)
    with pytest.raises(PlanError, match="tensorrt"):
        Deployment.load(bundle, ModelSpec("mean", strategy="tensorrt"), env)


def test_when_every_engine_fails_each_reason_is_told(repository: ModelRepository, lab: Lab) -> None:
    better = Lab()

    def fail(word: str) -> Any:
        def raising(model: object) -> None:
            raise RuntimeError(f"no {word} here")

        return raising

    lab.break_load, better.break_load = fail("numpy"), fail("cuda")
    with pytest.raises(PlanError, match=r"(?s)no cuda here.*no numpy here"):
        Deployment.load(repository.bundle("mean"), SPEC, two_engines(lab, better))


def test_what_fails_late_leaves_nothing(repository: ModelRepository, lab: Lab) -> None:
    """The second task has no engine; that of the first is closed again."""
    models: list[MeanModel] = []
    lab.break_load = models.append  # type: ignore[assignment]
    env = environment(engine_descriptor(lambda: MeanEngine(lab), tasks=(Task.RETRIEVE,)))
    with pytest.raises(PlanError, match="rank"):
        Deployment.load(repository.bundle("mean"), SPEC, env)
    assert lab.loads == 1
    assert lab.alive == 0
    assert models[0].closed


def test_an_engine_that_fails_to_warm_up_is_closed(repository: ModelRepository, lab: Lab) -> None:
    class Cold(MeanEngine):
        def warm_up(self) -> None:
            raise RuntimeError("the first kernel failed")

    env = environment(engine_descriptor(lambda: Cold(lab)))
    with pytest.raises(PlanError, match="the first kernel failed"):
        Deployment.load(repository.bundle("mean"), SPEC, env)
    assert lab.loads == 1
    assert lab.alive == 0


@pytest.mark.parametrize(
    ("engine", "batches_itself"), [(MeanEngine, True), (AsyncMeanEngine, False)]
)
def test_an_engine_must_batch_as_its_descriptor_says(
    repository: ModelRepository, lab: Lab, engine: type[MeanEngine], batches_itself: bool
) -> None:
    env = environment(engine_descriptor(lambda: engine(lab), batches_itself=batches_itself))
    with pytest.raises(PlanError, match=f"numpy: batches_itself is {batches_itself}"):
        Deployment.load(repository.bundle("mean"), SPEC, env)
    assert lab.loads == 0


def test_the_engine_gets_the_options(repository: ModelRepository, lab: Lab) -> None:
    made: list[MeanEngine] = []

    def make() -> MeanEngine:
        made.append(MeanEngine(lab))
        return made[-1]

    env = environment(
        engine_descriptor(make, dtypes=("float32", "bfloat16")),
        batching=BatchingOptions(max_batch_size=7, max_batch_tokens=99),
    )
    spec = ModelSpec("mean", dtype="bfloat16", device="cpu", threads=3, options={"depth": 2})
    with loaded(repository, env, spec):
        options = made[0].options
    assert (options.device, options.dtype, options.threads) == ("cpu", "bfloat16", 3)
    assert (options.max_batch_size, options.max_batch_tokens) == (7, 99)
    assert options.extra == {"depth": 2}
    assert made[0].tasks == [Task.RETRIEVE, Task.RANK]


def test_a_bundle_that_cannot_be_used_is_refused(repository: ModelRepository, lab: Lab) -> None:
    env = environment(lab=lab)
    bundle = repository.bundle("mean")
    with pytest.raises(PluginError, match="model 'mean' cannot be used"):
        Deployment.load(bundle, SPEC, Environment(registry=type(env.registry).of()))
    bundle.weights_path.write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.safetensors: 0 bytes"):
        Deployment.load(bundle, SPEC, env)
    wrong = write_model(repository.path, version="2", rows=7)
    with pytest.raises(BundleError, match="vectors: 7 rows"):
        Deployment.load(wrong, SPEC, env)
    assert lab.loads == 0


# ── An engine that dies ───────────────────────────────────────────────────────────────────────


async def test_a_dead_engine_is_unavailable_not_a_fault(
    repository: ModelRepository, lab: Lab
) -> None:
    def crash(batch: object) -> None:
        raise RuntimeError("CUDA error: device-side assert")

    with loaded(repository, environment(lab=lab)) as deployment:
        lab.break_infer = crash
        with pytest.raises(RuntimeError, match="device-side assert"):
            await deployment.infer(Task.RETRIEVE, encoded(deployment), None)
        lab.health = Health(False, "the context is lost")
        with pytest.raises(Unavailable, match="engine numpy: the context is lost") as raised:
            await deployment.infer(Task.RETRIEVE, encoded(deployment), None)
        assert "device-side assert" in str(raised.value.__cause__)
        assert deployment.health() == Health(False, "mean/1: the context is lost")


# ── Engines that batch by themselves ──────────────────────────────────────────────────────────


class Notes(Observer):
    def __init__(self) -> None:
        self.drops: list[str] = []
        self.batches: list[BatchEvent] = []

    def on_drop(self, event: DropEvent) -> None:
        assert (event.model, event.engine) == ("mean", "numpy")
        self.drops.append(event.reason)

    def on_batch(self, event: BatchEvent) -> None:
        self.batches.append(event)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def self_batching(
    repository: ModelRepository, lab: Lab, notes: Notes
) -> Iterator[tuple[Deployment, AsyncMeanEngine]]:
    made: list[AsyncMeanEngine] = []

    def make() -> AsyncMeanEngine:
        made.append(AsyncMeanEngine(lab))
        return made[-1]

    env = environment(
        engine_descriptor(make, batches_itself=True),
        batching=BatchingOptions(max_queue=3),
        observers=[notes],
    )
    with loaded(repository, env) as deployment:
        yield deployment, made[0]


async def test_an_async_engine_answers_requests_together(self_batching, lab: Lab) -> None:
    deployment, _ = self_batching
    lab.hold()
    histories = [(100,), (100, 101), (102,)]
    tasks = [
        asyncio.ensure_future(deployment.infer(Task.RETRIEVE, encoded(deployment, h), None))
        for h in histories
    ]
    for _ in tasks:
        await lab.entered()
    assert deployment.queue_depths() == {"mean/1/numpy": 3}
    lab.release()
    answers = await asyncio.gather(*tasks)
    for history, answer in zip(histories, answers, strict=True):
        assert ids(deployment, answer) == deployment.model.best(history, 3)
    assert deployment.queue_depths() == {"mean/1/numpy": 0}


async def test_an_async_engine_is_bounded(self_batching, lab: Lab, notes: Notes) -> None:
    deployment, _ = self_batching
    lab.hold()
    tasks = [
        asyncio.ensure_future(deployment.infer(Task.RETRIEVE, encoded(deployment), None))
        for _ in range(3)
    ]
    for _ in tasks:
        await lab.entered()
    with pytest.raises(Overloaded, match="3 requests in flight") as refused:
        await deployment.infer(Task.RETRIEVE, encoded(deployment), None)
    assert refused.value.retry_after_s > 0
    assert notes.drops == ["full"]
    lab.release()
    await asyncio.gather(*tasks)
    await deployment.infer(Task.RETRIEVE, encoded(deployment), None)


async def test_an_async_engine_is_stopped_at_the_deadline(
    self_batching, lab: Lab, notes: Notes
) -> None:
    deployment, engine = self_batching
    lab.hold()
    with pytest.raises(DeadlineExceeded, match="the deadline passed in the engine"):
        await deployment.infer(Task.RETRIEVE, encoded(deployment), time.monotonic() + 0.02)
    assert engine.aborted == 1
    late = encoded(deployment)
    with pytest.raises(DeadlineExceeded, match="before the engine was asked"):
        await deployment.infer(Task.RETRIEVE, late, time.monotonic() - 1)
    assert all(late is not begun for batch in lab.batches for begun in batch)
    assert notes.drops == ["deadline", "deadline"]
    lab.release()
    soon = time.monotonic() + PATIENCE_S
    await deployment.infer(Task.RETRIEVE, encoded(deployment), soon)


async def test_cancelling_aborts_the_work_of_an_async_engine(self_batching, lab: Lab) -> None:
    deployment, engine = self_batching
    lab.hold()
    task = asyncio.ensure_future(deployment.infer(Task.RETRIEVE, encoded(deployment), None))
    await lab.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.aborted == 1
    assert deployment.queue_depths() == {"mean/1/numpy": 0}
    lab.release()


async def test_a_timeout_of_the_engines_own_is_no_deadline(self_batching, lab: Lab) -> None:
    def time_out(batch: object) -> None:
        raise TimeoutError("no answer from the worker")

    deployment, _ = self_batching
    lab.break_infer = time_out
    for deadline in (None, time.monotonic() + PATIENCE_S):
        with pytest.raises(TimeoutError, match="no answer from the worker"):
            await deployment.infer(Task.RETRIEVE, encoded(deployment), deadline)


# ── The end ───────────────────────────────────────────────────────────────────────────────────


async def test_it_is_freed_when_its_last_request_is_answered(
    repository: ModelRepository, lab: Lab
) -> None:
    deployment = Deployment.load(repository.bundle("mean"), SPEC, environment(lab=lab))
    lab.hold()

    async def use() -> list[int]:
        with deployment.lease():
            return ids(deployment, await deployment.infer(Task.RETRIEVE, encoded(deployment), None))

    using = asyncio.ensure_future(use())
    await lab.entered()
    retiring = asyncio.ensure_future(deployment.retire())
    await asyncio.sleep(0.01)
    assert not retiring.done()
    assert lab.alive == 1
    lab.release()
    assert await using == deployment.model.best([100, 101], 3)
    await retiring
    assert lab.alive == 0
    with pytest.raises(Unavailable, match="mean/numpy is closing"):
        await deployment.infer(Task.RETRIEVE, encoded(deployment), None)


async def test_batches_are_told_to_observers(
    repository: ModelRepository, lab: Lab, notes: Notes
) -> None:
    with loaded(repository, environment(lab=lab, observers=[notes])) as deployment:
        lab.hold()
        first = asyncio.ensure_future(deployment.infer(Task.RETRIEVE, encoded(deployment), None))
        await lab.entered()
        others = [
            asyncio.ensure_future(deployment.infer(Task.RETRIEVE, encoded(deployment, h), None))
            for h in ((100, 101, 102), (103, 104))
        ]
        await until(lambda: deployment.queue_depths() == {"mean/1/numpy": 2})
        lab.release()
        await asyncio.gather(first, *others)
        await until(lambda: len(notes.batches) == 2)
    batch = notes.batches[1]
    assert (batch.model, batch.version, batch.engine, batch.task) == (
        "mean",
        "1",
        "numpy",
        Task.RETRIEVE,
    )
    assert (batch.size, batch.tokens, batch.padded_tokens, batch.queue_depth) == (2, 5, 6, 0)
