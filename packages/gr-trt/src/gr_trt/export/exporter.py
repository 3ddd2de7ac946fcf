"""The exporter ``onnx``: a model's torch modules as a folder of verified graphs."""

from __future__ import annotations

import logging
import tempfile
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from gr_core.contracts import Artifact, ExportOptions, Model, TorchModel
from gr_core.errors import PlanError
from gr_trt.ensemble import Ensemble, Graph
from gr_trt.export.lengths import examples, lengths
from gr_trt.export.options import OnnxOptions
from gr_trt.export.sources import sources
from gr_trt.export.torch_export import (
    TORCH_DTYPES,
    WeightsFile,
    batch,
    in_precision,
    save,
    to_onnx,
    weight_bytes,
)
from gr_trt.export.verify import verify
from gr_trt.options import own_options

logger = logging.getLogger(__name__)

IR_VERSION = 10
"""What ONNX Runtime from 1.18 and TensorRT from 10 on read."""
DTYPES = (*TORCH_DTYPES, "int8")


class OnnxExporter:
    """torch → onnx; its options are those of `OnnxOptions` and, in int8, of quantization."""

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        own = own_options(OnnxOptions, options.extra, "exporter onnx")
        if not isinstance(model, TorchModel):
            raise PlanError(f"exporter onnx: {type(model).__name__} offers no torch module")
        if options.dtype not in DTYPES:
            raise PlanError(
                f"exporter onnx: dtype is {options.dtype!r}; expected one of {', '.join(DTYPES)}"
            )
        if options.dtype != "int8":
            _export(model, out_dir, options.dtype, own)
            return Artifact("onnx", out_dir)
        from gr_trt.quantization import QuantizationOptions, quantize_ensemble

        quantization = own_options(QuantizationOptions, options.extra, "exporter onnx")
        with tempfile.TemporaryDirectory(prefix="gr-onnx-") as scratch:
            _export(model, Path(scratch), "float32", own)
            # Plans for a target are of another machine than the one that exports.
            device = "cuda" if "target" in options.extra else options.device
            quantize_ensemble(Path(scratch), out_dir, model, quantization, device=device)
        return Artifact("onnx", out_dir)


def _export(model: TorchModel, out_dir: Path, dtype: str, own: OnnxOptions) -> Ensemble:
    bundle = model.bundle
    tasks = [task for task in model.tasks if not own.tasks or task.value in own.tasks]
    if not tasks:
        raise PlanError(
            f"exporter onnx: option tasks is {list(own.tasks)}; {bundle.name} can only "
            f"{', '.join(task.value for task in model.tasks)}"
        )
    requests = {task: examples(model, task) for task in tasks}
    ensemble = Ensemble(
        model=bundle.name,
        version=bundle.version,
        architecture=bundle.architecture,
        identity=bundle.identity.hex(),
        dtype=dtype,
        opset=own.opset,
        ir_version=IR_VERSION,
        heads=tuple(model.heads),
        catalogue_size=len(model.catalogue),
        graphs=(),
        axes=lengths(model, tasks, own.max_candidates),
    )
    facts = {
        "model": bundle.name,
        "version": bundle.version,
        "architecture": bundle.architecture,
        "identity": ensemble.identity,
        "dtype": dtype,
        "features": dict(bundle.features),
    }
    graphs: list[Graph] = []
    with closing(WeightsFile(out_dir)) as weights:
        for source in sources(model, tasks, requests, steps=own.steps):
            file = out_dir / f"{source.name}.onnx"
            graph = to_onnx(source, dtype, own.opset, batch(source.inputs, source.examples[:2]))
            graph.ir_version = IR_VERSION
            if weight_bytes(graph) > own.inline_bytes:
                weights.take(graph)
            save(graph, file, facts | {"role": source.role, "tasks": list(source.tasks)})
            parity = verify(file, source, dtype)
            save(graph, file, {"parity": asdict(parity)})
            logger.info(
                "%s/%s: %s in %s, %d nodes, differs from torch by %.2g (%g allowed)",
                bundle.name,
                bundle.version,
                file.name,
                dtype,
                len(graph.graph),
                parity.max_error,
                parity.tolerance,
            )
            graphs.append(
                Graph(
                    name=source.name,
                    file=file.name,
                    role=source.role,
                    tasks=source.tasks,
                    inputs=in_precision(source.inputs, dtype),
                    outputs=in_precision(source.outputs, dtype),
                    parity=parity,
                )
            )
    ensemble = replace(ensemble, graphs=tuple(graphs))
    ensemble.write(out_dir)
    return ensemble
