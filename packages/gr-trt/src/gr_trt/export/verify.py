"""A graph against the torch module that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from gr_core.errors import GrError
from gr_core.parity import TOLERANCE
from gr_core.steps import USER
from gr_trt.ensemble import GraphParity, Tensor
from gr_trt.export.sources import Arrays, Source, TopK, run
from gr_trt.export.torch_export import batch

GROUPS = (1, 2, 3)
"""Sizes of the batches that the examples are compared in, the last again and again."""


def verify(
    file: Path, source: Source, dtype: str, *, tolerance: float | None = None
) -> GraphParity:
    """Runs both on batches of several shapes; raises `GrError` where they differ.

    By more than ``tolerance``, that is; None is what `gr_core.parity` allows the precision.
    """
    session, runtime = _session(file, dtype)
    given = {value.name: value.type for value in session.get_inputs()}
    shapes, worst = [], 0.0
    for group in _groups(source.examples):
        feeds = batch(source.inputs, group)
        shapes.append(_shape(source.inputs, feeds))
        right = run(source.module, feeds)
        typed = {name: _as(array, given[name]) for name, array in feeds.items()}
        try:
            found = session.run([output.name for output in source.outputs], typed)
        except Exception as error:  # ONNX Runtime raises classes of its own, without a base
            raise GrError(f"{source.name}: {runtime} fails at {shapes[-1]}: {error}") from error
        if isinstance(source.module, TopK):
            # Ties may come in any order: an item is as right as its score.
            right = (right[0], source.module.scores_of(feeds[USER], found[1]))
            found = (found[0], found[0])
        for tensor, one, other in zip(source.outputs, found, right, strict=True):
            worst = max(worst, _error(source, tensor, group, one, other))
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    if not worst <= allowed:
        raise GrError(
            f"{source.name}: the graph in {dtype} differs from torch by {worst:.2g} of the largest "
            f"magnitude, more than {allowed:g}, at {'; '.join(shapes)}"
        )
    return GraphParity(tuple(shapes), worst, allowed, runtime)


def _groups(examples: Sequence[Arrays]) -> list[Sequence[Arrays]]:
    groups: list[Sequence[Arrays]] = []
    start = 0
    while start < len(examples):
        size = GROUPS[min(len(groups), len(GROUPS) - 1)]
        groups.append(examples[start : start + size])
        start += size
    return groups


def _error(source: Source, tensor: Tensor, group: Sequence[Arrays], one: Any, other: Any) -> float:
    """Largest difference at places that are not padding."""
    worst = 0.0
    for row, example in enumerate(group):
        place = _place(source.inputs, tensor, example)
        found, right = one[row][place], other[row][place]
        if not right.size:
            continue
        difference = np.abs(found.astype(np.float32) - right).max()
        scale = max(float(np.abs(right).max()), 1e-6)
        worst = max(worst, float(difference) / scale) if np.isfinite(difference) else np.inf
    return worst


def _place(
    inputs: Sequence[Tensor], tensor: Tensor, example: Mapping[str, Any]
) -> tuple[slice, ...]:
    sizes = {
        axis: np.shape(example[given.name])[i]
        for given in inputs
        for i, axis in enumerate(given.axes)
        if isinstance(axis, str)
    }
    return tuple(slice(sizes.get(a)) if isinstance(a, str) else slice(None) for a in tensor.axes)


def _shape(inputs: Sequence[Tensor], feeds: Mapping[str, Any]) -> str:
    sizes: dict[str, int] = {}
    for tensor in inputs:
        shape = np.shape(feeds[tensor.name])
        if tensor.batched:
            sizes["batch"], shape = shape[0], shape[1:]
        sizes |= {axis: shape[i] for i, axis in enumerate(tensor.axes) if isinstance(axis, str)}
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _as(array: Any, kind: str) -> Any:
    dtype = {"tensor(float16)": np.float16, "tensor(float)": np.float32}.get(kind)
    return np.asarray(array) if dtype is None else np.asarray(array).astype(dtype)


def _session(file: Path, dtype: str) -> tuple[Any, str]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    name = f"onnxruntime {ort.__version__}"
    graph: str | bytes = str(file)
    if dtype == "bfloat16":
        # It has no such kernels on CPUs: same graph, same rounded weights, wider arithmetic.
        graph = _widened(onnx.load(file)).SerializeToString()
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:
        raise GrError(f"{file.name}: {name} cannot load the graph: {error}") from error
    return session, f"{name}, computed in float32" if dtype == "bfloat16" else name


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """bfloat16 replaced by float32 everywhere."""
    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT

    def tensor(proto: TensorProto) -> None:
        if proto.data_type == narrow:
            array = onnx.numpy_helper.to_array(proto).astype(np.float32)
            proto.CopyFrom(onnx.numpy_helper.from_array(array, proto.name))

    graph = model.graph
    for initializer in graph.initializer:
        tensor(initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensor(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i == narrow:
                attribute.i = wide
    return model
