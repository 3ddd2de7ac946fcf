"""Options of the exporter ``triton-repository``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PYTHON, ONNXRUNTIME, TENSORRT = "python", "onnxruntime", "tensorrt"
BACKENDS = (PYTHON, ONNXRUNTIME, TENSORRT)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """How Triton is to serve a model."""

    backend: str = PYTHON
    """What runs the engine step: ``python`` is the platform's own engine ``onnxruntime``, which
    batches histories of any lengths; ``onnxruntime`` and ``tensorrt`` are Triton's backends, with
    histories padded to powers of two, and requests of one such length make a batch."""
    triton_name: str = ""
    """What the models are called, followed by their task; empty means the bundle's name."""
    triton_version: int = 0
    """Number of the version folders; 0 means the bundle's version, which has to be a number."""
    triton_batch: int = 32
    """Most requests of a batch."""
    preferred_batches: Sequence[int] = ()
    """Batch sizes that are run at once when they are reached."""
    queue_delay_us: int = 500
    """How long a request waits for others to share its batch, microseconds."""
    queue_size: int = 0
    """Requests that may wait before each step, one more is refused; 0 sets no bound, because with
    one some versions of Triton forget waiting requests for half a second, see docs/triton.md."""
    queue_timeout_ms: int = 0
    """A request that waited longer before a step is refused, and its own timeout may be shorter;
    0 is never, for the same reason."""
    instances: int = 1
    """Of the engine."""
    step_instances: int = 1
    """Of the steps before and after the engine, each a process."""
    engine_threads: int = 0
    """CPU threads of an engine of the backend ``python``; 0 leaves the choice to it."""
    execution_env: str = ""
    """A packed Python environment for Triton's Python models, as Triton is to find it."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.triton_name and not _is_name(self.triton_name):
            raise ValueError(
                f"triton_name is {self.triton_name!r}; expected letters, digits, '.', '_', '-', "
                "starting with a letter or digit, at most 128"
            )
        _number("triton_version", self.triton_version, 0, _MAX_VERSION)
        _number("triton_batch", self.triton_batch, 1, 4096)
        sizes: Any = self.preferred_batches
        if not isinstance(sizes, list | tuple):
            raise ValueError(f"preferred_batches is {sizes!r}; expected a list such as [8, 32]")
        for size in sizes:
            _number("preferred_batches", size, 1, self.triton_batch)
        _number("queue_delay_us", self.queue_delay_us, 0, 10_000_000)
        _number("queue_size", self.queue_size, 0, 1_000_000)
        _number("queue_timeout_ms", self.queue_timeout_ms, 0, 3_600_000)
        _number("instances", self.instances, 1, 1024)
        _number("step_instances", self.step_instances, 1, 1024)
        _number("engine_threads", self.engine_threads, 0, 4096)
        if not isinstance(self.execution_env, str):
            raise ValueError(f"execution_env is {self.execution_env!r}; expected a path")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _number(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {low} to {high}")
