"""The op `hstu_projection`: norm, projection and SiLU of an HSTU layer; see `interface`."""

from __future__ import annotations

from gr_kernels.ops.hstu_projection.interface import Projection

__all__ = ["Projection"]
