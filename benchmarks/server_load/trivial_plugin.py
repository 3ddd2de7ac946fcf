"""A model and an engine that cost next to nothing, so that what is measured is the platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gr_core import EngineDescriptor, ModelDescriptor, Task
from gr_core.contracts import (
    ArraySpec,
    Artifact,
    EncodedRequest,
    Encoding,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
    PrefixStability,
)
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.types import FloatArray, RecommendRequest

ITEMS = 7_000


class TrivialModel:
    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.catalogue: Catalogue = bundle.catalogue()
        self.tasks: Sequence[Task] = bundle.tasks
        self.heads: Sequence[str] = ()
        self.notes: Sequence[str] = ()
        self.prefix_stability = PrefixStability("none", 0, (), "nothing is computed of it")

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        return (ArraySpec("items", "int64", ("history",)),)

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        items = self.catalogue.indices_of(request.history.item_ids)
        return Encoding(
            request=EncodedRequest(task, {"items": items}, max(1, len(items)), request.k),
            candidate_indices=np.empty(0, np.int64),
            unscored=np.empty(0, np.bool_),
            unknown_items=int(np.count_nonzero(items == 0)),
        )

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        return result.scores, np.empty((len(result.scores), 0), np.float32)

    def close(self) -> None:
        pass


class TrivialEngine:
    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        self._indices = np.arange(1, len(model.catalogue) + 1)
        self._scores = -self._indices.astype(np.float32)

    def warm_up(self) -> None:
        pass

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        return [InferenceResult(self._scores[: r.k], self._indices[: r.k]) for r in batch]

    def health(self) -> Health:
        return Health(True)

    def close(self) -> None:
        pass


REGISTRY = Registry.of(
    ModelDescriptor(
        name="trivial",
        factory="trivial_plugin:TrivialModel",
        tasks=(Task.RETRIEVE,),
        formats=("nothing",),
    ),
    EngineDescriptor(
        name="trivial",
        factory="trivial_plugin:TrivialEngine",
        formats=("nothing",),
        tasks=(Task.RETRIEVE,),
        devices=("cpu",),
        dtypes=("float32",),
    ),
)


def write_model(folder: Path) -> None:
    write_bundle(
        folder / "trivial" / "1",
        name="trivial",
        version="1",
        architecture="trivial",
        tasks=(Task.RETRIEVE,),
        config={},
        catalogue=Catalogue(list(range(1, ITEMS + 1)), [f"Video {i}" for i in range(ITEMS)]),
        weights=lambda path: path.write_bytes(b"none"),
    )
