"""What gr-vllm registers. Imports gr_core alone; torch and vLLM load when needed."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import EngineDescriptor, ExporterDescriptor, Task, hookimpl
from gr_vllm import probes
from gr_vllm._version import __version__

_TASKS = (Task.RETRIEVE, Task.RANK, Task.GENERATE)


@hookimpl
def gr_register_exporters() -> Iterable[ExporterDescriptor]:
    return [
        ExporterDescriptor(
            name="vllm",
            factory="gr_vllm.export.exporter:VllmExporter",
            source="torch",
            target="vllm",
            tasks=_TASKS,
            revision=__version__,
            summary="Model directories for vLLM: Hugging Face's config.json and safetensors",
            probe=probes.torch,
        )
    ]


@hookimpl
def gr_register_engines() -> Iterable[EngineDescriptor]:
    return [
        EngineDescriptor(
            name="vllm",
            factory="gr_vllm.engine:VllmEngine",
            formats=("vllm",),
            tasks=_TASKS,
            devices=("cuda", "cpu"),
            dtypes=("float32", "bfloat16", "float16", "int8"),
            priority=5,
            summary="vLLM: continuous batching, paged K and V, prefix caching",
            probe=probes.vllm,
            device_probe=probes.vllm_device,
            batches_itself=True,
        )
    ]
