"""Devices, with a stand-in for NVML where there is no driver."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from gr_core import devices
from gr_core.devices import Device, Machine

GPUS = [("NVIDIA A", 80 * 2**30), ("NVIDIA B", 141 * 2**30)]


class Nvml:
    """What is called of libnvidia-ml.so.1."""

    def __init__(self, init: int = 0) -> None:
        self.init = init
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(GPUS)

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> None:
        handle._obj.value = index + 1

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, name: Any, size: int) -> None:
        assert handle.value is not None
        name.value = GPUS[handle.value - 1][0].encode()[: size - 1]

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> None:
        assert handle.value is not None
        memory._obj.total = GPUS[handle.value - 1][1]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.machine.cache_clear()
    yield nvml
    devices.machine.cache_clear()
    assert nvml.open == 0


def test_devices_of_the_driver(nvml: Nvml):
    found = devices.machine()
    assert found.devices[0].name == "cpu"
    assert found.devices[1:] == (
        Device("cuda:0", "NVIDIA A", 80 * 2**30),
        Device("cuda:1", "NVIDIA B", 141 * 2**30),
    )
    assert found.available("cuda") == found.available("cuda:1") == (True, "")
    assert found.available("cuda:2") == (False, "there is no cuda:2, only cpu, cuda:0, cuda:1")
    assert not found.available("tpu")[0]


@pytest.mark.parametrize(
    ("visible", "titles"),
    [
        ("1", ["NVIDIA B"]),
        ("1,0", ["NVIDIA B", "NVIDIA A"]),
        ("0,7,1", ["NVIDIA A"]),
        ("GPU-1234", ["CUDA device GPU-1234"]),
    ],
)
def test_visible_devices_are_renumbered_as_cuda_does(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str, titles: list[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = devices.machine().devices[1:]
    assert [gpu.title for gpu in gpus] == titles
    assert [gpu.name for gpu in gpus] == [f"cuda:{i}" for i in range(len(titles))]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_devices(nvml: Nvml, monkeypatch: pytest.MonkeyPatch, hidden: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert "CUDA_VISIBLE_DEVICES" in devices.machine().available("cuda")[1]


def test_a_driver_that_does_not_answer(nvml: Nvml):
    nvml.init = 9
    assert "does not answer (NVML error 9)" in devices.machine().no_cuda


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.machine.cache_clear()
    found = devices.machine()
    devices.machine.cache_clear()
    assert found.available("cuda:0") == (
        False,
        "no CUDA device: the NVIDIA driver is not installed",
    )
    assert found.available("cpu") == (True, "")


def test_a_machine_by_hand():
    assert Machine((Device("cpu", ""),), "no").available("cuda") == (False, "no")
