"""What stands where in a repository, and what the steps pass to each other.

A task of a model is an ensemble ``NAME`` of three models, ``NAME-features`` → ``NAME-engine`` →
``NAME-answer``. Each of these holds one folder for each version, with all that it needs; ``NAME``
leads to the newest version, ``NAME-vN`` to version N, because an ensemble of Triton cannot hand its
own version down to its steps.

Shapes: B requests of a batch, N items of the longest, A jagged axes, D width of a user's
representation, C candidates, H heads, K items found.

| tensor | from → to | type, shape |
|---|---|---|
| ``request`` | client → features | text (B, 1), JSON |
| the inputs of the graph | features → engine | as the model says |
| ``request_sizes`` | features → engine ``python`` | int64 (B, 2 + A): K, tokens, lengths of axes |
| ``request_state`` | features → answer | text (B, 1), JSON, see `State` |
| ``request_items`` | features → answer | int64 (B, N): excluded items, or candidates; 0 is none |
| ``user`` | engine ``onnxruntime``, ``tensorrt`` → answer | (B, D) |
| ``scores`` | engine → answer | float32 (B, K), or (B, C, H) |
| ``indices`` | engine ``python`` → answer | int64 (B, K): items found; 0 is none |
| ``answer`` | answer → client | text (B, 1), JSON |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gr_core.contracts import ArraySpec, Model
from gr_core.errors import BundleError, PlanError
from gr_core.types import Task
from gr_trt.ensemble import Ensemble, Graph, Role, Tensor
from gr_trt.triton.options import PYTHON

CONFIG = "config.pbtxt"
WARM_UP = "warmup"
STEP = "step.json"
BUNDLE = "bundle"
ARTIFACT = "artifact"
REPORT = "report.json"
FORMAT_VERSION = 1

REQUEST, ANSWER = "request", "answer"
SIZES, STATE, ITEMS = "request_sizes", "request_state", "request_items"
"""Named so that no input of a model is called the same."""
SCORES, INDICES = "scores", "indices"
STEPS = ("features", "engine", "answer")

TYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "text": "TYPE_STRING",
}
"""Of Triton, by numpy's; what Triton's Python models can read."""


@dataclass(frozen=True, slots=True)
class Names:
    """Of the models of one task."""

    ensemble: str

    def step(self, step: str) -> str:
        return f"{self.ensemble}-{step}"

    def pinned(self, version: int) -> str:
        """The ensemble of one version."""
        return f"{self.ensemble}-v{version}"


def names_of(base: str, task: Task) -> Names:
    return Names(f"{base}-{task.value}")


@dataclass(frozen=True, slots=True)
class Step:
    """What a version folder of a Python model says of itself, its ``step.json``."""

    task: Task
    backend: str
    device: str
    dtype: str
    batch: int
    threads: int
    longest: Mapping[str, int] = field(default_factory=dict)
    """Length of each jagged axis that the graph takes at most, where it is padded to a power of
    two; empty where nothing is padded."""

    def write(self, folder: Path) -> None:
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        (folder / STEP).write_text(text + "\n")

    @staticmethod
    def read(folder: Path) -> Step:
        """Raises `BundleError` for a file that is missing, damaged, or of another version."""
        path = folder / STEP
        try:
            data = json.loads(path.read_text())
            if (version := data.pop("format_version")) != FORMAT_VERSION:
                raise ValueError(f"format_version is {version}, expected {FORMAT_VERSION}")
            return Step(**{**data, "task": Task(data["task"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{path}: not a step of this release of gr-trt ({error}); export the model again"
            ) from None


@dataclass(frozen=True, slots=True)
class State:
    """What the answer has to know of a request besides its ``request_items``."""

    k: int
    request_id: str
    unknown_items: int
    unscored: Sequence[int | str]
    head_weights: Mapping[str, float]

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def of(text: bytes) -> State:
        return State(**json.loads(text))


# ── Tensors ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a model in Triton."""

    name: str
    dtype: str
    """A key of `TYPES`."""
    dims: tuple[int, ...]
    """Those of one request, -1 where they differ."""
    scalar: bool = False
    """Whether the graph itself takes one number of a request and no axis for it."""


def port_of(tensor: Tensor | ArraySpec, where: str) -> Port:
    """Raises `PlanError` for a tensor that Triton cannot pass."""
    if tensor.dtype not in TYPES:
        raise PlanError(
            f"{where}: {tensor.name!r} is of type {tensor.dtype}, which Triton's Python models do "
            f"not know; they know {', '.join(TYPES)}"
        )
    dims = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.axes)
    if 0 in dims:
        raise PlanError(
            f"{where}: {tensor.name!r} has an axis of length 0, which Triton does not know; "
            f"export with the option backend={PYTHON}"
        )
    return Port(tensor.name, tensor.dtype, dims or (1,), scalar=not dims)


def step_inputs(model: Model, task: Task) -> Sequence[ArraySpec]:
    """What the engine ``python`` is given: all but arrays that are always empty."""
    return [spec for spec in model.inputs(task) if 0 not in spec.axes]


def axes_of(specs: Sequence[ArraySpec]) -> Sequence[str]:
    """Jagged axes in the order of ``request_sizes``."""
    return list(dict.fromkeys(a for spec in specs for a in spec.axes if isinstance(a, str)))


def graph_for(ensemble: Ensemble, task: Task, where: str) -> Graph:
    """The graph of a task in a single pass. Raises `PlanError`."""
    if (graph := ensemble.graph(Role.SINGLE_PASS, task)) is not None:
        return graph
    has = ", ".join(f"{g.name} ({g.role.value})" for g in ensemble.graphs) or "none"
    raise PlanError(
        f"{where}: {ensemble.model}/{ensemble.version} has no graph that computes {task.value} in "
        f"a single pass, only {has}"
    )


def features_ports(inputs: Sequence[Port], backend: str, axes: Sequence[str]) -> Sequence[Port]:
    """What the features step gives."""
    sizes = [Port(SIZES, "int64", (2 + len(axes),))] if backend == PYTHON else []
    return [*inputs, *sizes, Port(STATE, "text", (1,)), Port(ITEMS, "int64", (-1,))]


def engine_ports(task: Task, backend: str, heads: int, graph: Graph) -> Sequence[Port]:
    """What the engine step gives."""
    if backend != PYTHON:
        return [port_of(output, f"graph {graph.name}") for output in graph.outputs[:1]]
    if task is Task.RETRIEVE:
        return [Port(SCORES, "float32", (-1,)), Port(INDICES, "int64", (-1,))]
    return [Port(SCORES, "float32", (-1, heads))]


def numpy_type(dtype: str) -> Any:
    return np.object_ if dtype == "text" else np.dtype(dtype)
