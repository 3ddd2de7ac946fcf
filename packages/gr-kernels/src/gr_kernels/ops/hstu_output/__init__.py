"""The op `hstu_output`: norm, gate, output projection and residual of an HSTU layer."""

from __future__ import annotations

from gr_kernels.ops.hstu_output.interface import Output

__all__ = ["Output"]
