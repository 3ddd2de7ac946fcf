"""A small model and engine for tests of the server, run by the real pipeline.

Scores depend on the item alone: item i of the catalogue scores -i when retrieved, and when ranked
i by the head ``up`` and -i by the head ``down``. What the engine does to a request its user says:
``wait`` waits for `Control.gate`, ``poison`` raises.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gr_core import EngineDescriptor, ModelDescriptor, Task
from gr_core.batcher import BatchingOptions
from gr_core.contracts import (
    ArraySpec,
    Artifact,
    EncodedRequest,
    Encoding,
    EngineOptions,
    Health,
    InferenceResult,
    Measurement,
    Model,
    PrefixStability,
)
from gr_core.deployment import Environment, ModelSpec
from gr_core.observers import Observer, Observers
from gr_core.pipeline import Pipeline
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle, Catalogue, ModelRepository, write_bundle
from gr_core.types import FloatArray, RecommendRequest
from gr_core.validation import Limits

TASKS = (Task.RETRIEVE, Task.RANK)
ALL_TASKS = tuple(Task)
SECRET = "the secret of the engine"


@dataclass
class Control:
    """What the engine is to do, and what it did."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released whenever a request that waits arrives in the engine."""
    healthy: bool = True
    answered: int = 0


CONTROL = Control()


class ToyModel:
    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.catalogue: Catalogue = bundle.catalogue()
        self.tasks: Sequence[Task] = bundle.tasks
        self.heads: Sequence[str] = ("up", "down")
        self.notes: Sequence[str] = ("a toy",)
        self.prefix_stability = PrefixStability("none", 0, (), "nothing is computed of it")

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        return (ArraySpec("items", "int64", ("candidate",)),)

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        history = self.catalogue.indices_of(request.history.item_ids)
        candidates = np.empty(0, np.int64)
        if request.candidates is not None:
            candidates = self.catalogue.indices_of(request.candidates.item_ids)
        known = candidates[candidates > 0]
        return Encoding(
            request=EncodedRequest(
                task, {"items": known}, max(1, len(history)), request.k, request.user_id
            ),
            candidate_indices=known,
            unscored=candidates == 0,
            unknown_items=int(np.count_nonzero(history == 0)),
        )

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        if task.finds_items:
            return result.scores, result.scores[:, None]
        given = head_weights or {"up": 1.0}
        weights = np.array([given.get(head, 0.0) for head in self.heads], np.float32)
        return result.scores @ weights, result.scores

    def close(self) -> None:
        pass


class ToyEngine:
    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        self.size = len(model.catalogue)

    def warm_up(self) -> None:
        pass

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if any(request.user_id == "poison" for request in batch):
            raise RuntimeError(SECRET)
        for request in batch:
            if request.user_id == "wait":
                CONTROL.entered.release()
                assert CONTROL.gate.wait(30)
        CONTROL.answered += len(batch)
        return [self._infer(request) for request in batch]

    def _infer(self, request: EncodedRequest) -> InferenceResult:
        if request.task.finds_items:
            best = np.arange(1, min(request.k, self.size) + 1)
            return InferenceResult(-best.astype(np.float32), best)
        items = request.arrays["items"].astype(np.float32)
        return InferenceResult(np.stack([items, -items], 1), tokens_reused=1)

    def measurements(self) -> Sequence[Measurement]:
        return [
            Measurement("toy:answers", CONTROL.answered, "counter", "Requests answered."),
            Measurement("toy:items", self.size, "gauge", "Items of the catalogue."),
        ]

    def health(self) -> Health:
        return Health(CONTROL.healthy, "" if CONTROL.healthy else "the toy is broken")

    def close(self) -> None:
        pass


REGISTRY = Registry.of(
    ModelDescriptor(name="toy", factory="serving_toy:ToyModel", tasks=ALL_TASKS, formats=("toy",)),
    EngineDescriptor(
        name="toy",
        factory="serving_toy:ToyEngine",
        formats=("toy",),
        tasks=ALL_TASKS,
        devices=("cpu",),
        dtypes=("float32",),
    ),
)


def write_models(folder: Path, version: str = "1", tasks: Sequence[Task] = TASKS) -> None:
    """``numbers`` with the items 1 to 50, ``texts`` with the items item-1 to item-50."""
    for name, items in (
        ("numbers", list(range(1, 51))),
        ("texts", [f"item-{i}" for i in range(1, 51)]),
    ):
        write_bundle(
            folder / name / version,
            name=name,
            version=version,
            architecture="toy",
            tasks=tasks,
            config={},
            catalogue=Catalogue(items, [f"Title of {i}" for i in items]),
            weights=lambda path: path.write_bytes(b"none"),
            description=f"The toy {name}",
        )


def make_pipeline(
    folder: Path,
    *,
    observers: Sequence[Observer] = (),
    max_queue: int = 512,
    histories_bytes: int = 2**20,
) -> Pipeline:
    return Pipeline(
        ModelRepository(folder),
        [ModelSpec("numbers"), ModelSpec("texts")],
        [],
        Environment(
            REGISTRY,
            BatchingOptions(max_batch_size=4, max_queue=max_queue),
            observers=Observers(observers),
        ),
        limits=Limits(max_history=1000),
        poll_seconds=0,
        histories_bytes=histories_bytes,
    )


@asynccontextmanager
async def started(pipeline: Pipeline):
    await pipeline.start()
    try:
        yield pipeline
    finally:
        CONTROL.gate.set()
        await pipeline.close()
