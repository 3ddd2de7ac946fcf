"""What ranking returns: the stack's output for the candidates, the last tokens of each prompt.

Shapes: T tokens of the pass, D model width.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.v1.pool.metadata import PoolingMetadata

TASK = "token_classify"
CANDIDATES = "candidates"
"""Key of the number of candidates among a request's ``extra_kwargs``."""


class LastRows(Pooler):  # type: ignore[misc]
    """(C, D) of each finished prompt, collected over its chunks; never raises."""

    def get_supported_tasks(self) -> Set[Any]:
        return {TASK}

    def forward(
        self, hidden_states: Tensor, pooling_metadata: PoolingMetadata
    ) -> list[Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        chunks = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        found: list[Tensor | None] = []
        for chunk, params, state, seen, whole in zip(
            chunks,
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            cursor.seq_lens_cpu.tolist(),
            cursor.prompt_lens_cpu.tolist(),
            strict=True,
        ):
            wanted = int((params.extra_kwargs or {}).get(CANDIDATES, whole))
            # Of this chunk, what belongs to the last `wanted` tokens of the prompt.
            skipped = whole - wanted - (seen - len(chunk))
            earlier = state.hidden_states_cache
            if sum(map(len, earlier)) > max(0, -skipped):
                state.clean()  # from before the prompt was preempted, to be computed again
            earlier.append(chunk[max(0, skipped) :].clone())
            if seen < whole:
                found.append(None)
                continue
            found.append(torch.cat(earlier))
            state.clean()
        return found
