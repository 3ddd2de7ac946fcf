"""Graphs of generative recommenders: ONNX, ONNX Runtime, TensorRT, Triton Inference Server."""

from __future__ import annotations

from gr_trt._version import __version__

__all__ = ["__version__"]
