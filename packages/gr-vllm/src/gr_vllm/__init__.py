"""Generative recommenders on vLLM's scheduler, paged K/V cache and prefix caching."""

from __future__ import annotations

from gr_vllm._version import __version__

__all__ = ["__version__"]
