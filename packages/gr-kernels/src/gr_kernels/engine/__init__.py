"""The engine ``native``: HSTU and MTGR, jagged, on cached K and V, with the kernels at hand."""

from __future__ import annotations

from gr_kernels.engine.native import NativeEngine

__all__ = ["NativeEngine"]
