"""What gr-kernels registers. Imports gr_core alone; torch and the kernels load when needed."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import (
    CacheDescriptor,
    CommandDescriptor,
    EngineDescriptor,
    KernelDescriptor,
    Task,
    hookimpl,
)
from gr_kernels.descriptors import KERNELS, probe_triton


@hookimpl
def gr_register_kernels() -> Iterable[KernelDescriptor]:
    return KERNELS


def probe_device(device: str) -> tuple[bool, str]:
    """Whether the layers can run there: on any CPU, on GPUs with Triton."""
    return (True, "") if device == "cpu" else probe_triton()


@hookimpl
def gr_register_engines() -> Iterable[EngineDescriptor]:
    return [
        EngineDescriptor(
            name="native",
            factory="gr_kernels.engine:NativeEngine",
            formats=("torch",),
            tasks=(Task.RETRIEVE, Task.RANK),
            devices=("cpu", "cuda"),
            dtypes=("float32", "bfloat16"),
            device_dtypes={"cuda": ("float32", "bfloat16", "float16")},
            priority=30,
            summary="HSTU and MTGR without padding, on cached K and V",
            device_probe=probe_device,
        )
    ]


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return [
        CommandDescriptor(
            name="bench-stack",
            factory="gr_kernels.benchmark.command:bench_stack",
            summary="Measure the native HSTU layers beside PyTorch and others, on a grid of work",
        ),
        CommandDescriptor(
            name="kernels",
            factory="gr_kernels.kernels_command:kernels",
            summary="Kernels of this machine: list, build, test, tune",
        ),
    ]


@hookimpl
def gr_register_caches() -> Iterable[CacheDescriptor]:
    return [
        CacheDescriptor(
            name="paged",
            factory="gr_kernels.cache.paged:PagedCache",
            summary="K and V of histories in blocks, shared by prefix; options: file, file_bytes, "
            "device_bytes, host_bytes",
            kinds=("user_kv",),
            tiers=("memory", "file", "device", "host"),
        )
    ]
