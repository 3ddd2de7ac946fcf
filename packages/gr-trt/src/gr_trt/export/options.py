"""Options of the exporter ``onnx``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gr_core.types import Task

OPSETS = (18, 23)
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    opset: int = 20
    """Version of ONNX's operators; 20 is read by ONNX Runtime from 1.17, TensorRT from 10 on."""
    tasks: Sequence[str] = ()
    """Tasks to make graphs for; empty means all of the bundle."""
    steps: bool = True
    """Whether to make the graphs ``prefill`` and ``decode`` too, which reuse of K and V takes."""
    max_candidates: int = 1024
    """Candidates of a request that the graphs are said to take, a bound of TensorRT's profiles."""
    inline_bytes: int = 64 * _MIB
    """Graphs with more weights keep them in one file beside, shared by all graphs."""

    def __post_init__(self) -> None:
        first, last = OPSETS
        if not isinstance(self.opset, int) or not first <= self.opset <= last:
            raise ValueError(f"opset is {self.opset!r}; expected {first} to {last}")
        names = [task.value for task in Task]
        if isinstance(self.tasks, str) or any(task not in names for task in self.tasks):
            raise ValueError(f"tasks is {self.tasks!r}; expected a list of {', '.join(names)}")
        if not isinstance(self.steps, bool):
            raise ValueError(f"steps is {self.steps!r}; expected true or false")
        if not isinstance(self.max_candidates, int) or self.max_candidates < 1:
            raise ValueError(f"max_candidates is {self.max_candidates!r}; expected at least 1")
        if not isinstance(self.inline_bytes, int) or self.inline_bytes < 0:
            raise ValueError(f"inline_bytes is {self.inline_bytes!r}; expected at least 0")
