"""The op `hstu_stack`: all layers of an HSTU or MTGR model over jagged tokens."""

from __future__ import annotations

from gr_kernels.ops.hstu_stack.choice import make_stack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, HSTUStack, Rows, Segment
from gr_kernels.ops.hstu_stack.layer import hstu_layer

__all__ = ["BLOCK_TOKENS", "HSTUStack", "Rows", "Segment", "hstu_layer", "make_stack"]
