"""What ranking returns: the stack's output for the candidates, the last tokens of each prompt.

Shapes: T tokens of the pass, C candidates of a prompt, D model width.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.pooling_params import PoolingParams
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
        chunks = hidden_states.split_with_sizes(cursor.num_scheduled_tokens_cpu.tolist())
        found: list[Tensor | None] = []
        for chunk, params, state, seen, whole in zip(
            chunks,
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            cursor.seq_lens_cpu.tolist(),
            cursor.prompt_lens_cpu.tolist(),
            strict=True,
        ):
            first = whole - _wanted(params, whole)
            start = seen - len(chunk)
            # What came before this chunk. More of it is there if the prompt was preempted since,
            # and now goes on from an earlier place, perhaps one found in the prefix cache.
            earlier = torch.cat([*state.hidden_states_cache, chunk[:0]])[: max(0, start - first)]
            rows = torch.cat([earlier, chunk[max(0, first - start) :]])
            state.clean()
            if seen < whole:
                state.hidden_states_cache.append(rows)
            found.append(rows if seen == whole else None)
        return found


def _wanted(params: PoolingParams, whole: int) -> int:
    """How many of the last tokens; all of them where that is not said."""
    wanted = (params.extra_kwargs or {}).get(CANDIDATES)
    return min(max(wanted, 0), whole) if isinstance(wanted, int) else whole
