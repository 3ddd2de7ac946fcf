"""Options of quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ACTIVATIONS = ("auto", "uint8", "int8")


@dataclass(frozen=True, slots=True)
class QuantizationOptions:
    """What is computed in 8 bits, by which ranges, and what quality may be lost."""

    activations: str = "auto"
    """``uint8``, with zero points and biases in 32-bit integers, for CPUs; ``int8``, symmetric with
    float biases, which is what TensorRT reads; ``auto`` takes what the device wants."""
    calibration: str = ""
    """A file of requests to find ranges by, as `gr_core.json_requests` or `gr_core.labelled` read
    them; empty means the bundle's samples."""
    calibration_requests: int = 32
    keep_float: Sequence[str] = ()
    """Parts of names of products that stay in float32."""
    quantize_embeddings: bool = True
    """Whether tables keep a byte a number and a scale a row: a quarter of the memory. Only with
    ``uint8``: TensorRT looks up no rows of bytes."""
    quantize_top_k: bool = False
    """Whether the catalogue is searched in 8 bits, which moves items close to each other."""
    max_error: float = 0.2
    """Of a graph's outputs, as a part of their largest magnitude, see `gr_core.parity`."""
    min_overlap: float = 0.9
    """Part of the float32 graphs' top 10 that must be in the int8 graphs', averaged."""
    max_loss: float = 0.05
    """Part of what NDCG@10 is above 0, and an AUC above 0.5, that may be lost."""

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise ValueError(
                f"activations is {self.activations!r}; expected one of {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(self.calibration, str):
            raise ValueError(f"calibration is {self.calibration!r}; expected a path")
        count = self.calibration_requests
        if type(count) is not int or not 1 <= count <= 4096:
            raise ValueError(f"calibration_requests is {count!r}; expected 1 to 4096")
        if isinstance(self.keep_float, str) or not all(isinstance(n, str) for n in self.keep_float):
            raise ValueError(f"keep_float is {self.keep_float!r}; expected a list of names")
        for name in ("quantize_embeddings", "quantize_top_k"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {value!r}; expected true or false")
        for name in ("max_error", "min_overlap", "max_loss"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; expected 0 to 1")
