"""The op `embedding_gather`: the rows of many tables, summed or side by side, in one pass."""

from __future__ import annotations

from gr_kernels.ops.embedding_gather.interface import Combine, EmbeddingGather

__all__ = ["Combine", "EmbeddingGather"]
