"""What the benchmark needs of a device: its clock, its kernels, its cache; and what it is."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from gr_kernels.cache.paged import PagedCache
from gr_kernels.ops.hstu_attention.on_device import DeviceAttention
from gr_kernels.ops.hstu_stack.cuda import Ops, Record

Stamp = Any
"""A point in the device's stream of work."""

_LIBRARIES = ("gr-kernels", "torch", "triton", "nvidia-cutlass", "numpy")
_QUERIES = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "SM clock, most": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
}
"""What nvidia-smi is asked for; nothing is ever set."""


class Device(Protocol):
    """Where the benchmark runs: `CudaDevice`, or in tests the CPU with Triton's interpreter."""

    name: str
    """As torch knows it."""
    cache_device: str
    """As caches know it."""

    def describe(self) -> Mapping[str, str]: ...

    def synchronize(self) -> None: ...

    def stamp(self) -> Stamp:
        """A point behind all that was launched on the current stream."""
        ...

    def milliseconds(self, begin: Stamp, end: Stamp) -> float:
        """Between two points that were passed."""
        ...

    def ops(self, dtype: str, heads: tuple[int, int]) -> Ops:
        """The kernels of a stack's layers."""
        ...

    def attention(self, kernel: str, dtype: str, sizes: Mapping[str, int]) -> DeviceAttention:
        """The attention of that name. Raises `PlanError` where it cannot run."""
        ...

    def recorder(self) -> Record: ...

    def cache(self, device_bytes: int, host_bytes: int) -> PagedCache: ...

    def host_copies(self) -> float:
        """Bytes per second that come from the host's pinned memory, in blocks."""
        ...

    def forget(self) -> None:
        """Gives back memory that nothing uses any more."""
        ...


class CudaDevice:
    """Implements `Device` on a GPU."""

    def __init__(self, index: int = 0) -> None:
        self.name = self.cache_device = f"cuda:{index}"
        self._index = index
        torch.cuda.set_device(index)

    def describe(self) -> Mapping[str, str]:
        it = torch.cuda.get_device_properties(self._index)
        versions = {}
        for name in _LIBRARIES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "GPU": it.name,
            "compute capability": f"{it.major}.{it.minor}",
            "multiprocessors": str(it.multi_processor_count),
            "memory": f"{it.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{it.L2_cache_size / 2**20:.0f} MiB",
            **found_by_nvidia_smi(str(it.uuid)),
            "CUDA of torch": str(torch.version.cuda),
            **versions,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def stamp(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end))

    def ops(self, dtype: str, heads: tuple[int, int]) -> Ops:
        return Ops(dtype, heads, ())

    def attention(self, kernel: str, dtype: str, sizes: Mapping[str, int]) -> DeviceAttention:
        from gr_kernels.choice import choose

        found: DeviceAttention = choose(
            "hstu_cached_attention", dtype, device="cuda", sizes=sizes, kernels=[kernel]
        ).resolve()
        return found

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        from gr_kernels.cuda.graphs import Recorder

        return Recorder()

    def cache(self, device_bytes: int, host_bytes: int) -> PagedCache:
        return PagedCache(1 << 20, device_bytes=device_bytes, host_bytes=host_bytes)

    def host_copies(self) -> float:
        from gr_kernels.cuda.transfers import measure_copies

        return measure_copies(self.name)

    def forget(self) -> None:
        torch.cuda.empty_cache()


def found_by_nvidia_smi(uuid: str) -> Mapping[str, str]:
    """Driver, clocks and limits as they are now; empty where nvidia-smi does not tell."""
    identity = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = [
        "nvidia-smi",
        f"--id={identity}",
        f"--query-gpu={','.join(_QUERIES.values())}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_QUERIES, values, strict=True)) if len(values) == len(_QUERIES) else {}
