"""A folder of float32 graphs as a folder of int8 graphs."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gr_core.contracts import EncodedRequest, Model, TorchModel
from gr_core.errors import GrError, PlanError
from gr_core.json_requests import read_requests
from gr_core.labelled import read_labelled
from gr_core.samples import for_task, sample_requests
from gr_core.types import RecommendRequest, Task
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.quantization.graphs import (
    prepare,
    products,
    quantize_early,
    quantize_tables,
)
from gr_trt.quantization.options import QuantizationOptions
from gr_trt.quantization.quality import check_quality
from gr_trt.quantization.quantize import Feeds, quantize

logger = logging.getLogger(__name__)

NOTES = "int8"
"""What `Ensemble.notes` has it under."""
_LONGEST = 2048
"""Behaviours of a request that ranges are found by; scores among tokens of more fill memory."""
_VERIFIED = 6
"""Examples that a graph is compared with torch on."""
_NOW_MS = 1_700_000_000_000


def quantize_ensemble(
    source: Path, out: Path, model: Model, options: QuantizationOptions, *, device: str = "cpu"
) -> Ensemble:
    """Writes the graphs of ``source``, which are in float32, in 8 bits, and judges their quality.

    ``out`` is an empty folder; what is left in it after an error is of no use. Raises `GrError`
    where a graph differs too much from torch, or quality is under the bounds of ``options``.
    """
    import onnxruntime as ort

    if not isinstance(model, TorchModel):
        raise PlanError(f"quantization: {type(model).__name__} offers no torch module")
    ensemble = Ensemble.read(source)
    if ensemble.dtype != "float32":
        raise PlanError(f"quantization: {source} is in {ensemble.dtype}; expected float32")
    activations = options.activations
    if activations == "auto":
        activations = "uint8" if device == "cpu" else "int8"
    writer = _Writer(source, out, model, ensemble, options, activations)
    try:
        graphs = tuple(map(writer.write, ensemble.graphs))
    finally:
        writer.close()
    facts = {
        "quantizer": f"onnxruntime.quantization {ort.__version__}",
        "activations": activations,
        "calibration": f"{writer.requests} requests, extremes",
        "graphs": writer.facts,
    }
    made = replace(ensemble, dtype="int8", graphs=graphs)
    replace(made, notes={**ensemble.notes, NOTES: facts}).write(out)
    facts["quality"] = check_quality(source, out, model, options)
    made = replace(made, notes={**ensemble.notes, NOTES: facts})
    made.write(out)
    return made


class _Writer:
    """Writes one graph after the other; those of large models share one file of weights."""

    def __init__(
        self,
        source: Path,
        out: Path,
        model: TorchModel,
        ensemble: Ensemble,
        options: QuantizationOptions,
        activations: str,
    ) -> None:
        from gr_trt.export.sources import sources
        from gr_trt.export.torch_export import WEIGHTS, WeightsFile

        self._source, self._out, self._options = source, out, options
        self._activations = activations
        tasks = list(dict.fromkeys(task for graph in ensemble.graphs for task in graph.tasks))
        history = ensemble.axes.get("history")
        longest = min(history.maximum if history else _LONGEST, _LONGEST)
        requests = {task: _requests(model, task, options, longest) for task in tasks}
        self.requests = max(map(len, requests.values()))
        self.facts: dict[str, Any] = {}
        steps = any(graph.role is Role.DECODE for graph in ensemble.graphs)
        self._sources = {one.name: one for one in sources(model, tasks, requests, steps=steps)}
        self._weights = WeightsFile(out) if (source / WEIGHTS).exists() else None

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()

    def write(self, graph: Graph) -> Graph:
        """The graph in 8 bits, compared with torch."""
        from gr_trt.export.torch_export import save
        from gr_trt.export.verify import verify

        file = self._out / graph.file
        model = onnx.load(str(self._source / graph.file))
        metadata = list(model.metadata_props)
        kept = graph.role is Role.TOP_K and not self._options.quantize_top_k
        prepare(model, fuse_biases=self._activations == "uint8")
        names = [] if kept else products(model, self._options.keep_float)
        with tempfile.TemporaryDirectory(prefix="gr-int8-") as scratch:
            made = Path(scratch) / graph.file
            if names:
                prepared = Path(scratch) / f"float-{graph.file}"
                large = self._weights is not None
                onnx.save(model, str(prepared), save_as_external_data=large)
                quantize(
                    prepared,
                    made,
                    names,
                    self._feeds(graph),
                    activations=self._activations,
                    external_data=large,
                )
                model = onnx.load(str(made))
            tables = 0
            if self._activations == "uint8":
                quantize_early(model)
                tables = quantize_tables(model) if self._options.quantize_embeddings else 0
            del model.metadata_props[:]
            model.metadata_props.extend(metadata)
            written = self._write(model, file)
        source = self._sources[graph.name]
        some = source.examples[:: max(1, len(source.examples) // _VERIFIED)]
        bound = self._options.max_error
        parity = verify(file, replace(source, examples=some), "int8", tolerance=math.inf)
        if not parity.max_error <= bound:
            raise GrError(
                f"{graph.file}: in int8 it differs from torch by {parity.max_error:.2g} of the "
                f"largest magnitude, more than max_error ({bound:g}); name the "
                "products that have to stay in float32 as keep_float, or use another precision"
            )
        parity = replace(parity, tolerance=bound)
        save(written, file, {"parity": asdict(parity)})
        self.facts[graph.name] = {
            "products": len(names),
            "tables": tables,
            "bytes": file.stat().st_size,
            "max_error": parity.max_error,
        }
        logger.info(
            "%s: %d products and %d tables in int8, differs from torch by %.2g",
            graph.file,
            len(names),
            tables,
            parity.max_error,
        )
        return replace(graph, parity=parity)

    def _feeds(self, graph: Graph) -> Feeds:
        """Batches of one request each: padding would be a part of the ranges."""
        from gr_trt.export.torch_export import batch

        source = self._sources[graph.name]
        if graph.role is not Role.TOP_K:
            return [batch(source.inputs, [example]) for example in source.examples]
        from gr_trt.export.sources import run

        (single,) = (
            one
            for one in self._sources.values()
            if one.role is Role.SINGLE_PASS and Task.RETRIEVE in one.tasks
        )
        user, k = source.inputs
        return [
            {
                user.name: run(single.module, batch(single.inputs, [example]))[0],
                k.name: np.array(10),
            }
            for example in single.examples
        ]

    def _write(self, model: onnx.ModelProto, file: Path) -> Any:
        """The graph as it was written, an `onnx_ir.Model`."""
        import onnx_ir as ir

        from gr_trt.export.torch_export import save

        graph = ir.from_proto(model)
        if self._weights is not None:
            self._weights.take(graph)
        save(graph, file, {"dtype": "int8"})
        return graph


def _requests(
    model: TorchModel, task: Task, options: QuantizationOptions, longest: int
) -> Sequence[EncodedRequest]:
    """Those that ranges are found by; made up ones have histories of up to ``longest``."""
    count = options.calibration_requests
    samples = sample_requests(model, count, max_history=longest)
    if options.calibration:
        path = Path(options.calibration)
        given: Sequence[RecommendRequest] = (
            [labelled.request for labelled in read_labelled(path)]
            if path.suffix == ".jsonl"
            else read_requests(path)
        )
        if not given:
            raise PlanError(f"calibration: {path} holds no request; add some hundred real ones")
        requests = [
            replace(request, request_time_ms=request.request_time_ms or _NOW_MS)
            for request in given
            if task is Task.RETRIEVE or request.candidates is not None
        ][:count] or samples
    else:
        requests = samples
    return [model.encode(for_task(request, task), task).request for request in requests]
