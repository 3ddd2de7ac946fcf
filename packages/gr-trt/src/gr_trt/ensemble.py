"""``ensemble.json``: what the graphs of a folder are, and how they fit together.

A folder of the format ``onnx`` or ``tensorrt`` holds this file and the graphs that it names. Every
engine, and whoever deploys the graphs elsewhere, reads from it what goes in and what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from gr_core.contracts import ArraySpec
from gr_core.errors import BundleError
from gr_core.types import Task

FILE = "ensemble.json"
FORMAT_VERSION = 1
_MAX_BYTES = 16 * 2**20


class Role(StrEnum):
    """What a graph computes."""

    SINGLE_PASS = "single_pass"
    """A model's inputs to the answer, see `gr_core.contracts.TorchModel`."""
    PREFILL = "prefill"
    """A history to its K and V, see `gr_core.steps`."""
    DECODE = "decode"
    """New tokens and candidates against given K and V to the answer, see `gr_core.steps`."""
    TOP_K = "top_k"
    """Users to the items with the largest dot products."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: its leading axis is the batch, jagged axes are names."""

    name: str
    dtype: str
    """Of numpy, or ``bfloat16``."""
    axes: tuple[str | int, ...]
    """Those of one request, without the batch, as in `gr_core.contracts.ArraySpec`."""
    pad: float = 0
    batched: bool = True
    """False for what the whole batch shares, e.g. the ``k`` of top-k."""

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.name, self.dtype, self.axes, self.pad)

    @staticmethod
    def of(spec: ArraySpec) -> Tensor:
        return Tensor(spec.name, spec.dtype, spec.axes, spec.pad)


@dataclass(frozen=True, slots=True)
class GraphParity:
    """What was compared with torch when the graph was made."""

    shapes: tuple[str, ...]
    """Sizes of the axes, e.g. ``batch=2 history=17 candidate=5``."""
    max_error: float
    """Largest difference, relative to the largest magnitude of the output."""
    tolerance: float
    runtime: str
    """What ran the graph, e.g. ``onnxruntime 1.31.1``."""


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph of the folder."""

    name: str
    file: str
    role: Role
    tasks: tuple[Task, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parity: GraphParity | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the histories of the bundle's samples are, and how many candidates they bring."""

    minimum: int
    typical: int
    """The median."""
    maximum: int


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What a folder of graphs holds."""

    model: str
    version: str
    architecture: str
    identity: str
    """Hexadecimal, see `gr_core.repository.Bundle.identity`."""
    dtype: str
    """Precision of the graphs: ``float32``, ``float16``, ``bfloat16``, ``int8``."""
    opset: int
    ir_version: int
    heads: tuple[str, ...]
    catalogue_size: int
    graphs: tuple[Graph, ...]
    axes: Mapping[str, Lengths] = field(default_factory=dict)
    """By jagged axis: ``history``, ``candidate``, ``token``, ``past``; the maximum is what the
    model can take."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What only some exporters know, by exporter: quality after quantization, how a plan was
    built."""

    def graph(self, role: Role, task: Task) -> Graph | None:
        """The graph of a role for a task, if there is one."""
        return next((g for g in self.graphs if g.role is role and task in g.tasks), None)

    def write(self, folder: Path) -> None:
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        (folder / FILE).write_text(text + "\n")

    @staticmethod
    def read(folder: Path) -> Ensemble:
        """Raises `BundleError` for a file that is missing, damaged, or of another version."""
        path = folder / FILE
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise BundleError(f"{path}: larger than {_MAX_BYTES} bytes; export the model again")
            return _ensemble(json.loads(path.read_text()))
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; export the model again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path}: not an ensemble of graphs ({type(error).__name__}: {error}); "
                "export the model again"
            ) from None


def _ensemble(data: dict[str, Any]) -> Ensemble:
    version = data.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version}, expected {FORMAT_VERSION}")
    data["heads"] = tuple(data["heads"])
    data["graphs"] = tuple(map(_graph, data["graphs"]))
    data["axes"] = {name: Lengths(**lengths) for name, lengths in data["axes"].items()}
    return Ensemble(**data)


def _graph(data: dict[str, Any]) -> Graph:
    data["role"] = Role(data["role"])
    data["tasks"] = tuple(map(Task, data["tasks"]))
    for end in ("inputs", "outputs"):
        data[end] = tuple(Tensor(**{**t, "axes": tuple(t["axes"])}) for t in data[end])
    if parity := data.get("parity"):
        data["parity"] = GraphParity(**{**parity, "shapes": tuple(parity["shapes"])})
    graph = Graph(**data)
    if Path(graph.file).name != graph.file:
        raise ValueError(f"graph {graph.name!r}: file {graph.file!r} is not in the folder itself")
    return graph
