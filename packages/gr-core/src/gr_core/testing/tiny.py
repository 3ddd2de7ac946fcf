"""A tiny real recommender in numpy, for testing servers and measuring what surrounds a model.

Every item has a vector. A user is the sum of the vectors of the history, each behaviour counting
0.9 times the one after it, and an item's score is its dot product with the user.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gr_core.collate import collate
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
from gr_core.errors import BundleError, PlanError, Unavailable
from gr_core.plugins.descriptors import EngineDescriptor, ModelDescriptor
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.types import FloatArray, RecommendRequest, Task

ARCHITECTURE = "tiny"
TASKS = (Task.RETRIEVE, Task.RANK)
DECAY = 0.9


def tiny_registry() -> Registry:
    """The tiny model and its engine."""
    return Registry.of(
        ModelDescriptor(
            name=ARCHITECTURE,
            factory="gr_core.testing.tiny:TinyModel",
            tasks=TASKS,
            formats=("numpy",),
        ),
        EngineDescriptor(
            name="numpy",
            factory="gr_core.testing.tiny:TinyEngine",
            formats=("numpy",),
            tasks=TASKS,
            devices=("cpu",),
            dtypes=("float32",),
        ),
    )


def write_tiny_bundle(folder: Path, *, version: str = "1", items: int = 50) -> Bundle:
    """Writes ``folder/tiny/<version>`` with integer ids from 1000."""
    vectors = np.random.default_rng(0).normal(size=(items + 1, 8)).astype(np.float32)
    return write_bundle(
        folder / "tiny" / version,
        name="tiny",
        version=version,
        architecture=ARCHITECTURE,
        tasks=TASKS,
        config={},
        catalogue=Catalogue(range(1000, 1000 + items), [f"Item {i}" for i in range(items)]),
        weights=lambda path: save_file({"vectors": vectors}, path),
    )


class TinyModel:
    """Implements `gr_core.contracts.Model`."""

    heads: Sequence[str] = ("like", "share")
    notes: Sequence[str] = ()
    prefix_stability = PrefixStability("none", 0, (), "it keeps no state")

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.catalogue = bundle.catalogue()
        self.tasks: Sequence[Task] = bundle.tasks
        try:
            self.vectors = load_file(bundle.weights_path)["vectors"]
        except (OSError, SafetensorError, KeyError) as error:
            raise BundleError(f"{bundle.weights_path}: {error}") from error
        if len(self.vectors) != len(self.catalogue) + 1:
            raise BundleError(
                f"{bundle.weights_path}: {len(self.vectors)} vectors, "
                f"expected {len(self.catalogue) + 1}"
            )

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        specs = (ArraySpec("items", "int64", ("history",)), ArraySpec("length", "int64"))
        if task is Task.RANK:
            return (*specs, ArraySpec("candidates", "int64", ("candidate",)))
        return specs

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        order = np.argsort(request.history.timestamps_ms, kind="stable")
        found = self.catalogue.indices_of(request.history.item_ids[order])
        items = found[found > 0]
        arrays = {"items": items, "length": np.array(len(items))}
        candidates, unscored = np.empty(0, np.int64), np.empty(0, np.bool_)
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
        if task is Task.RETRIEVE:
            return result.scores, np.empty((len(result.scores), 0), np.float32)
        weights = head_weights or dict.fromkeys(self.heads, 1.0)
        vector = np.array([weights.get(head, 0.0) for head in self.heads], np.float32)
        return result.scores @ vector, result.scores

    def close(self) -> None:
        """There is nothing to free."""


class TinyEngine:
    """Implements `gr_core.contracts.Engine`. Its option ``delay_s`` makes batches last."""

    def __init__(self) -> None:
        self._model: TinyModel | None = None
        self._delay_s = 0.0

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        if unknown := sorted(options.extra.keys() - {"delay_s"}):
            raise PlanError(f"engine numpy has no option {unknown[0]!r}, only 'delay_s'")
        assert isinstance(model, TinyModel)
        self._delay_s = float(options.extra.get("delay_s", 0))
        self._model = model

    def warm_up(self) -> None:
        """Nothing here is slower the first time."""

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._model is None:
            raise Unavailable("engine numpy is closed")
        time.sleep(self._delay_s)
        model = self._model
        task = batch[0].task
        arrays = collate(model.inputs(task), batch)
        lengths = arrays["length"][:, None]
        ages = lengths - 1 - np.arange(arrays["items"].shape[1])
        weights = np.where(ages >= 0, DECAY ** np.maximum(ages, 0), 0).astype(np.float32)
        users = np.einsum("bl,bld->bd", weights, model.vectors[arrays["items"]])
        scores = users @ model.vectors.T
        if task is Task.RANK:
            return [
                _two_heads(row[request.arrays["candidates"]])
                for row, request in zip(scores, batch, strict=True)
            ]
        results = []
        for row, request in zip(scores, batch, strict=True):
            best = 1 + np.argsort(-row[1:], kind="stable")[: request.k]
            results.append(InferenceResult(row[best], best))
        return results

    def health(self) -> Health:
        return Health(self._model is not None, "" if self._model else "it is not loaded")

    def close(self) -> None:
        self._model = None


def _two_heads(scores: FloatArray) -> InferenceResult:
    return InferenceResult(np.stack([scores, scores / 2], axis=1))
