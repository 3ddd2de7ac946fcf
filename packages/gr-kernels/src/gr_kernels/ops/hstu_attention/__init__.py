"""The op `hstu_attention`: pointwise attention over jagged tokens; `interface` says its terms."""

from __future__ import annotations

from gr_kernels.ops.hstu_attention.intervals import Intervals, causal, joined, mtgr
from gr_kernels.ops.hstu_attention.op import hstu_attention

__all__ = ["Intervals", "causal", "hstu_attention", "joined", "mtgr"]
