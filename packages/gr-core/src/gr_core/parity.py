"""Parity: every engine against the float32 reference, on the same requests.

An engine passes if each of its scores is within its precision's tolerance of the reference's score
of the same item, and if its top-k is the reference's, where only items whose reference scores
differ by less than the tolerance may trade places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gr_core.contracts import EncodedRequest, InferenceResult, Model
from gr_core.engines import Only, RunningEngine, feasible_plans, running
from gr_core.errors import GrError
from gr_core.generation import GenerativeModel, search_width
from gr_core.planner import Plan
from gr_core.plugins.registry import Registry
from gr_core.samples import for_task, sample_requests
from gr_core.types import FloatArray, IntArray, Task

TOLERANCE = {"float32": 1e-4, "float16": 0.025, "bfloat16": 0.1, "int8": 0.2}
"""Allowed difference of a score, as a part of the largest magnitude of the request's scores. For
16-bit formats it is 25 units of their rounding, which every layer of a model adds to."""

REFERENCE = "torch"
BATCH = 8
"""Requests of mixed lengths that the compared engine gets at once; the reference gets one."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How one engine compares with the reference on one task."""

    task: Task
    engine: str
    reference: str
    requests: int
    tolerance: float
    max_error: float
    """Largest difference of a score, in the tolerance's terms."""
    overlap: float
    """Part of the reference's top-k that is in the engine's, averaged over requests."""
    problem: str = ""
    """Why it does not pass; empty if it does."""

    @property
    def ok(self) -> bool:
        return not self.problem


def compare(
    registry: Registry,
    model: Model,
    task: Task,
    only: Only | None = None,
    *,
    requests: int = 32,
    k: int = 10,
    seed: int = 0,
) -> Sequence[Parity]:
    """Compares all engines that can run, or ``only`` some of them, with the reference."""
    architecture = model.bundle.architecture
    reference = reference_plan(registry, architecture, task)
    plans = feasible_plans(registry, architecture, task, only)
    others = [p for p in plans if not _same(p, reference)]
    batch = _encoded(model, task, requests, k, seed)
    with running(reference, model) as engine:
        # Some more of the top than is compared, to know the scores of items that trade places.
        expected = [_alone(engine, _deeper(request, model)) for request in batch]
        label = engine.label
    return [_compare_one(p, model, batch, expected, label) for p in others]


def reference_plan(registry: Registry, architecture: str, task: Task) -> Plan:
    """The engine ``torch`` on the CPU in float32; without it, the one closest to the model."""
    plans = feasible_plans(registry, architecture, task, Only(dtypes=["float32"]))
    if not plans:
        raise GrError(f"no engine computes {architecture} {task.value} in float32")

    def distance(p: Plan) -> tuple[bool, int, bool, int]:
        return (
            p.engine.name != REFERENCE,
            len(p.exporters),
            p.device != "cpu",
            -p.engine.priority,
        )

    return min(plans, key=distance)


def _same(one: Plan, other: Plan) -> bool:
    return (one.engine, one.device, one.dtype) == (other.engine, other.device, other.dtype)


def _encoded(model: Model, task: Task, count: int, k: int, seed: int) -> list[EncodedRequest]:
    k = min(k, len(model.catalogue)) if task.finds_items else 0
    samples = sample_requests(model, count, seed=seed)
    encodings = [model.encode(for_task(request, task), task) for request in samples]
    return [replace(encoding.request, k=k) for encoding in encodings]


def _deeper(request: EncodedRequest, model: Model) -> EncodedRequest:
    if not request.task.finds_items:
        return request
    k = 2 * request.k + 50
    if isinstance(model, GenerativeModel):
        # As deep as the search that finds the top: a wider one would keep other prefixes.
        k = search_width(model.beam_width, request.k)
    return replace(request, k=min(k, len(model.catalogue)))


def _alone(engine: RunningEngine, request: EncodedRequest) -> InferenceResult:
    (result,) = engine.infer([request])
    return result


def _compare_one(
    chosen: Plan,
    model: Model,
    batch: Sequence[EncodedRequest],
    expected: Sequence[InferenceResult],
    reference: str,
) -> Parity:
    tolerance = TOLERANCE[chosen.dtype]
    errors, overlaps = [0.0], [1.0]
    problem = ""
    with running(chosen, model) as engine:
        results = [
            result
            for start in range(0, len(batch), BATCH)
            for result in engine.infer(batch[start : start + BATCH])
        ]
    for number, (request, result, right) in enumerate(zip(batch, results, expected, strict=True)):
        if not np.isfinite(result.scores).all():
            error, overlap = float("inf"), 0.0
        elif right.indices is None:
            error, overlap = score_error(result.scores, right.scores), 1.0
        else:
            assert result.indices is not None
            error, overlap = retrieval_error(
                result.indices, result.scores, right.indices, right.scores, request.k
            )
        errors.append(error)
        overlaps.append(overlap)
        if error > tolerance and not problem:
            problem = f"request {number} differs by {error:.2g}, more than {tolerance:g}"
    return Parity(
        task=chosen.task,
        engine=f"{chosen.engine.name} ({chosen.device}, {chosen.dtype})",
        reference=reference,
        requests=len(batch),
        tolerance=tolerance,
        max_error=max(errors),
        overlap=float(np.mean(overlaps[1:])),
        problem=problem,
    )


def score_error(scores: FloatArray, right: FloatArray) -> float:
    """Largest difference, as a part of the largest magnitude; inf for different shapes."""
    if scores.shape != right.shape:
        return float("inf")
    if not scores.size:
        return 0.0
    return float(np.abs(scores - right).max() / _scale(right))


def retrieval_error(
    indices: IntArray,
    scores: FloatArray,
    right_indices: IntArray,
    right_scores: FloatArray,
    k: int,
) -> tuple[float, float]:
    """Error and overlap of a top-k against a longer list of the reference.

    The error is the largest of: the differences between scores of the same item, and by how much
    the reference scores an item lower than the one that it has in that place. An item that is not
    even in the longer list counts as having its last score.
    """
    if len(indices) != k or len(set(indices.tolist())) != k:
        return float("inf"), 0.0
    place = {int(item): i for i, item in enumerate(right_indices)}
    last = float(right_scores[-1])
    error = 0.0
    for rank, (item, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True)):
        theirs = float(right_scores[place[item]]) if item in place else last
        error = max(error, abs(score - theirs), abs(float(right_scores[rank]) - theirs))
    overlap = len(set(indices.tolist()) & set(right_indices[:k].tolist())) / k
    return error / _scale(right_scores), overlap


def _scale(right: FloatArray) -> float:
    return max(float(np.abs(right).max()), 1e-6)
