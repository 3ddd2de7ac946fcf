"""Graphs as Triton's backends can take them: without inputs that have no elements.

A model without, say, features of candidates still has an input for them, (B, C, 0). Triton knows no
axis of length 0, so such an input is made inside the graph, of another one that is as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gr_core.errors import PlanError
from gr_core.types import Task
from gr_trt.ensemble import Ensemble, Graph, Role, Tensor
from gr_trt.triton.files import copy, external_files

ROLES = (Role.SINGLE_PASS, Role.TOP_K)
"""What a repository takes of a folder of graphs."""


def fitted(source: Path, out_dir: Path, tasks: Sequence[Task]) -> Ensemble:
    """Copies the graphs of tasks to another folder, fit for Triton. Raises `PlanError`."""
    ensemble = Ensemble.read(source)
    graphs = tuple(
        _fitted(source, graph, out_dir)
        for graph in ensemble.graphs
        if graph.role in ROLES and any(task in graph.tasks for task in tasks)
    )
    ensemble = replace(ensemble, graphs=graphs)
    ensemble.write(out_dir)
    return ensemble


def _fitted(source: Path, graph: Graph, out_dir: Path) -> Graph:
    for name in (graph.file, *external_files(source / graph.file)):
        copy(source / name, out_dir / name)
    empty = [tensor for tensor in graph.inputs if 0 in tensor.axes]
    if not empty:
        return graph
    import onnx

    model = onnx.load(source / graph.file, load_external_data=False)
    for number, tensor in enumerate(empty):
        _make_inside(model.graph, tensor, _as_long(graph, tensor), number)
    onnx.save(model, out_dir / graph.file)
    return replace(graph, inputs=tuple(t for t in graph.inputs if t not in empty))


def _as_long(graph: Graph, tensor: Tensor) -> Tensor:
    """An input that has the axes of the given one but its last, which is 0."""
    for other in graph.inputs:
        if (*other.axes, 0) == tensor.axes and other.dtype == tensor.dtype:
            return other
    raise PlanError(
        f"graph {graph.name}: the input {tensor.name!r} has no elements, which Triton does not "
        "know; export with the option backend=python"
    )


def _make_inside(graph: Any, tensor: Tensor, other: Tensor, number: int) -> None:
    """Replaces an input by none of the columns of another one."""
    from onnx import TensorProto, helper

    (given,) = [value for value in graph.input if value.name == tensor.name]
    graph.input.remove(given)
    axis = 1 + len(other.axes)
    names = {part: f"triton_{number}_{part}" for part in ("axis", "zero", "column")}
    for part, value in (("axis", axis), ("zero", 0)):
        graph.initializer.append(helper.make_tensor(names[part], TensorProto.INT64, [1], [value]))
    nodes = [
        helper.make_node("Unsqueeze", [other.name, names["axis"]], [names["column"]]),
        helper.make_node(
            "Slice",
            [names["column"], names["zero"], names["zero"], names["axis"]],
            [tensor.name],
        ),
    ]
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
