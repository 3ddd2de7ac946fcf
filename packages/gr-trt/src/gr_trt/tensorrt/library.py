"""Which TensorRT is used: the module ``tensorrt`` or ``tensorrt_rtx``, and what each cannot do.

Both have nearly the same interface. TensorRT for RTX builds for named compute capabilities without
a GPU and compiles kernels on the GPU that it runs on; TensorRT times kernels on the GPU at hand
while it builds, and its plans are for that kind of GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from gr_core.errors import PlanError
from gr_trt.tensorrt.options import AUTO, CURRENT, LIBRARIES, TENSORRT, TENSORRT_RTX

REMEDY = (
    "pip install 'gr-trt[tensorrt]' on a server with a GPU, or 'gr-trt[rtx]', which builds for "
    "other machines without one"
)
OLDEST = {TENSORRT: (10, 13), TENSORRT_RTX: (1, 4)}
"""What the extras of this package ask for."""


@dataclass(frozen=True, slots=True)
class Library:
    """An imported TensorRT."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for without a GPU, e.g. ``sm89``."""
        if self.name == TENSORRT:
            return ()
        names = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in names if name.startswith("SM"))

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT for RTX times nothing while it builds."""
        return self.name == TENSORRT

    @property
    def has_runtime_config(self) -> bool:
        """A cache of the kernels that TensorRT for RTX compiles on the GPU, and CUDA graphs."""
        return self.name == TENSORRT_RTX


def installed() -> tuple[str, ...]:
    """Names of the modules that are there, without importing them."""
    return tuple(name for name in LIBRARIES if find_spec(name) is not None)


def load(name: str) -> Library:
    """Raises `PlanError` for one that is not installed, too old, or cannot be loaded."""
    if name not in installed():
        raise PlanError(f"{name} is not installed; {REMEDY}")
    try:
        module = import_module(name)
    except (ImportError, OSError) as error:
        raise PlanError(f"{name} cannot be loaded: {error}; install it again") from None
    library = Library(name, module)
    found = tuple(int(part) for part in library.version.split(".")[:2])
    if found < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        raise PlanError(f"{library.label} is too old; expected at least {oldest}; {REMEDY}")
    return library


def choose(name: str, targets: Sequence[str]) -> Library:
    """What builds for ``targets``: ``name``, or with ``auto`` what is installed and can.

    Raises `PlanError` that says which library can build what was asked for.
    """
    have = installed()
    if not have:
        raise PlanError(f"neither tensorrt nor tensorrt_rtx is installed; {REMEDY}")
    if name == AUTO:
        # For the GPU at hand TensorRT times its kernels, so it comes first; nothing else of it
        # builds for other machines.
        here = list(targets) == [CURRENT]
        name = TENSORRT if TENSORRT in have and (here or TENSORRT_RTX not in have) else TENSORRT_RTX
    library = load(name)
    check_targets(library, targets)
    return library


def check_targets(library: Library, targets: Sequence[str]) -> None:
    """Raises `PlanError` for a target that a library cannot build, saying what can."""
    if list(targets) == [CURRENT]:
        return
    if CURRENT in targets:
        raise PlanError(f"target: {', '.join(targets)}; 'current' cannot be built with others")
    if library.name == TENSORRT:
        raise PlanError(
            f"target: {library.label} builds only for the GPU of this machine, not for "
            f"{', '.join(targets)}; say --option target=current on such a machine, or "
            "--option library=tensorrt_rtx"
        )
    for target in targets:
        if target not in library.targets:
            raise PlanError(
                f"target: {library.label} cannot build for {target!r}, only for "
                f"{', '.join(library.targets)}; for any other GPU, such as a data center's sm90 "
                "or sm100, use --option library=tensorrt --option target=current on a machine "
                "that has it"
            )


def current_target(device: str = "cuda") -> tuple[str, str]:
    """Compute capability of one of this machine's GPUs and its name: ``("sm89", "NVIDIA L4")``.

    Raises `PlanError` without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise PlanError(
            "this machine has no CUDA device that torch can use: plans do not run here; to build "
            "them for another machine name its GPU, e.g. --option target=sm89, which takes "
            "TensorRT for RTX (gr-trt[rtx])"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}", torch.cuda.get_device_name(device)
