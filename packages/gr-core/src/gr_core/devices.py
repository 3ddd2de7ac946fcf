"""Devices of this machine, found without loading a framework or touching a device.

NVML (the library behind nvidia-smi) answers in milliseconds and, unlike initialising CUDA, leaves
the process free to fork.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    """``cpu``, ``cuda:0``, ``cuda:1``, …"""
    title: str
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine computes with."""

    devices: tuple[Device, ...]
    no_cuda: str = ""
    """Why there is no CUDA device; empty if there is one."""

    def available(self, device: str) -> tuple[bool, str]:
        """Whether ``cpu``, ``cuda`` or ``cuda:1`` is there, and why not."""
        names = [d.name for d in self.devices]
        if device in names or (device == "cuda" and not self.no_cuda):
            return True, ""
        if device.split(":")[0] == "cuda":
            return False, self.no_cuda or f"there is no {device}, only {', '.join(names)}"
        return False, f"unknown device {device!r}; this machine has {', '.join(names)}"


@functools.cache
def machine() -> Machine:
    cpu = Device("cpu", f"{platform.machine()}, {usable_cpus()} usable cores")
    gpus, reason = _cuda()
    return Machine((cpu, *gpus), reason)


def usable_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _NvmlMemory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def _cuda() -> tuple[list[Device], str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return [], f"CUDA_VISIBLE_DEVICES={visible!r} hides all CUDA devices"
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return [], "no CUDA device: the NVIDIA driver is not installed"
    if (code := nvml.nvmlInit_v2()) != 0:
        return [], f"no CUDA device: the NVIDIA driver does not answer (NVML error {code})"
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        devices = [_nvml_device(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    if visible is not None:
        devices = _renumbered(devices, visible)
    return devices, "" if devices else "no CUDA device is visible"


def _renumbered(devices: list[Device], visible: str) -> list[Device]:
    """What CUDA_VISIBLE_DEVICES leaves, numbered as CUDA does. An invalid index ends its list."""
    chosen: list[Device] = []
    for entry in (e.strip() for e in visible.split(",")):
        name = f"cuda:{len(chosen)}"
        if not entry.isdigit():
            chosen.append(Device(name, f"CUDA device {entry}"))
        elif int(entry) < len(devices):
            chosen.append(replace(devices[int(entry)], name=name))
        else:
            break
    return chosen


def _nvml_device(nvml: ctypes.CDLL, index: int) -> Device:
    handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _NvmlMemory()
    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    nvml.nvmlDeviceGetName(handle, name, len(name))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return Device(f"cuda:{index}", name.value.decode(), memory.total)
