"""The engine ``vllm``: vLLM's AsyncLLM under the platform's contract of engines that batch."""

from __future__ import annotations

from gr_vllm.engine.engine import VllmEngine

__all__ = ["VllmEngine"]
