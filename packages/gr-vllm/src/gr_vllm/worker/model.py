"""The model classes that vLLM builds from a model directory.

Shapes: T tokens of a pass, R rows that answers are read from, D model width, V answers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.sequence import IntermediateTensors

from gr_vllm.checkpoint import Checkpoint
from gr_vllm.worker.config import GrHSTUConfig
from gr_vllm.worker.kernels import PAGE_TOKENS
from gr_vllm.worker.layers import HSTUStack
from gr_vllm.worker.pooling import LastRows
from gr_vllm.worker.tokens import Tokens

_NEVER = float("-inf")


class _GrHSTU(nn.Module):
    """Tokens in, the stack's output for each of them out."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, GrHSTUConfig)
        self.checkpoint: Checkpoint = config.checkpoint
        _check(vllm_config, self.checkpoint)
        self.config = config
        self.tokens = Tokens(self.checkpoint, "tokens")
        self.stack = HSTUStack(self.checkpoint.layers, vllm_config.quant_config, "stack")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Rows for prompts that mix ids and embeddings, and for vLLM's trial runs: zeros."""
        return self.tokens.empty_rows(len(input_ids), input_ids.device)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        pages = self.stack.attention.pages_of_pass()
        x_TD, step = self.tokens(input_ids, positions, inputs_embeds, pages)
        output: Tensor = self.stack(x_TD, step)
        return output

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded


class GrHSTUForRanking(_GrHSTU):
    """The candidates' rows; the platform makes the heads' scores of them."""

    is_pooling_model = True
    attn_type = "decoder"
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    score_type = "bi-encoder"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = LastRows()


class GrHSTUForRetrieval(_GrHSTU):
    """A score for every item of the catalogue: the table of items times the normalized user."""

    is_text_generation_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        answers = self.checkpoint.answers
        self.lm_head = ParallelLMHead(answers, self.checkpoint.layers.d_model, prefix="lm_head")
        self.logits_processor = LogitsProcessor(answers)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(R, V); what stands for nothing never wins."""
        users_RD = self._normalized(hidden_states)
        logits: Tensor | None = self.logits_processor(self.lm_head, users_RD)
        if logits is not None:
            logits[:, 0] = _NEVER
        return logits

    def _normalized(self, x_RD: Tensor) -> Tensor:
        eps = self.checkpoint.readout_eps
        if self.checkpoint.readout_norm == "l2":
            return F.normalize(x_RD, dim=-1, eps=eps)
        if self.checkpoint.readout_norm == "layer":
            return F.layer_norm(x_RD, x_RD.shape[-1:], eps=eps)
        return x_RD


class GrHSTUForGeneration(GrHSTUForRetrieval):
    """Log-probabilities of the tokens of every level, each level by itself."""

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        scores = torch.full_like(logits, _NEVER, dtype=torch.float32)
        for start, stop in self.checkpoint.levels:
            scores[:, start:stop] = F.log_softmax(logits[:, start:stop].float(), dim=-1)
        return scores


def _check(vllm_config: VllmConfig, checkpoint: Checkpoint) -> None:
    """Settings under which answers would be wrong. Raises `ValueError` that names the setting."""
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype != checkpoint.dtype:
        raise ValueError(
            f"dtype is {dtype}; expected {checkpoint.dtype}, which {checkpoint.name} was exported "
            "in: rows of prompts are made for it"
        )
    block_size = vllm_config.cache_config.block_size
    if block_size != PAGE_TOKENS:
        raise ValueError(f"block_size is {block_size}; expected {PAGE_TOKENS}")
    if not checkpoint.causal and vllm_config.scheduler_config.enable_chunked_prefill:
        raise ValueError(
            f"enable_chunked_prefill is true; expected false, for tokens of {checkpoint.name} see "
            "later ones, which must be in the same pass"
        )
