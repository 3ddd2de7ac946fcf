"""The machine that figures were taken on: what it is, what it can do, how it allocates."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8",
)  # fmt: skip
"""What decides which kernels run, as Linux names it."""
_LIBRARIES = ("gr-kernels", "torch", "onnxruntime", "numpy")
_GEMM_SIZE = 2048

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed, of any size; whether it could be told.

    Without it, PyTorch's large temporaries are mapped, cleared page by page and unmapped again and
    again, which is a good part of the time of those sides that have them.
    """
    return _mallopt(mmap_threshold=2**30, trim_threshold=2**31 - 1)


def return_freed_memory() -> bool:
    """Tells malloc to return what is freed, small pieces aside; whether it could be told."""
    return _mallopt(mmap_threshold=2**16, trim_threshold=0)


def _mallopt(*, mmap_threshold: int, trim_threshold: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # another C library
    return bool(
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold) and mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    )


def describe() -> Mapping[str, Any]:
    """Processor, cores, instruction sets, versions."""
    model, flags = _processor()
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> tuple[str, frozenset[str]]:
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    model = fields.get("model name") or platform.processor() or "unknown"
    if "model" in fields:
        model += f" (family {fields.get('cpu family', '?')}, model {fields['model']})"
    return model, frozenset(fields.get("flags", "").split())


def gemm_gflops_per_s(threads: int = 1, rounds: int = 5) -> Mapping[str, float]:
    """What torch's matrix product reaches at 2048³, by processor time; the median."""
    torch.set_num_threads(threads)
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))
        out = a @ b
        times = []
        for _ in range(rounds):
            started = time.process_time()
            torch.matmul(a, b, out=out)
            times.append(time.process_time() - started)
        rates[name] = 2 * _GEMM_SIZE**3 / statistics.median(times) / 1e9
    return rates
