"""What gr-trt registers. Imports gr_core alone; ONNX, torch and TensorRT load when needed."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import CommandDescriptor, EngineDescriptor, ExporterDescriptor, Task, hookimpl
from gr_trt import probes

_TASKS = (Task.RETRIEVE, Task.RANK)


@hookimpl
def gr_register_exporters() -> Iterable[ExporterDescriptor]:
    return [
        ExporterDescriptor(
            name="onnx",
            factory="gr_trt.export.exporter:OnnxExporter",
            source="torch",
            target="onnx",
            tasks=_TASKS,
            summary="Graphs for ONNX Runtime and TensorRT, compared with torch as they are made",
            probe=probes.onnx_export,
        ),
        ExporterDescriptor(
            name="tensorrt",
            factory="gr_trt.tensorrt.exporter:TensorRTExporter",
            source="onnx",
            target="tensorrt",
            tasks=_TASKS,
            revision=probes.tensorrt_revision(),
            summary="Plans of TensorRT; TensorRT for RTX builds them for other machines too",
            probe=probes.tensorrt,
        ),
        ExporterDescriptor(
            name="triton-repository",
            factory="gr_trt.triton.exporter:TritonExporter",
            source="onnx",
            target="triton-repository",
            tasks=_TASKS,
            summary="A model repository for Triton Inference Server",
            probe=probes.onnx_export,
            automatic=False,
        ),
    ]


@hookimpl
def gr_register_engines() -> Iterable[EngineDescriptor]:
    return [
        EngineDescriptor(
            name="onnxruntime",
            factory="gr_trt.onnx_runtime.engine:OnnxRuntimeEngine",
            formats=("onnx",),
            tasks=_TASKS,
            devices=("cpu", "cuda"),
            dtypes=("float32", "float16", "int8"),
            priority=20,
            summary="ONNX Runtime with the execution providers at hand, K and V reused",
            probe=probes.onnxruntime,
            device_probe=probes.onnxruntime_device,
        ),
        EngineDescriptor(
            name="tensorrt",
            factory="gr_trt.tensorrt.engine:TensorRTEngine",
            formats=("tensorrt",),
            tasks=_TASKS,
            devices=("cuda",),
            dtypes=("float16", "bfloat16", "float32", "int8"),
            priority=40,
            summary="TensorRT and TensorRT for RTX: plans for the GPU, CUDA graphs",
            probe=probes.tensorrt,
            device_probe=probes.tensorrt_device,
        ),
    ]


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return [
        CommandDescriptor(
            name="triton",
            factory="gr_trt.triton.cli:triton",
            summary="Work on model repositories of Triton Inference Server",
        )
    ]
