"""A deployment: one version of a model, loaded and ready to answer its tasks."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gr_core.artifacts import load_engine
from gr_core.batcher import Batched, BatchingOptions, BatchReport, MicroBatcher
from gr_core.contracts import (
    AsyncEngine,
    Cache,
    CacheKind,
    EncodedRequest,
    Engine,
    EngineOptions,
    EntryCache,
    Health,
    InferenceResult,
    MeasuredEngine,
    Measurement,
    Model,
)
from gr_core.errors import DeadlineExceeded, GrError, Overloaded, PlanError, Unavailable
from gr_core.observers import BatchEvent, DropEvent, Observers
from gr_core.planner import Plan, plan
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.types import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How a model of the repository is to be served."""

    name: str
    versions: tuple[str, ...] = ()
    """Versions kept loaded side by side; empty means the active one, following its changes."""
    strategy: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only the chosen engine knows."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What all deployments of a process share."""

    registry: Registry
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    caches: Mapping[str, Cache] = field(default_factory=dict)
    observers: Observers = field(default_factory=Observers)
    artifacts: Path | None = None
    """Where exported artifacts are kept; None means the user's cache folder."""
    profile: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds by ``architecture/task`` and engine, where this machine was measured."""


class _Runner(Protocol):
    """An engine behind its queue."""

    @property
    def depth(self) -> int: ...

    async def infer(self, request: EncodedRequest, deadline: float | None) -> Batched: ...

    def close(self) -> None: ...


class _SelfBatching:
    """Bounds and times an engine that batches by itself."""

    def __init__(self, engine: AsyncEngine, max_queue: int, on_drop: Callable[[str], None]) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._on_drop = on_drop
        self._in_flight = 0

    @property
    def depth(self) -> int:
        return self._in_flight

    async def infer(self, request: EncodedRequest, deadline: float | None) -> Batched:
        started = time.monotonic()
        if deadline is not None and deadline <= started:
            self._on_drop("deadline")
            raise DeadlineExceeded("the deadline passed before the engine was asked")
        if self._in_flight >= self._max_queue:
            self._on_drop("full")
            raise Overloaded(f"the engine has {self._in_flight} requests in flight", 0.1)
        self._in_flight += 1
        limit = asyncio.timeout(None if deadline is None else deadline - started)
        try:
            async with limit:
                result = await self._engine.infer(request, deadline)
        except TimeoutError:
            if not limit.expired():  # the engine's own
                raise
            self._on_drop("deadline")
            raise DeadlineExceeded("the deadline passed in the engine") from None
        finally:
            self._in_flight -= 1
        return Batched(result, 0.0, time.monotonic() - started, self._in_flight + 1)

    def close(self) -> None:
        """The engine itself is closed by the deployment."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An engine that runs, with the plan that chose it; several tasks may share one."""

    plan: Plan
    engine: Engine | AsyncEngine
    runner: _Runner


class Deployment:
    """Encodes, infers and decodes for the tasks of one version. Made by `load`."""

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        loaded: Mapping[Task, _Loaded],
        plans: Mapping[Task, Plan],
        results: EntryCache | None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.plans = plans
        self._loaded = loaded
        self._results = results
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._identity = model.bundle.identity

    @property
    def name(self) -> str:
        return self.model.bundle.name

    @property
    def version(self) -> str:
        return self.model.bundle.version

    @property
    def tasks(self) -> Sequence[Task]:
        return tuple(self._loaded)

    def engine_name(self, task: Task) -> str:
        return self._loaded[task].plan.engine.name

    @staticmethod
    def load(bundle: Bundle, spec: ModelSpec, environment: Environment) -> Deployment:
        """Loads a bundle, plans each of its tasks, loads and warms up the engines. Blocks.

        Raises `BundleError` or `PlanError`. With the strategy ``auto`` an engine that fails to
        load is left out, with its reason, and the next best is taken.
        """
        bundle.check_files()
        descriptor = environment.registry.models[bundle.architecture]
        model: Model = descriptor.resolve()(bundle)
        engines: dict[tuple[Any, ...], _Loaded] = {}
        failed: dict[str, str] = {}
        by_task: dict[Task, _Loaded] = {}
        try:
            for task in model.tasks:
                by_task[task] = _load_task(model, task, spec, environment, engines, failed)
        except BaseException:
            for entry in engines.values():
                entry.runner.close()
                entry.engine.close()
            model.close()
            raise
        results = environment.caches.get(CacheKind.RESULTS)
        assert results is None or isinstance(results, EntryCache)
        return Deployment(
            model,
            spec,
            by_task,
            {task: entry.plan for task, entry in by_task.items()},
            results,
        )

    async def infer(self, task: Task, request: EncodedRequest, deadline: float | None) -> Batched:
        """Raises what `MicroBatcher.infer` and the engine raise."""
        entry = self._loaded[task]
        key = self._key(request) if self._results is not None else b""
        if self._results is not None and (hit := self._results.get(key)) is not None:
            return Batched(_reused(hit, request.tokens), 0.0, 0.0, 1)
        try:
            batched = await entry.runner.infer(request, deadline)
        except GrError:
            raise
        except Exception as error:
            health = entry.engine.health()
            if not health.ok:
                raise Unavailable(f"engine {entry.plan.engine.name}: {health.reason}") from error
            raise
        if self._results is not None:
            kept = _owned(batched.result)
            self._results.put(key, kept, _size(kept), request.user_id)
        return batched

    def _key(self, request: EncodedRequest) -> bytes:
        """A digest of all that a result depends on."""
        digest = hashlib.blake2b(self._identity, digest_size=32)
        digest.update(f"{self.plans[request.task].summary()}|{request.task}|{request.k}".encode())
        for name in sorted(request.arrays):
            array = request.arrays[name]
            digest.update(f"|{name}|{array.dtype}|{array.shape}|".encode())
            digest.update(array.tobytes())
        return digest.digest()

    def health(self) -> Health:
        for entry in self._loaded.values():
            health = entry.engine.health()
            if not health.ok:
                return Health(False, f"{self.name}/{self.version}: {health.reason}")
        return Health(True)

    def queue_depths(self) -> dict[str, int]:
        return {self._label(entry): entry.runner.depth for entry in self._loaded.values()}

    def measurements(self) -> Mapping[str, Sequence[Measurement]]:
        """What engines measure of themselves, by ``model/version/engine``."""
        return {
            self._label(entry): entry.engine.measurements()
            for entry in self._loaded.values()
            if isinstance(entry.engine, MeasuredEngine)
        }

    def _label(self, entry: _Loaded) -> str:
        return f"{self.name}/{self.version}/{entry.plan.engine.name}"

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keeps the deployment from being closed while a request uses it."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def retire(self) -> None:
        """Waits for the requests that use it, then frees everything."""
        await self._idle.wait()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Blocks until the queue is empty, then frees everything. May be called twice."""
        for entry in self._loaded.values():
            entry.runner.close()
            entry.engine.close()
        self.model.close()


def _load_task(
    model: Model,
    task: Task,
    spec: ModelSpec,
    environment: Environment,
    engines: dict[tuple[Any, ...], _Loaded],
    failed: dict[str, str],
) -> _Loaded:
    """The engine for a task: one of ``engines``, or a new one that is added to them.

    Under ``auto`` an engine that fails to load is added to ``failed``, and the next best is taken.
    """
    while True:
        chosen = plan(
            environment.registry,
            model.bundle.architecture,
            task,
            strategy=spec.strategy,
            device=spec.device,
            dtype=spec.dtype,
            profile=environment.profile.get(f"{model.bundle.architecture}/{task}"),
            failed=failed,
        )
        key = (
            chosen.engine.name,
            tuple(e.name for e in chosen.exporters),
            chosen.device,
            chosen.dtype,
        )
        if key in engines:
            return _Loaded(chosen, engines[key].engine, engines[key].runner)
        try:
            engines[key] = _load_engine(chosen, model, spec, environment)
        except Exception as error:
            if spec.strategy != "auto":
                raise
            logger.warning(
                "%s: engine %s failed to load, trying the next: %s",
                model.bundle.name,
                chosen.engine.name,
                error,
                exc_info=not isinstance(error, GrError),
            )
            failed[chosen.engine.name] = f"failed to load: {error}"
            continue
        logger.info("%s/%s %s: %s", model.bundle.name, model.bundle.version, task, chosen.summary())
        return engines[key]


def _load_engine(chosen: Plan, model: Model, spec: ModelSpec, environment: Environment) -> _Loaded:
    """Raises whatever the exporters and the engine raise; leaves nothing behind if so."""
    descriptor = chosen.engine
    tasks = [task for task in model.tasks if task in descriptor.tasks]
    engine: Engine | AsyncEngine = descriptor.resolve()()
    if inspect.iscoroutinefunction(engine.infer) != descriptor.batches_itself:
        raise PlanError(
            f"engine {descriptor.name}: batches_itself is {descriptor.batches_itself}, "
            f"which calls for {'an async' if descriptor.batches_itself else 'a blocking'} infer"
        )
    options = EngineOptions(
        device=chosen.device,
        dtype=chosen.dtype,
        threads=spec.threads,
        max_batch_size=environment.batching.max_batch_size,
        max_batch_tokens=environment.batching.max_batch_tokens,
        caches=environment.caches,
        extra=spec.options,
    )
    try:
        load_engine(engine, chosen, model, tasks, options, environment.artifacts)
        engine.warm_up()
    except BaseException:
        engine.close()
        raise
    observers, bundle = environment.observers, model.bundle

    def on_drop(reason: str) -> None:
        observers.notify(DropEvent(bundle.name, descriptor.name, reason))

    def on_batch(report: BatchReport) -> None:
        tokens = [r.tokens for r in report.batch]
        observers.notify(
            BatchEvent(
                model=bundle.name,
                version=bundle.version,
                engine=descriptor.name,
                task=report.batch[0].task,
                size=len(tokens),
                tokens=sum(tokens),
                padded_tokens=max(tokens) * len(tokens),
                compute_s=report.compute_s,
                queue_depth=report.queue_depth,
            )
        )

    runner: _Runner
    if descriptor.batches_itself:
        assert isinstance(engine, AsyncEngine)
        runner = _SelfBatching(engine, environment.batching.max_queue, on_drop)
    else:
        assert isinstance(engine, Engine)
        runner = MicroBatcher(
            engine,
            environment.batching,
            name=f"{bundle.name}/{descriptor.name}",
            on_batch=on_batch,
            on_drop=on_drop,
        )
    return _Loaded(chosen, engine, runner)


def _owned(result: InferenceResult) -> InferenceResult:
    """A copy of a result, which may be a view of its whole batch's arrays."""
    indices = None if result.indices is None else result.indices.copy()
    return InferenceResult(result.scores.copy(), indices)


def _reused(result: InferenceResult, tokens: int) -> InferenceResult:
    return InferenceResult(result.scores, result.indices, tokens_reused=tokens)


def _size(result: InferenceResult) -> int:
    return result.scores.nbytes + (0 if result.indices is None else result.indices.nbytes)
