"""Versions in service: a new one takes over without a failed request, a bad one never does."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from gr_core import Recommendation, Task
from gr_core.contracts import Health, Model
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import ConfigurationError, NotFound, Unavailable
from gr_core.observers import LoadEvent, Observer
from gr_core.pipeline import Pipeline
from gr_core.repository import ModelRepository
from gr_core.rollout import Rollout

from .helpers import (
    PATIENCE_S,
    Lab,
    MeanEngine,
    MeanModel,
    engine_descriptor,
    engine_threads,
    environment,
    request,
    serving,
    until,
    write_model,
)

HISTORY = (100, 101, 102)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = engine_threads()
    yield
    assert engine_threads() == before


class Loads(Observer):
    def __init__(self) -> None:
        self.events: list[LoadEvent] = []

    def on_load(self, event: LoadEvent) -> None:
        self.events.append(event)

    @property
    def states(self) -> list[str]:
        return [f"{e.model}/{e.version} {e.state}" for e in self.events]


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def env(lab: Lab, loads: Loads) -> Environment:
    return environment(lab=lab, observers=[loads])


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    """The model ``mean`` in version 1, which is active also when newer ones come."""
    write_model(tmp_path / "repository")
    repository = ModelRepository(tmp_path / "repository")
    repository.activate("mean", "1")
    return repository


Running = Callable[..., AbstractAsyncContextManager[Rollout]]


@pytest.fixture
def running(repository: ModelRepository, env: Environment, lab: Lab) -> Running:
    @asynccontextmanager
    async def run(*specs: ModelSpec) -> AsyncIterator[Rollout]:
        rollout = Rollout(repository, specs or [ModelSpec("mean")], env, poll_seconds=0)
        await rollout.start()
        try:
            yield rollout
        finally:
            lab.release()
            await rollout.close()
            assert lab.alive == 0

    return run


def active(rollout: Rollout, model: str = "mean") -> str:
    return rollout.deployment(model).version


def loaded(rollout: Rollout, model: str = "mean") -> list[str]:
    return [deployment.version for deployment, _ in rollout.deployments(model)]


# ── A new version ─────────────────────────────────────────────────────────────────────────────


async def test_a_retired_version_is_freed_without_garbage_collection(
    running: Running, repository: ModelRepository
) -> None:
    """As `gr serve` takes what it loaded out of the collection, cycles would stay for ever."""
    write_model(repository.path, version="2")
    async with running() as rollout:
        deployment = rollout.deployment("mean")
        parts = [weakref.ref(part) for part in (deployment, deployment.model)]
        del deployment
        gc.collect()
        gc.disable()
        try:
            repository.activate("mean", "2")
            await rollout.follow()
            assert active(rollout) == "2"
            await until(lambda: all(part() is None for part in parts))
        finally:
            gc.enable()


async def test_a_new_version_takes_over_under_load_without_a_failed_request(
    repository: ModelRepository, env: Environment, lab: Lab, loads: Loads
) -> None:
    models = {"1": MeanModel(repository.bundle("mean"))}
    models["2"] = MeanModel(write_model(repository.path, version="2"))
    expected = {v: model.best(HISTORY, 5, without=HISTORY) for v, model in models.items()}
    assert expected["1"] != expected["2"]
    answers: dict[str, int] = {"1": 0, "2": 0}
    stop = asyncio.Event()

    async def client(pipeline: Pipeline) -> list[str]:
        versions = []
        while not stop.is_set():
            answer = await pipeline.recommend(request(HISTORY, k=5, task=Task.RETRIEVE))
            version = answer.stages[0].version
            assert [item.item_id for item in answer.items] == expected[version]
            versions.append(version)
            answers[version] += 1
        return versions

    async with serving(repository.path, env, poll_seconds=0.005) as pipeline:
        clients = [asyncio.ensure_future(client(pipeline)) for _ in range(8)]
        await until(lambda: answers["1"] > 30)
        await asyncio.to_thread(repository.activate, "mean", "2")
        await until(lambda: answers["2"] > 30 or any(c.done() for c in clients))
        stop.set()
        for versions in await asyncio.gather(*clients):
            assert versions == sorted(versions), "nobody goes back to the old version"
        await until(lambda: len(loads.states) == 3)
        assert loads.states == ["mean/1 ready", "mean/2 ready", "mean/1 unloaded"]
        assert lab.alive == 1


async def test_the_old_version_stays_until_its_last_request_is_answered(
    repository: ModelRepository, env: Environment, lab: Lab, loads: Loads
) -> None:
    async def ask(pipeline: Pipeline) -> Recommendation:
        return await pipeline.recommend(request(HISTORY, task=Task.RETRIEVE))

    async with serving(repository.path, env) as pipeline:
        lab.hold()
        old = asyncio.ensure_future(ask(pipeline))
        await lab.entered()
        write_model(repository.path, version="2")
        repository.activate("mean", "2")
        await pipeline._rollout.follow()
        new = asyncio.ensure_future(ask(pipeline))
        await lab.entered()
        assert lab.alive == 2
        assert "mean/1 unloaded" not in loads.states
        lab.release()
        assert (await old).stages[0].version == "1"
        assert (await new).stages[0].version == "2"
        await until(lambda: loads.states[-1] == "mean/1 unloaded")
        assert lab.alive == 1


async def test_a_new_version_is_found_by_itself(
    repository: ModelRepository, env: Environment
) -> None:
    rollout = Rollout(repository, [ModelSpec("mean")], env, poll_seconds=0.005)
    await rollout.start()
    write_model(repository.path, version="2")
    repository.activate("mean", "2")
    await until(lambda: active(rollout) == "2")
    await rollout.close()


async def test_rollback_brings_the_old_version_back(
    repository: ModelRepository, running: Running, loads: Loads
) -> None:
    write_model(repository.path, version="2")
    async with running() as rollout:
        repository.activate("mean", "2")
        await rollout.follow()
        assert active(rollout) == "2"
        repository.rollback("mean")
        await rollout.follow()
        assert active(rollout) == "1"
        assert loaded(rollout) == ["1"]
        await until(lambda: loads.states[-1] == "mean/2 unloaded")


async def test_models_change_independently(
    repository: ModelRepository, running: Running, loads: Loads
) -> None:
    write_model(repository.path, "other", "1")
    async with running(ModelSpec("mean"), ModelSpec("other")) as rollout:
        write_model(repository.path, version="2")
        repository.activate("mean", "2")
        await rollout.follow()
        assert (active(rollout), active(rollout, "other")) == ("2", "1")
        assert loads.states.count("other/1 ready") == 1


# ── A version that cannot be served ───────────────────────────────────────────────────────────


def truncate(repository: ModelRepository) -> None:
    weights = write_model(repository.path, version="2").weights_path
    weights.write_bytes(weights.read_bytes()[:-4])


def lose_a_file(repository: ModelRepository) -> None:
    write_model(repository.path, version="2").weights_path.unlink()


def misshape(repository: ModelRepository) -> None:
    write_model(repository.path, version="2", rows=3)


def drop_a_task(repository: ModelRepository) -> None:
    write_model(repository.path, version="2", tasks=(Task.RANK,))


def lose_the_configuration(repository: ModelRepository) -> None:
    (write_model(repository.path, version="2").path / "config.json").write_text("{")


DAMAGES = {
    truncate: "model.safetensors: ",
    lose_a_file: "model.safetensors: missing",
    misshape: "vectors: 3 rows",
    drop_a_task: "tasks: it cannot retrieve, which requests rely on",
    lose_the_configuration: "config.json: ",
}


def activate_unchecked(repository: ModelRepository, version: str) -> None:
    """What a hand or another program may do."""
    (repository.path / "mean" / "active.json").write_text(json.dumps({"active": version}))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_a_bad_version_is_refused_and_the_old_one_stays(
    repository: ModelRepository,
    running: Running,
    loads: Loads,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[ModelRepository], None],
) -> None:
    async with running() as rollout:
        damage(repository)
        activate_unchecked(repository, "2")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await rollout.follow()
        assert active(rollout) == "1"
        assert loaded(rollout) == ["1"]
        assert rollout.health().ok
        assert loads.states == ["mean/1 ready", "mean/2 refused"], "tried once, not at every look"
        assert DAMAGES[damage] in loads.events[-1].reason
        (said,) = [r.getMessage() for r in caplog.records]
        assert said.startswith("mean: version 2 refused, version 1 stays: ")


async def test_a_version_whose_engine_fails_is_refused(
    repository: ModelRepository, running: Running, lab: Lab, loads: Loads
) -> None:
    def out_of_memory(model: Model) -> None:
        if model.bundle.version == "2":
            raise MemoryError("no room for a second model")

    lab.break_load = out_of_memory
    async with running() as rollout:
        write_model(repository.path, version="2")
        repository.activate("mean", "2")
        await rollout.follow()
        assert active(rollout) == "1"
        assert lab.alive == 1
        assert "no room for a second model" in loads.events[-1].reason


async def test_a_refused_version_is_tried_again_once_another_was_activated(
    repository: ModelRepository, running: Running, loads: Loads
) -> None:
    async with running() as rollout:
        truncate(repository)
        for version in ("2", "1", "2"):
            activate_unchecked(repository, version)
            await rollout.follow()
            await rollout.follow()
        assert loads.states == ["mean/1 ready", "mean/2 refused", "mean/2 refused"]


async def test_a_refused_version_is_tried_again_once_it_was_repaired(
    repository: ModelRepository, running: Running
) -> None:
    """Or once it has been copied in full, when it was seen too early."""
    async with running() as rollout:
        truncate(repository)
        activate_unchecked(repository, "2")
        await rollout.follow()
        assert active(rollout) == "1"
        write_model(repository.path, version="2", overwrite=True)
        await rollout.follow()
        assert active(rollout) == "2"


async def test_a_damaged_active_file_changes_nothing_and_is_said_once(
    repository: ModelRepository, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as rollout:
        (repository.path / "mean" / "active.json").write_text("{")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await rollout.follow()
        assert active(rollout) == "1"
        (said,) = [r.getMessage() for r in caplog.records]
        assert said.startswith("mean: version 1 stays: ")
        assert "active.json" in said

        activate_unchecked(repository, "9")
        await rollout.follow()
        assert "names version '9', which is not there" in caplog.records[-1].getMessage()
        assert active(rollout) == "1"


# ── Several versions side by side ─────────────────────────────────────────────────────────────


async def test_versions_side_by_side(
    repository: ModelRepository, running: Running, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    for version in ("2", "3"):
        write_model(repository.path, version=version)
    async with running(ModelSpec("mean", versions=("1", "2"))) as rollout:
        assert loaded(rollout) == ["1", "2"]
        assert active(rollout) == "1"
        assert rollout.deployment("mean", "2").version == "2"
        with pytest.raises(NotFound, match="version: '3' of mean is not loaded; there are: 1, 2"):
            rollout.deployment("mean", "3")

        repository.activate("mean", "2")
        await rollout.follow()
        assert active(rollout) == "2"
        assert [(d.version, is_active) for d, is_active in rollout.deployments("mean")] == [
            ("1", False),
            ("2", True),
        ]

        repository.activate("mean", "3")
        with caplog.at_level(logging.WARNING):
            await rollout.follow()
            await rollout.follow()
        assert (active(rollout), loaded(rollout)) == ("2", ["1", "2"])
        (said,) = [r.getMessage() for r in caplog.records]
        assert "version 3 was activated, but only 1, 2 are to be served" in said
        assert lab.loads == 2


async def test_the_last_version_named_answers_when_the_active_one_is_not_among_them(
    repository: ModelRepository, running: Running
) -> None:
    for version in ("2", "3"):
        write_model(repository.path, version=version)
    async with running(ModelSpec("mean", versions=("2", "3"))) as rollout:
        assert active(rollout) == "3"


async def test_versions_side_by_side_have_the_same_tasks(
    repository: ModelRepository, env: Environment, lab: Lab
) -> None:
    drop_a_task(repository)
    rollout = Rollout(repository, [ModelSpec("mean", versions=("1", "2"))], env, poll_seconds=0)
    with pytest.raises(
        ConfigurationError, match="same tasks, but 1 can rank, retrieve; 2 can rank"
    ):
        await rollout.start()
    assert lab.alive == 0


# ── Starting and stopping ─────────────────────────────────────────────────────────────────────


async def test_a_start_that_fails_leaves_nothing_running(
    repository: ModelRepository, env: Environment, lab: Lab, loads: Loads
) -> None:
    write_model(repository.path, "other", "1", rows=3)
    rollout = Rollout(repository, [ModelSpec("mean"), ModelSpec("other")], env, poll_seconds=1)
    with pytest.raises(Exception, match="vectors: 3 rows"):
        await rollout.start()
    assert lab.alive == 0
    assert loads.states == ["mean/1 ready", "other/1 refused", "mean/1 unloaded"]
    with pytest.raises(NotFound, match="model 'nobody'"):
        await Rollout(repository, [ModelSpec("nobody")], env, poll_seconds=1).start()


async def test_a_start_that_is_interrupted_leaves_nothing_running(
    repository: ModelRepository, env: Environment, lab: Lab
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slowly(model: Model) -> None:
        loading.set()
        assert go_on.wait(PATIENCE_S)

    lab.break_load = slowly
    rollout = Rollout(repository, [ModelSpec("mean")], env, poll_seconds=1)
    starting = asyncio.ensure_future(rollout.start())
    assert await asyncio.to_thread(loading.wait, PATIENCE_S)
    starting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert lab.loads == 1
    assert lab.alive == 0


async def test_closing_while_a_version_is_being_loaded_leaves_nothing_running(
    repository: ModelRepository, env: Environment, lab: Lab
) -> None:
    rollout = Rollout(repository, [ModelSpec("mean")], env, poll_seconds=0.005)
    await rollout.start()
    loading, go_on = threading.Event(), threading.Event()

    def slowly(model: Model) -> None:
        loading.set()
        assert go_on.wait(PATIENCE_S)

    lab.break_load = slowly
    write_model(repository.path, version="2")
    repository.activate("mean", "2")
    assert await asyncio.to_thread(loading.wait, PATIENCE_S)
    closing = asyncio.ensure_future(rollout.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert lab.loads == 2
    assert lab.alive == 0


async def test_an_engine_that_fails_to_close_keeps_no_other_from_it(
    repository: ModelRepository, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(MeanEngine):
        def close(self) -> None:
            super().close()
            raise RuntimeError("the driver is gone")

    write_model(repository.path, "other", "1")
    env = environment(engine_descriptor(lambda: Stuck(lab)))
    rollout = Rollout(repository, [ModelSpec("mean"), ModelSpec("other")], env, poll_seconds=0)
    await rollout.start()
    assert lab.alive == 2
    await rollout.close()
    assert lab.alive == 0
    failed = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert sorted(failed) == ["mean/1 failed to close", "other/1 failed to close"]


async def test_before_and_after_nothing_is_served(
    repository: ModelRepository, env: Environment
) -> None:
    rollout = Rollout(repository, [ModelSpec("mean")], env, poll_seconds=0)
    for _ in range(2):
        assert rollout.health() == Health(False, "mean: not loaded")
        with pytest.raises(Unavailable, match="'mean' is not loaded"):
            rollout.deployment("mean")
        await rollout.start()
        assert rollout.health().ok
        await rollout.close()


def test_a_model_is_named_once(repository: ModelRepository, env: Environment) -> None:
    with pytest.raises(ConfigurationError, match="a name occurs twice: mean, mean"):
        Rollout(repository, [ModelSpec("mean"), ModelSpec("mean")], env, poll_seconds=0)


async def test_health_is_that_of_the_active_versions(
    repository: ModelRepository, running: Running, lab: Lab
) -> None:
    async with running() as rollout:
        lab.health = Health(False, "the context is lost")
        assert rollout.health() == Health(False, "mean/1: the context is lost")
