"""The op `hstu_paged_attention`: pointwise attention on K and V in pages that others allocate."""

from __future__ import annotations

from gr_kernels.ops.hstu_paged_attention.interface import BLOCK_TOKENS, PagedAttention

__all__ = ["BLOCK_TOKENS", "PagedAttention"]
