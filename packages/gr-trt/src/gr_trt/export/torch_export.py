"""One torch module to one ONNX graph."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch
from torch import nn

from gr_core.collate import collate
from gr_core.contracts import EncodedRequest
from gr_core.errors import GrError
from gr_core.steps import KEYS, PAST_KEYS, PAST_VALUES, VALUES
from gr_core.types import Task
from gr_trt.ensemble import Tensor
from gr_trt.export.sources import Source, TopK

WEIGHTS = "weights.bin"
_INLINE = 1024
"""Tensors of fewer bytes stay in the graph."""
_PAGE = 4096
"""Where a tensor may begin in the file of weights, so that it can be mapped."""
_NOISY = ("torch", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_IN_PRECISION = (PAST_KEYS, PAST_VALUES, KEYS, VALUES)
"""Inputs and outputs that have the graph's precision; all other floats are float32."""


def _converted(source: Source, dtype: torch.dtype) -> nn.Module:
    """A copy of the module that computes in another precision, and answers in float32."""
    module = copy.deepcopy(source.module).to(dtype)
    keeps = [output.name in _IN_PRECISION for output in source.outputs]

    def widen(_: nn.Module, __: Any, outputs: Any) -> tuple[Any, ...]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(
            output if kept or not output.is_floating_point() else output.float()
            for output, kept in zip(outputs, keeps, strict=True)
        )

    module.register_forward_hook(widen)
    return module


def in_precision(tensors: Sequence[Tensor], dtype: str) -> tuple[Tensor, ...]:
    """Inputs or outputs as the graph of a precision has them."""
    return tuple(
        Tensor(t.name, dtype, t.axes, t.pad, t.batched) if t.name in _IN_PRECISION else t
        for t in tensors
    )


def batch(inputs: Sequence[Tensor], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples of single requests as the arrays of one batch, padded."""
    specs = [tensor.spec for tensor in inputs if tensor.batched]
    arrays = collate(specs, [EncodedRequest(Task.RANK, example, 0) for example in examples])
    shared = {tensor.name: examples[0][tensor.name] for tensor in inputs if not tensor.batched}
    return arrays | shared


def to_onnx(source: Source, dtype: str, opset: int, example: Mapping[str, Any]) -> ir.Model:
    """The graph, with axes named as the inputs and outputs say."""
    if isinstance(source.module, TopK):
        model = source.module.graph(dtype, opset)
        _named(model, source)
        return model
    module: nn.Module = source.module
    if dtype != "float32":
        module = _converted(source, TORCH_DTYPES[dtype])
    given = {
        name: torch.as_tensor(array).to(TORCH_DTYPES[dtype])
        if name in _IN_PRECISION
        else torch.as_tensor(array)
        for name, array in example.items()
    }
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                kwargs=given,
                dynamic_shapes={tensor.name: _axes(tensor) for tensor in source.inputs},
                output_names=[output.name for output in source.outputs],
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise GrError(
            f"{source.name}: torch {torch.__version__} cannot export it to ONNX: {_cause(error)}"
        ) from error
    assert program is not None
    model = program.model
    _named(model, source)
    return model


def _cause(error: BaseException) -> str:
    """What is at the bottom: the exporter wraps it in pages of advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _axes(tensor: Tensor) -> dict[int, str]:
    named = {i + tensor.batched: a for i, a in enumerate(tensor.axes) if isinstance(a, str)}
    return {0: "batch", **named} if tensor.batched else named


def _named(model: ir.Model, source: Source) -> None:
    """Checks and names inputs, outputs and their axes."""
    taken = [value.name for value in model.graph.inputs]
    declared = [tensor.name for tensor in source.inputs]
    if missing := [name for name in declared if name not in taken]:
        raise GrError(
            f"{source.name}: the module declares the inputs {', '.join(missing)} and does not "
            "use them; leave them out of its inputs"
        )
    sides = ((model.graph.inputs, source.inputs), (model.graph.outputs, source.outputs))
    for values, tensors in sides:
        by_name = {tensor.name: tensor for tensor in tensors}
        for value in values:
            tensor = by_name[str(value.name)]
            lead: tuple[str | int, ...] = ("batch",) if tensor.batched else ()
            value.shape = ir.Shape([*lead, *tensor.axes])


def save(model: ir.Model, path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the graph with facts in its metadata: texts as they are, all else as JSON."""
    for name, fact in facts.items():
        model.metadata_props[f"gr.{name}"] = fact if isinstance(fact, str) else json.dumps(fact)
    model.producer_name = "gr-trt"
    for node in model.graph.all_nodes():
        # Traces of where in the source a node came from: they name paths of this machine.
        node.metadata_props.clear()
        node.doc_string = None
    ir.save(model, path)


def weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class WeightsFile:
    """The weights of several graphs, each tensor once, in one file beside them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._offsets: dict[bytes, int] = {}

    def take(self, model: ir.Model) -> None:
        """Moves a graph's large tensors to the file, which is made for the first of them."""
        if self._file is None:
            self._file = (self._folder / WEIGHTS).open("xb")
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _INLINE:
                value.const_value = self._put(self._file, tensor)
        self._file.flush()

    def _put(self, file: BinaryIO, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        data = tensor.tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            file.write(b"\0" * (-file.tell() % _PAGE))
            self._offsets[digest] = file.tell()
            file.write(data)
        return ir.ExternalTensor(
            location=WEIGHTS,
            offset=self._offsets[digest],
            length=len(data),
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(tensor.name),
            base_dir=self._folder,
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of its own deprecations and of libraries that nobody needs."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
