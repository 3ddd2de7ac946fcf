"""A small real recommender in numpy, and engines that a test can hold, break and look into.

The model ``mean`` has a vector and a popularity for each item; a user is the mean of the vectors of
the history, and an item's score its dot product with the user plus its popularity. That is enough
for answers that depend on all of a request and can be checked with a few lines of numpy.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gr_core import (
    Candidates,
    EngineDescriptor,
    ExporterDescriptor,
    History,
    ModelDescriptor,
    RecommendRequest,
    Task,
)
from gr_core.batcher import BatchingOptions
from gr_core.collate import collate
from gr_core.contracts import (
    ArraySpec,
    Artifact,
    Cache,
    EncodedRequest,
    Encoding,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
    PrefixStability,
)
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import BundleError, Unavailable
from gr_core.observers import Observer, Observers
from gr_core.pipeline import Pipeline, PipelineSpec
from gr_core.plugins.descriptors import Descriptor
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle, Catalogue, ModelRepository, write_bundle
from gr_core.types import FloatArray, item_id_array

BOTH = (Task.RETRIEVE, Task.RANK)
HEADS = ("click", "like")
PATIENCE_S = 30.0
"""A test that waits longer for something has failed."""
NOW_MS = 1_700_000_000_000

_numbers = itertools.count()


def factory(make: Callable[..., Any]) -> str:
    """The ``module:attribute`` of a callable, for a descriptor."""
    name = f"made_{next(_numbers)}"
    globals()[name] = make
    return f"{__name__}:{name}"


# ── The model ─────────────────────────────────────────────────────────────────────────────────


class MeanModel:
    """Implements `gr_core.contracts.Model`."""

    notes: Sequence[str] = ("weights: the bundle's own",)
    prefix_stability = PrefixStability("none", 0, (), "a mean keeps no state")

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.catalogue = bundle.catalogue()
        self.tasks = bundle.tasks
        self.heads = HEADS
        self.closed = False
        try:
            weights = load_file(bundle.weights_path)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{bundle.weights_path}: {error}") from error
        self.vectors, self.popularity = weights["vectors"], weights["popularity"]
        if len(self.vectors) != len(self.catalogue) + 1:
            raise BundleError(f"{bundle.weights_path}: vectors: {len(self.vectors)} rows")

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        specs = (ArraySpec("items", "int64", ("history",)), ArraySpec("length", "int64"))
        if task is Task.RANK:
            return (*specs, ArraySpec("candidates", "int64", ("candidate",)))
        return specs

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        found = self.catalogue.indices_of(request.history.item_ids)
        items = found[found > 0]
        arrays = {"items": items, "length": np.array(len(items))}
        candidates, unscored = np.empty(0, np.int64), np.empty(0, bool)
        if task is Task.RANK:
            assert request.candidates is not None
            places = self.catalogue.indices_of(request.candidates.item_ids)
            candidates, unscored = places[places > 0], places == 0
            arrays["candidates"] = candidates
        encoded = EncodedRequest(
            task, arrays, tokens=len(items) + len(candidates), user_id=request.user_id
        )
        return Encoding(encoded, candidates, unscored, int(np.count_nonzero(found == 0)))

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        if task.finds_items:
            return result.scores, np.empty((len(result.scores), 0), np.float32)
        weights = head_weights or {"click": 0.75, "like": 0.25}
        vector = np.array([weights.get(head, 0.0) for head in HEADS], np.float32)
        return result.scores @ vector, result.scores

    def close(self) -> None:
        self.closed = True

    # What answers are checked against.

    def click_scores(self, history: Sequence[int | str]) -> FloatArray:
        """Scores (size + 1,) of all items by index; row 0 is padding."""
        found = self.catalogue.indices_of(item_id_array(list(history)))
        known = found[found > 0]
        user = self.vectors[known].sum(0) / max(len(known), 1)
        scores: FloatArray = self.vectors @ user + self.popularity
        return scores

    def best(self, history: Sequence[int | str], k: int, without: Sequence[int | str] = ()) -> list:
        """Ids of the k best items for a history, those of ``without`` left out."""
        scores = self.click_scores(history)
        order = 1 + np.argsort(-scores[1:], kind="stable")
        banned = set(self.catalogue.indices_of(item_id_array(list(without))).tolist())
        kept = np.array([i for i in order.tolist() if i not in banned][:k], np.int64)
        return self.catalogue.ids_of(kept).tolist()


def write_model(
    folder: Path,
    name: str = "mean",
    version: str = "1",
    *,
    ids: Sequence[int | str] = tuple(range(100, 140)),
    tasks: Sequence[Task] = BOTH,
    seed: int = 0,
    rows: int | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Writes ``folder/name/version``; ``rows`` gives its weights a wrong number of rows."""
    random = np.random.default_rng([seed, len(ids), *version.encode()])
    rows = len(ids) + 1 if rows is None else rows
    weights = {
        "vectors": random.normal(size=(rows, 4)).astype(np.float32),
        "popularity": random.normal(size=rows).astype(np.float32),
    }
    return write_bundle(
        folder / name / version,
        name=name,
        version=version,
        architecture="mean",
        tasks=tasks,
        config={"seed": seed},
        catalogue=Catalogue(list(ids), [f"title of {i}" for i in ids]),
        weights=lambda path: save_file(weights, path),
        overwrite=overwrite,
    )


# ── Engines ───────────────────────────────────────────────────────────────────────────────────


class Lab:
    """What a test does to the engines it made, and what they tell."""

    def __init__(self) -> None:
        self.batches: list[list[EncodedRequest]] = []
        self.alive = 0
        """Engines loaded and not closed."""
        self.loads = 0
        self.health = Health(True)
        self.break_load: Callable[[Model], None] = lambda model: None
        """Called in `load`; may raise."""
        self.break_infer: Callable[[Sequence[EncodedRequest]], None] = lambda batch: None
        """Called in `infer`; may raise."""
        self._open = threading.Event()
        self._open.set()
        self._entered = threading.Semaphore(0)

    def hold(self) -> None:
        """Idle engines stop in their next `infer` until `release`; `entered` counts from here."""
        self._entered = threading.Semaphore(0)
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def entered(self) -> None:
        """Returns once an engine has entered `infer`; once for each time it did."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=PATIENCE_S)

    def enter(self, batch: Sequence[EncodedRequest]) -> None:
        self.batches.append(list(batch))
        self._entered.release()
        assert self._open.wait(PATIENCE_S)
        self.break_infer(batch)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class MeanEngine:
    """Implements `gr_core.contracts.Engine` for the model ``mean``, on padded batches."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._model: MeanModel | None = None

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        self._lab.loads += 1
        self._lab.break_load(model)
        assert isinstance(model, MeanModel)
        self.artifact, self.tasks, self.options = artifact, tasks, options
        self._model = model
        self._lab.alive += 1

    def warm_up(self) -> None: ...

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        self._lab.enter(batch)
        return self.compute(batch)

    def compute(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._model is None:
            raise Unavailable("engine mean is closed")
        task, model = batch[0].task, self._model
        assert all(request.task is task for request in batch)
        arrays = collate(model.inputs(task), batch)
        lengths = arrays["length"][:, None]
        kept = np.arange(arrays["items"].shape[1]) < lengths
        vectors = model.vectors[arrays["items"]] * kept[..., None]
        users = vectors.sum(1) / np.maximum(lengths, 1)
        scores = (users @ model.vectors.T + model.popularity).astype(np.float32)
        if task is Task.RANK:
            return [
                _heads(row[r.arrays["candidates"]]) for row, r in zip(scores, batch, strict=True)
            ]
        # One array for the batch, of which every result is a view, as engines do it.
        order = 1 + np.argsort(-scores[:, 1:], axis=1, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=1)
        return [
            InferenceResult(ranked[row, : r.k], order[row, : r.k]) for row, r in enumerate(batch)
        ]

    def health(self) -> Health:
        return self._lab.health

    def close(self) -> None:
        if self._model is not None:
            self._lab.alive -= 1
        self._model = None


def _heads(click: FloatArray) -> InferenceResult:
    return InferenceResult(np.stack([click, -click], axis=1))


class AsyncMeanEngine(MeanEngine):
    """Implements `gr_core.contracts.AsyncEngine`; holds with an event of the loop's own."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.aborted = 0

    async def infer(  # type: ignore[override]
        self, request: EncodedRequest, deadline: float | None
    ) -> InferenceResult:
        try:
            await asyncio.to_thread(self._lab.enter, [request])
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        return self.compute([request])[0]


# ── A platform around them ────────────────────────────────────────────────────────────────────


def model_descriptor(**changes: Any) -> ModelDescriptor:
    facts: dict[str, Any] = {
        "name": "mean",
        "factory": f"{__name__}:MeanModel",
        "tasks": tuple(Task),
        "formats": ("numpy",),
    }
    return ModelDescriptor(**(facts | changes))


def engine_descriptor(make: Callable[[], Any], **changes: Any) -> EngineDescriptor:
    facts: dict[str, Any] = {
        "name": "numpy",
        "factory": factory(make),
        "formats": ("numpy",),
        "tasks": tuple(Task),
        "devices": ("cpu",),
        "dtypes": ("float32",),
    }
    return EngineDescriptor(**(facts | changes))


def exporter_descriptor(make: Callable[[], Any], **changes: Any) -> ExporterDescriptor:
    facts: dict[str, Any] = {
        "name": "press",
        "factory": factory(make),
        "source": "numpy",
        "target": "pressed",
        "tasks": tuple(Task),
    }
    return ExporterDescriptor(**(facts | changes))


def environment(
    *descriptors: Descriptor,
    lab: Lab | None = None,
    batching: BatchingOptions | None = None,
    caches: Mapping[str, Cache] | None = None,
    observers: Sequence[Observer] = (),
    artifacts: Path | None = None,
) -> Environment:
    """The model ``mean`` with the given descriptors, or with one engine of the lab's."""
    if lab is not None:
        descriptors = (*descriptors, engine_descriptor(lambda: MeanEngine(lab)))
    return Environment(
        registry=Registry.of(model_descriptor(), *descriptors),
        batching=batching or BatchingOptions(),
        caches=caches or {},
        observers=Observers(observers),
        artifacts=artifacts,
    )


@asynccontextmanager
async def serving(
    folder: Path,
    env: Environment,
    models: Sequence[ModelSpec] = (),
    pipelines: Sequence[PipelineSpec] = (),
    **options: Any,
) -> AsyncIterator[Pipeline]:
    """A started pipeline over all models of a repository; it follows only when told to."""
    repository = ModelRepository(folder)
    specs = models or [ModelSpec(name) for name in repository.names()]
    options.setdefault("poll_seconds", 0)
    pipeline = Pipeline(repository, specs, pipelines, env, **options)
    await pipeline.start()
    try:
        yield pipeline
    finally:
        await pipeline.close()


def request(history: Sequence[int | str] = (), **fields: Any) -> RecommendRequest:
    """A request with one behaviour a minute; ``candidates`` may be a list of ids."""
    ids = item_id_array(list(history))
    times = NOW_MS - 60_000 * np.arange(len(ids), 0, -1, dtype=np.int64)
    if isinstance(fields.get("candidates"), list):
        fields["candidates"] = Candidates(item_id_array(fields["candidates"]))
    return RecommendRequest(History(ids, times), request_time_ms=NOW_MS, **fields)


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds, which something else on the way must bring about."""
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        await asyncio.sleep(0.001)


def engine_threads() -> set[str]:
    """Names of the threads that deployments run."""
    return {t.name for t in threading.enumerate() if t.name.startswith("gr-")}
