"""Options of the exporter and the engine ``tensorrt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

AUTO, TENSORRT, TENSORRT_RTX = "auto", "tensorrt", "tensorrt_rtx"
LIBRARIES = (TENSORRT, TENSORRT_RTX)
CURRENT = "current"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a plan is built for."""

    library: str = AUTO
    """``tensorrt``, ``tensorrt_rtx``, or ``auto``: what is installed and can build the target."""
    target: str | Sequence[str] = CURRENT
    """``current`` for the GPU of this machine; ``sm89``, or several (``sm80,sm89``), without one,
    by TensorRT for RTX."""
    batches: Sequence[int] = (1, 32)
    """Largest batch of each optimization profile; one for each is built into every plan."""
    max_history: int = 0
    """Longest history of a request; 0 is what the model can take."""
    max_candidates: int = 0
    """Most candidates of a request; 0 is what the graph is said to take."""
    max_k: int = 1024
    """Most items that a graph of top-k finds."""
    workspace_mib: int = 4096
    """GPU memory for what a graph computes in between; profiles are made to fit in it."""
    weight_streaming: bool = False
    """Weights may stay in host memory, for models larger than the GPU's."""
    refit: bool = False
    """The weights of a plan may be exchanged for those of a new version of the model. Only for
    the GPU of this machine: building such a plan takes one."""
    sparse_weights: bool = False
    """Kernels for weights of which two in four are zero."""
    tf32: bool = False
    """Multiplies float32 with 10 bits of mantissa, which is less than float32's parity allows."""
    plan_cache_mib: int = 4096
    """Size of the folder of plans that were built before; 0 keeps none."""

    def __post_init__(self) -> None:
        _choice("library", self.library, (AUTO, *LIBRARIES))
        if not self.targets:
            raise ValueError(f"target is {self.target!r}; expected e.g. 'current' or 'sm89'")
        batches: Any = self.batches  # whatever a user gave
        if (
            isinstance(batches, str)
            or not batches
            or any(not _is_count(b) for b in batches)
            or sorted(set(batches)) != list(batches)
        ):
            raise ValueError(
                f"batches is {batches!r}; expected growing numbers of at least 1, e.g. [1, 32]"
            )
        for name in ("max_history", "max_candidates", "plan_cache_mib"):
            _at_least(name, getattr(self, name), 0)
        for name in ("max_k", "workspace_mib"):
            _at_least(name, getattr(self, name), 1)
        for name in ("weight_streaming", "refit", "sparse_weights", "tf32"):
            _boolean(name, getattr(self, name))
        if self.refit and self.targets != (CURRENT,):
            raise ValueError(
                f"refit is true and target {self.target!r}; such plans are built on the GPU that "
                "they are for alone, with target 'current'"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names as they were given, in lower case, each once."""
        given = self.target
        names = given.split(",") if isinstance(given, str) else [str(name) for name in given]
        return tuple(dict.fromkeys(name.strip().lower() for name in names if name.strip()))


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """How plans are run."""

    library: str = AUTO
    """``tensorrt`` or ``tensorrt_rtx``; ``auto`` is the one that built the plan."""
    contexts: int = 4
    """Execution contexts of each profile: parts of a batch that are computed at once, and shapes
    whose launches are kept as CUDA graphs."""
    cuda_graphs: bool = True
    """Whether the launches of a shape that repeats are recorded and replayed."""
    weight_budget_mib: int = 0
    """GPU memory for the weights of a plan built with ``weight_streaming``; 0 leaves the choice
    to TensorRT."""
    report: str = ""
    """A folder to which the engine inspector's report of every plan is written."""

    def __post_init__(self) -> None:
        _choice("library", self.library, (AUTO, *LIBRARIES))
        _at_least("contexts", self.contexts, 1)
        _boolean("cuda_graphs", self.cuda_graphs)
        _at_least("weight_budget_mib", self.weight_budget_mib, 0)
        if not isinstance(self.report, str):
            raise ValueError(f"report is {self.report!r}; expected a folder")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected at least {least}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
