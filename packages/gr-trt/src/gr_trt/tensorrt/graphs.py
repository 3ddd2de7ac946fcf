"""What has to be known of an ONNX graph before TensorRT reads it."""

from __future__ import annotations

import ast
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from gr_core.errors import BundleError, PlanError

OPSETS = (9, 24)
"""What the parsers of TensorRT 10.13 and later read. Newer ones are read as if they were these."""
IR_VERSIONS = (4, 13)
_DOMAINS = ("", "ai.onnx")
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: Mapping[str, Callable[..., int]] = {"Min": min, "Max": max}


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """An ONNX file without its weights."""

    path: Path
    model: onnx.ModelProto
    digest: str
    """SHA-256 of the file and of all files that its weights are in."""
    structure: str
    """SHA-256 of the graph alone: the same for two versions of a model that differ in weights."""


def read(path: Path) -> OnnxGraph:
    """Raises `BundleError` for a damaged file, `PlanError` for one that TensorRT misreads."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; export the model to onnx again") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's DecodeError, whose module depends on how it was installed
        model.Clear()
    if not model.graph.node:
        raise BundleError(f"{path}: not an ONNX graph, or damaged; export the model to onnx again")
    _check_versions(path, model)
    digest = hashlib.sha256(content)
    for file in _weight_files(path, model):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return OnnxGraph(path, model, digest.hexdigest(), _structure(model))


def _check_versions(path: Path, model: onnx.ModelProto) -> None:
    first, last = OPSETS
    for opset in model.opset_import:
        if opset.domain in _DOMAINS and not first <= opset.version <= last:
            raise PlanError(
                f"{path.name}: made with opset {opset.version}; TensorRT reads opsets {first} to "
                f"{last}; export it again, e.g. with --option opset=20"
            )
    first, last = IR_VERSIONS
    if not first <= model.ir_version <= last:
        raise PlanError(
            f"{path.name}: made with IR version {model.ir_version}; TensorRT reads {first} to "
            f"{last}; export it again with an older release of onnx"
        )


def _weight_files(path: Path, model: onnx.ModelProto) -> list[Path]:
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in names:
        if Path(name).name != name:
            raise BundleError(f"{path}: its weights are in {name!r}, outside of its folder")
        if not (path.parent / name).is_file():
            raise BundleError(f"{path}: {name} with its weights is missing; export it again")
    return [path.parent / name for name in sorted(names)]


def _structure(model: onnx.ModelProto) -> str:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        # Small ones are shapes and axes, which the graph is built around.
        if math.prod(tensor.dims) > 16:
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "external_data"):
                tensor.ClearField(field)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


# ── How much memory it needs ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest tensor that a graph computes in between."""

    name: str
    shape: tuple[int, ...]
    bytes: int


def peak(graph: OnnxGraph, sizes: Mapping[str, int]) -> Peak:
    """The largest tensor at given sizes of the axes.

    It is a lower bound of what is needed: kernels that are fused may need less than the tensor,
    several tensors alive at once need more. Tensors of unknown shape are left out.
    """
    found = Peak("", (), 0)
    for value in (*graph.model.graph.value_info, *graph.model.graph.output):
        kind = value.type.tensor_type
        dims = [_size(dim, sizes) for dim in kind.shape.dim]
        if not kind.HasField("shape") or None in dims:
            continue
        shape = tuple(dim for dim in dims if dim is not None)
        size = math.prod(shape) * _item_bytes(kind.elem_type)
        if size > found.bytes:
            found = Peak(value.name, shape, size)
    return found


def _item_bytes(kind: int) -> int:
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
    except KeyError:
        return 1


def _size(dim: Any, sizes: Mapping[str, int]) -> int | None:
    """Of a fixed or named dimension, or an expression such as ``Max(0, candidate + history)``."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    try:
        return _evaluate(ast.parse(dim.dim_param, mode="eval").body, sizes)
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, sizes), _evaluate(node.right, sizes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_evaluate(part, sizes) for part in node.args))
    raise TypeError("not an expression of sizes")


def dtypes(graph: OnnxGraph) -> Iterator[str]:
    """Names of the types of its weights and inner tensors, e.g. ``FLOAT16``."""
    kinds = {tensor.data_type for tensor in graph.model.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in graph.model.graph.value_info}
    yield from sorted(TensorProto.DataType.Name(kind) for kind in kinds)
