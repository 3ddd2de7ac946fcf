"""The engine ``onnxruntime``."""

from __future__ import annotations
