"""Options of the exporter ``vllm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from gr_core.errors import PlanError
from gr_vllm.checkpoint import Checkpoint, Dtype
from gr_vllm.quantization import FOUR_BITS, MULTIPLE, Quantization
from gr_vllm.settings import own_options
from gr_vllm.weights import projections

_WHO = "exporter vllm"
_FLOATS = get_args(Dtype)
_INT8 = "int8"
_BESIDE_INT8: Dtype = "bfloat16"
"""What is computed in where integers are not, K and V among it."""


@dataclass(frozen=True, slots=True)
class ExportSettings:
    quantization: str = ""
    """``none``, ``int8``, ``awq`` or ``gptq``, see `gr_vllm.quantization`; by default ``int8``
    where that is the dtype, else ``none``."""

    def __post_init__(self) -> None:
        known = get_args(Quantization)
        if self.quantization and self.quantization not in known:
            raise ValueError(
                f"quantization is {self.quantization!r}; expected one of {', '.join(known)}"
            )

    @staticmethod
    def of(extra: Mapping[str, Any], foreign: frozenset[str]) -> ExportSettings:
        """``foreign`` are options of the engine. Raises `PlanError` that names the option."""
        return own_options(ExportSettings, extra, foreign, _WHO)

    def precision(self, dtype: str) -> tuple[Dtype, Quantization]:
        """What is computed in, and how weights are kept. Raises `PlanError`."""
        if dtype != _INT8 and dtype not in _FLOATS:
            raise PlanError(
                f"{_WHO}: dtype is {dtype!r}; expected one of {', '.join([*_FLOATS, _INT8])}"
            )
        default: Quantization = "int8" if dtype == _INT8 else "none"
        quantization = cast("Quantization", self.quantization or default)
        if dtype == _INT8:
            if quantization != "int8":
                raise PlanError(
                    f"{_WHO}: option quantization is {quantization!r}, but dtype is 'int8'; "
                    "expected dtype bfloat16 or float16 with it, or no quantization"
                )
            return _BESIDE_INT8, "int8"
        if quantization in FOUR_BITS and dtype == "float32":
            raise PlanError(
                f"{_WHO}: option quantization is {quantization!r}, but dtype is 'float32'; vLLM "
                "computes it in bfloat16 or float16"
            )
        return cast("Dtype", dtype), quantization


def check_widths(checkpoint: Checkpoint) -> None:
    """Whether vLLM has a kernel for the projections. Raises `PlanError`."""
    if checkpoint.quantization not in FOUR_BITS:
        return
    for name, (outputs, inputs) in projections(checkpoint.layers).items():
        if outputs % MULTIPLE or inputs % MULTIPLE:
            raise PlanError(
                f"{_WHO}: option quantization is {checkpoint.quantization!r}, which takes "
                f"multiples of {MULTIPLE}, but {name} of {checkpoint.name} has {inputs} inputs and "
                f"{outputs} outputs; int8 takes any"
            )
