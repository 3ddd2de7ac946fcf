"""TensorRT and TensorRT for RTX: the exporter and the engine ``tensorrt``."""

from __future__ import annotations
