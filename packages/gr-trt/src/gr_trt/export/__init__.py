"""Torch to ONNX: the exporter ``onnx``."""

from __future__ import annotations
