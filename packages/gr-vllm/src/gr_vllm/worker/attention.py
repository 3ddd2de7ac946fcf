"""HSTU attention as a layer of vLLM: its pages, its view of a pass, the op `hstu_paged_attention`.

Shapes: T tokens, H heads of this rank, K columns of Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from gr_vllm.checkpoint import Layers
from gr_vllm.worker.kernels import PAGE_TOKENS, page_columns, paged_attention, time_bytes
from gr_vllm.worker.step import Pages, Step


class PagesBuilder(AttentionMetadataBuilder[Pages]):  # type: ignore[misc]
    """A pass as vLLM tells it. No graph captures it, for each pass reads lengths on the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # it is abstract there
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Pages:
        common = common_attn_metadata
        return Pages(
            block_table=common.block_table_tensor,
            slots_T=common.slot_mapping[: common.num_actual_tokens],
            query_offsets=common.query_start_loc[: common.num_reqs + 1],
            key_counts=common.seq_lens[: common.num_reqs],
        )


class HSTUAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks before it gives a layer memory."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "HSTU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [PAGE_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return HSTUAttention

    @staticmethod
    def get_builder_cls() -> type[PagesBuilder]:
        return PagesBuilder


class HSTUAttention(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """One layer's attention and its pages.

    A page is the kernel's own arrangement of K and V, then, where the stack has a time bias, the
    times of its tokens. vLLM is told of rows wide enough for both.
    """

    def __init__(self, layers: Layers, heads: int, prefix: str) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self._dtype = torch.get_default_dtype()
        device = config.device_config.device_type
        self._kernel = paged_attention(
            heads, layers.d_qk, layers.d_v, self._dtype, layers.alpha, layers.divisor, device
        )
        self._heads, self._d_qk, self._d_v = heads, layers.d_qk, layers.d_v
        self._columns = page_columns(self._kernel, layers, heads, self._dtype)
        self._time_bytes = time_bytes(layers)
        self._pages: Tensor | None = None
        self.kv_cache = torch.empty(0)
        self.layer_name = prefix
        known = config.compilation_config.static_forward_context
        assert prefix not in known, prefix
        known[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return HSTUAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        # What is K's and what is V's is the kernel's matter; vLLM wants to know the sum.
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self._heads,
            head_size=self._d_qk,
            head_size_v=self._columns - self._d_qk,
            dtype=self._dtype,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        assert kv_cache.is_contiguous(), kv_cache.stride()
        self._pages = kv_cache.flatten(1).view(torch.uint8)

    def pages_of_pass(self) -> Pages | None:
        """None while vLLM sizes its memory."""
        found = get_forward_context().attn_metadata
        if not isinstance(found, dict):
            return None
        pages = found[self.layer_name]
        assert isinstance(pages, Pages)
        return pages

    def keep_times(self, step: Step) -> list[Tensor]:
        """Stores the times of the pass's tokens; those of all keys, (S_b,) of each sequence."""
        assert self._pages is not None
        assert step.pages is not None
        assert step.times_T is not None
        start = self._kernel.page_bytes
        held = self._pages[:, start : start + self._time_bytes].view(torch.int32)
        slots = step.pages.slots_T
        times_T = step.times_T[: len(slots)]
        held[slots // PAGE_TOKENS, slots % PAGE_TOKENS] = times_T
        counts = step.pages.key_counts.tolist()
        return [
            held[step.pages.block_table[b, : -(-keys // PAGE_TOKENS)].long()].flatten()[:keys]
            for b, keys in enumerate(counts)
        ]

    def forward(
        self, q_TF: Tensor, k_TF: Tensor, v_TF: Tensor, step: Step, bias: Tensor | None
    ) -> Tensor:
        """(T, H·V); zeros while vLLM sizes its memory, and for rows that only fill up a pass."""
        if step.pages is None or self._pages is None:
            return torch.zeros_like(v_TF)
        pages = step.pages
        tokens = len(pages.slots_T)
        q_THK, k_THK, v_THV = (
            x[:tokens].view(tokens, self._heads, width)
            for x, width in ((q_TF, self._d_qk), (k_TF, self._d_qk), (v_TF, self._d_v))
        )
        a_THV = self._kernel(
            q_THK,
            k_THK,
            v_THV,
            self._pages,
            pages.block_table,
            pages.slots_T,
            pages.query_offsets,
            pages.key_counts,
            step.low_T[:tokens],
            step.high_T[:tokens],
            bias,
        )
        a_TF = a_THV.flatten(1)
        filling = len(v_TF) - tokens
        return nn.functional.pad(a_TF, (0, 0, 0, filling)) if filling else a_TF
