"""Runs the steps that were written, in this process, and compares them with the graphs.

Shapes: B requests, C candidates, D width of a user's representation, H heads, I items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.collate import collate
from gr_core.contracts import InferenceResult, Model
from gr_core.errors import BundleError
from gr_core.steps import USER
from gr_core.types import FloatArray, Task
from gr_trt.ensemble import Ensemble, GraphParity, Role
from gr_trt.onnx_runtime.session import Runtime, Session
from gr_trt.triton.config import FILES
from gr_trt.triton.features import Row
from gr_trt.triton.layout import SCORES, Names, Step, graph_for
from gr_trt.triton.loading import (
    ENGINE,
    load_answers,
    load_engine,
    load_features,
    platform_engine,
)
from gr_trt.triton.options import ONNXRUNTIME, PYTHON, RepositoryOptions
from gr_trt.triton.repository import Source
from gr_trt.triton.samples import sample_rows

Array = npt.NDArray[Any]

SAMPLES = 8
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}
"""Relative to the largest score: what padding, and other kernels for other shapes, may change."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the graphs say of one request alone."""

    scores: FloatArray
    """(I + 1,) of every item, or (C,) of the candidates, those of padding being -inf."""
    ids: Sequence[Any]


def verify(
    out_dir: Path,
    names: Names,
    version: int,
    source: Source,
    task: Task,
    options: RepositoryOptions,
    original: Path,
) -> GraphParity:
    """Raises `BundleError` if an answer is not that of the graphs.

    ``original`` is the folder of graphs that was exported.
    """
    model = source.model
    folders = {step: out_dir / names.step(step) / str(version) for step in ("features", "answer")}
    features = load_features(folders["features"], model)
    answers = load_answers(folders["answer"], model)
    run, runtime = _engine(out_dir / names.step("engine") / str(version), source, task, options)
    tolerance = TOLERANCES[Ensemble.read(source.graphs).dtype]
    longest = Step.read(folders["features"]).longest
    rows = [row for _, row in sample_rows(features, model, task, longest, SAMPLES)]
    calls = [[row] for row in rows] + [rows]
    found = []
    for call in calls:
        tensors = features.tensors(call)
        found += [json.loads(text) for text in answers.texts({**tensors, **run(tensors)})]
    error = 0.0
    reference = _references(original, model, rows, task)
    for answer, row, expected in zip(found, [*rows, *rows], [*reference, *reference], strict=True):
        error = max(error, _difference(answer, row, expected, model, task))
    if not error <= tolerance:
        raise BundleError(
            f"{out_dir / names.ensemble}: answers differ from those of the graphs by {error:.3g} "
            f"of the largest score, {tolerance:g} is allowed; this is a fault of the exporter"
        )
    shapes = tuple(
        f"batch={len(call)} history and candidates={max(row.request.tokens for row in call)}"
        for call in calls
    )
    return GraphParity(shapes, error, tolerance, runtime)


def _engine(
    folder: Path, source: Source, task: Task, options: RepositoryOptions
) -> tuple[Callable[[Mapping[str, Array]], Mapping[str, Array]], str]:
    """The engine step as a function of the features' tensors, and what runs it."""
    import onnxruntime as ort

    runtime = f"onnxruntime {ort.__version__}"
    if options.backend == PYTHON:
        step = load_engine(folder, source.model, "cpu", platform_engine())
        return lambda t: step.tensors(step.compute(step.requests(t))), f"engine {ENGINE}, {runtime}"
    # A plan runs on its GPU only: the graph that it was built from takes and gives the same.
    graph = graph_for(Ensemble.read(source.graphs), task, str(folder))
    file = folder / FILES[ONNXRUNTIME]
    at = file if options.backend == ONNXRUNTIME else source.graphs / graph.file
    session = ort.InferenceSession(str(at), providers=["CPUExecutionProvider"])
    output = graph.outputs[0].name

    def run(tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        feeds = {
            tensor.name: tensors[tensor.name] if tensor.axes else tensors[tensor.name][:, 0]
            for tensor in graph.inputs
        }
        return {output: session.run([output], feeds)[0]}

    return run, runtime


def _references(
    graphs: Path, model: Model, rows: Sequence[Row], task: Task
) -> Sequence[_Reference]:
    ensemble = Ensemble.read(graphs)
    runtime = Runtime.on("cpu", "auto", 1)
    graph = graph_for(ensemble, task, str(graphs))
    single = Session(graphs, graph, runtime)
    size = len(model.catalogue)
    top_k = ensemble.graph(Role.TOP_K, task)
    search = Session(graphs, top_k, runtime) if top_k is not None else None
    found = []
    for row in rows:
        arrays = collate([tensor.spec for tensor in graph.inputs], [row.request])
        output = single.run(arrays)
        if task is Task.RETRIEVE:
            assert search is not None
            best = search.run({USER: output[USER], "k": np.array(size, np.int64)})
            scores = np.full(size + 1, -np.inf, np.float32)
            scores[best["indices"][0]] = best[SCORES][0]
            scores[row.items] = -np.inf
            found.append(_Reference(scores, model.catalogue.ids.tolist()))
            continue
        raw = output[graph.outputs[0].name][0, : len(row.items)].astype(np.float32)
        scores, _ = model.decode(task, InferenceResult(raw), row.state.head_weights)
        found.append(_Reference(scores, model.catalogue.ids_of(row.items).tolist()))
    return found


def _difference(
    answer: Mapping[str, Any], row: Row, expected: _Reference, model: Model, task: Task
) -> float:
    """Largest difference of a score, of its place and of its item, to the largest score."""
    scores = expected.scores[1:] if task is Task.RETRIEVE else expected.scores
    best = np.sort(scores[np.isfinite(scores)])[::-1][: row.state.k]
    given = np.array([item["score"] for item in answer["items"]], np.float32)
    if given.shape != best.shape:
        return float("inf")
    if not len(given):
        return 0.0
    of = dict(zip(expected.ids, scores.tolist(), strict=True))
    by_item = np.array([of[item["item_id"]] for item in answer["items"]])
    scale = max(float(np.abs(scores[np.isfinite(scores)]).max()), 1e-6)
    return float(max(np.abs(given - best).max(), np.abs(given - by_item).max())) / scale
