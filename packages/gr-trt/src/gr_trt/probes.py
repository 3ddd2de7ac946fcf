"""Whether what this package stands on is there. Each answers (usable, why) and never raises."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from gr_core.devices import machine

_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_REMEDY = "pip install 'gr-trt[cpu]', or 'gr-trt[gpu]' on a machine with CUDA"


def onnxruntime() -> tuple[bool, str]:
    """ONNX Runtime, of whatever build."""
    if find_spec("onnxruntime") is None:
        return False, f"onnxruntime is not installed; {_REMEDY}"
    return True, f"onnxruntime {_version('onnxruntime', 'onnxruntime-gpu')}"


def onnxruntime_device(device: str) -> tuple[bool, str]:
    """Whether the installed build has an execution provider for a device."""
    import onnxruntime as ort

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    have = ort.get_available_providers()
    if provider in have:
        return True, f"onnxruntime {ort.__version__} has {provider}"
    return False, (
        f"onnxruntime {ort.__version__} has no {provider}, only {', '.join(have)}; "
        "pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def onnx_export() -> tuple[bool, str]:
    """What exporting takes; ONNX Runtime is among it, since what is exported is compared."""
    for module in ("torch", "onnx", "onnxscript"):
        if find_spec(module) is None:
            return False, f"{module} is not installed; pip install {module}"
    return onnxruntime()


def tensorrt() -> tuple[bool, str]:
    """TensorRT or TensorRT for RTX."""
    from gr_trt.tensorrt.library import REMEDY, installed

    have = installed()
    if not have:
        return False, f"neither tensorrt nor tensorrt_rtx is installed; {REMEDY}"
    return True, ", ".join(f"{name} {_version(*_DISTRIBUTIONS[name])}" for name in have)


def tensorrt_device(device: str) -> tuple[bool, str]:
    """Whether what is installed has kernels for the GPU."""
    from gr_core.errors import PlanError
    from gr_trt.tensorrt.library import choose, current_target

    try:
        capability, name = current_target()
        library = choose("auto", ["current"])
    except PlanError as error:
        return False, str(error)
    if library.targets and capability not in library.targets:
        return False, (
            f"{library.label} has no kernels for {name} ({capability}); "
            "pip install 'gr-trt[tensorrt]'"
        )
    return True, f"{library.label} has kernels for {name} ({capability})"


def tensorrt_revision() -> str:
    """Plans are read by the version that built them alone, and run on one kind of GPU."""
    found = [_version(*names) for names in _DISTRIBUTIONS.values()]
    gpus = [device.title for device in machine().devices if device.name != "cpu"]
    return "; ".join(["1", *found, *gpus])


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
