"""What int8 does to answers: the float32 graphs and the int8 graphs on the same requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gr_core.contracts import Artifact, EngineOptions, InferenceResult, Model
from gr_core.errors import GrError
from gr_core.labelled import (
    Case,
    K,
    LabelledRequest,
    auc,
    cases,
    labelled_requests,
    quality,
)
from gr_core.parity import score_error
from gr_core.samples import sample_requests
from gr_core.types import Task
from gr_trt.ensemble import Ensemble
from gr_trt.quantization.options import QuantizationOptions

REQUESTS = 64
"""Sample requests that are compared where a bundle brings no labelled ones."""
LABELLED = 4096
"""Labelled requests that are judged at most, the first ones."""
_BATCH = 16
_RESAMPLES = 100


def check_quality(
    before: Path, after: Path, model: Model, options: QuantizationOptions
) -> Mapping[str, Any]:
    """By task: overlap, error, and the metrics of `gr_core.labelled.quality` before and after.

    ``overlap`` is the part of the float32 graphs' best items that are among the int8 graphs': of
    ten, for ranking of at most half the candidates. ``max_error`` is the largest difference of a
    ranking's score, as a part of the largest magnitude of its request. A metric may fall by
    ``max_loss`` of what it is above chance, or by two standard errors of the paired difference,
    whatever is more: a smaller loss cannot be told from none. Raises `GrError` under a bound.
    """
    found: dict[str, Any] = {}
    labelled = labelled_requests(model)[:LABELLED]
    for task in dict.fromkeys(t for graph in Ensemble.read(before).graphs for t in graph.tasks):
        found[task.value] = _compared(before, after, model, task, labelled, options)
    return found


def _compared(
    before: Path,
    after: Path,
    model: Model,
    task: Task,
    labelled: Sequence[LabelledRequest],
    options: QuantizationOptions,
) -> dict[str, Any]:
    judged = cases(model, task, labelled)
    samples = [] if judged else map(LabelledRequest, sample_requests(model, REQUESTS))
    asked = judged or cases(model, task, list(samples), unlabelled=True)
    right = _answers(before, "float32", model, task, asked)
    results = _answers(after, "int8", model, task, asked)
    triples = list(zip(asked, right, results, strict=True))
    overlaps = [_overlap(case, one, other, model) for case, one, other in triples]
    known = [overlap for overlap in overlaps if overlap is not None]
    facts: dict[str, Any] = {
        "requests": len(asked),
        "labelled": bool(judged),
        "overlap": float(np.mean(known)) if known else 1.0,
    }
    if task is Task.RANK:
        facts["max_error"] = max(score_error(other.scores, one.scores) for _, one, other in triples)
    if facts["overlap"] < options.min_overlap:
        raise GrError(
            f"{task.value}: the int8 graphs answer {facts['overlap']:.1%} of what the float32 "
            f"graphs answer among the best {K}, less than min_overlap ({options.min_overlap:.0%}); "
            "calibrate on more requests, name products as keep_float, or use another precision"
        )
    if not judged:
        return facts
    one, other = (quality(task, judged, r, model.heads) for r in (right, results))
    noise = _standard_errors(task, judged, right, results, model.heads)
    facts["float32"], facts["int8"], facts["standard_error"] = dict(one), dict(other), noise
    for metric, error in noise.items():
        chance = 0.5 if metric.startswith("auc") else 0.0
        allowed = max(options.max_loss * max(one[metric] - chance, 0.0), 2 * error)
        if one[metric] - other[metric] > allowed:
            raise GrError(
                f"{task.value}: {metric} falls from {one[metric]:.4f} to {other[metric]:.4f} in "
                f"int8, by more than {allowed:.4f} (max_loss {options.max_loss:g}); calibrate on "
                "more requests, name products as keep_float, or use another precision"
            )
    return facts


def _answers(
    folder: Path, dtype: str, model: Model, task: Task, asked: Sequence[Case]
) -> list[InferenceResult]:
    """What the engine that serves the graphs answers."""
    from gr_trt.onnx_runtime.engine import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine()
    try:
        engine.load(Artifact("onnx", folder), model, [task], EngineOptions(dtype=dtype, threads=1))
        requests = [case.request for case in asked]
        return [
            result
            for start in range(0, len(requests), _BATCH)
            for result in engine.infer(requests[start : start + _BATCH])
        ]
    finally:
        engine.close()


def _overlap(
    case: Case, right: InferenceResult, found: InferenceResult, model: Model
) -> float | None:
    """None where a request has too few candidates to have a best half."""
    if right.indices is not None:
        one, other = case.top(right), case.top(found)
    else:
        k = min(K, len(right.scores) // 2)
        weights: Mapping[str, float] = {}
        one, other = (
            np.argsort(-model.decode(Task.RANK, result, weights)[0], kind="stable")[:k]
            for result in (right, found)
        )
    return len(np.intersect1d(one, other)) / len(one) if len(one) else None


def _standard_errors(
    task: Task,
    judged: Sequence[Case],
    right: Sequence[InferenceResult],
    found: Sequence[InferenceResult],
    heads: Sequence[str],
) -> dict[str, float]:
    """Of the differences of the metrics that are judged, paired, by bootstrap over requests."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(judged), (_RESAMPLES, len(judged)))
    if task is Task.RETRIEVE:
        differences = [
            quality(task, [case], [other], heads)[f"ndcg@{K}"]
            - quality(task, [case], [one], heads)[f"ndcg@{K}"]
            for case, one, other in zip(judged, right, found, strict=True)
        ]
        return {f"ndcg@{K}": float(np.array(differences)[draws].mean(axis=1).std())}
    noise = {}
    for column, head in enumerate(heads):
        values = [
            _auc_of(judged, found, column, draw) - _auc_of(judged, right, column, draw)
            for draw in draws
        ]
        if np.isfinite(values).any():
            noise[f"auc:{head}"] = float(np.nanstd(values))
    return noise


def _auc_of(
    judged: Sequence[Case], results: Sequence[InferenceResult], column: int, draw: Any
) -> float:
    label = np.concatenate([judged[i].labels_CO[:, column] for i in draw])
    score = np.concatenate([results[i].scores[:, column] for i in draw])
    known = np.isfinite(label)
    return auc(label[known] > 0, score[known])
