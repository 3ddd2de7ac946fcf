"""ONNX graphs in int8, and what that does to quality."""

from __future__ import annotations

from gr_trt.quantization.ensemble import quantize_ensemble
from gr_trt.quantization.options import QuantizationOptions
from gr_trt.quantization.quality import check_quality

__all__ = ["QuantizationOptions", "check_quality", "quantize_ensemble"]
