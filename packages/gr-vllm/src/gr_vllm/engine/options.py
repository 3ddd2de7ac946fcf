"""Settings of the engine ``vllm``, from a model's table ``options``; most have vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gr_core.errors import PlanError
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.settings import own_options
from gr_vllm.worker.kernels import PAGE_TOKENS, page_columns, paged_attention

_WHO = "engine vllm"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class VllmOptions:
    tensor_parallel_size: int = 1
    """Ranks that the heads of each layer are spread over."""
    gpu_memory_utilization: float = 0.9
    """Part of a GPU's memory for all that there is, where ``kv_cache_bytes`` is 0."""
    kv_cache_bytes: int = 0
    """Memory for K and V of each rank; 0: 1 GiB on a CPU, and what is left on a GPU."""
    max_model_len: int = 0
    """Tokens of a prompt; 0: the longest history, and ``max_candidates`` where there are any."""
    max_candidates: int = 512
    """Candidates of one prompt; more are ranked by several, which share the history."""
    max_num_batched_tokens: int = 8192
    """Tokens of one pass; longer prompts are computed in chunks."""
    max_num_seqs: int = 256
    """Prompts of one pass."""
    prefix_caching: bool = True
    """Whether K and V of whole blocks are found again by later prompts."""
    restart: bool = True
    """Whether a vLLM that died is started again."""

    def __post_init__(self) -> None:
        whole = {
            "tensor_parallel_size": 1,
            "kv_cache_bytes": 0,
            "max_model_len": 0,
            "max_candidates": 1,
            "max_num_batched_tokens": PAGE_TOKENS,
            "max_num_seqs": 1,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {least} on")
        for name in ("prefix_caching", "restart"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; expected at least "
                f"max_num_seqs, {self.max_num_seqs}"
            )
        part = self.gpu_memory_utilization
        if not isinstance(part, (int, float)) or isinstance(part, bool) or not 0 < part <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {part!r}; expected a part above 0 and at most 1"
            )

    @staticmethod
    def of(extra: Mapping[str, Any], foreign: frozenset[str] = frozenset()) -> VllmOptions:
        """``foreign`` are options of the exporter. Raises `PlanError` that names the option."""
        return own_options(VllmOptions, extra, foreign, _WHO)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the options come to for one checkpoint."""

    max_model_len: int
    max_candidates: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    """0: as vLLM finds."""
    chunked: bool
    """Whether prompts may be computed in chunks."""

    @staticmethod
    def of(options: VllmOptions, checkpoint: Checkpoint, device: str) -> Sizes:
        """Raises `PlanError` for an option that does not fit the model."""
        heads, ranks = checkpoint.layers.num_heads, options.tensor_parallel_size
        if heads % ranks:
            raise PlanError(
                f"{_WHO}: option tensor_parallel_size is {ranks}; expected a divisor of the "
                f"{heads} heads of {checkpoint.name}"
            )
        beyond = 1  # the token that vLLM samples
        if checkpoint.role == "ranking":
            beyond += options.max_candidates
        elif checkpoint.role == "generation":
            beyond += len(checkpoint.levels)
        needed = checkpoint.max_history + beyond
        if 0 < options.max_model_len < needed:
            raise PlanError(
                f"{_WHO}: option max_model_len is {options.max_model_len}; expected at least "
                f"{needed}: {checkpoint.max_history} tokens of the longest history and {beyond} "
                "beyond it, or 0; max_candidates makes it smaller"
            )
        max_model_len = options.max_model_len or needed
        batched = options.max_num_batched_tokens
        if not checkpoint.causal:
            batched = max(batched, max_model_len)
        kv_cache_bytes = options.kv_cache_bytes or (_GIB if device == "cpu" else 0)
        # One prompt at least, and the page that vLLM keeps for itself.
        pages = -(-max_model_len // PAGE_TOKENS) + 1
        least = pages * checkpoint.layers.num_layers * page_bytes(checkpoint, ranks, device)
        if 0 < kv_cache_bytes < least:
            raise PlanError(
                f"{_WHO}: option kv_cache_bytes is {options.kv_cache_bytes}"
                f"{'' if options.kv_cache_bytes else f', which here is {_GIB}'}; expected at least "
                f"{least}, for one prompt of {max_model_len} tokens of {checkpoint.name}"
            )
        return Sizes(
            max_model_len, options.max_candidates, batched, kv_cache_bytes, checkpoint.causal
        )


def page_bytes(checkpoint: Checkpoint, ranks: int, device: str) -> int:
    """K and V, and times, of a page of one layer and rank; see `HSTUAttention`."""
    layers, heads = checkpoint.layers, checkpoint.layers.num_heads // ranks
    dtype: torch.dtype = getattr(torch, checkpoint.dtype)
    kind = device.partition(":")[0]
    kernel = paged_attention(
        heads, layers.d_qk, layers.d_v, dtype, layers.alpha, layers.divisor, kind
    )
    return heads * PAGE_TOKENS * dtype.itemsize * page_columns(kernel, layers, heads, dtype)
