"""From what vLLM hands over to the stack's input, by the kind of token.

Shapes: T tokens, D model width, W ids of a token, E columns of a prompt's row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from gr_vllm.checkpoint import Checkpoint
from gr_vllm.rows import RowLayout
from gr_vllm.worker.step import Pages, Step


class Tokens(nn.Module):
    """Tables where a token is a sum of their rows; nothing where it comes as a row of floats."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        super().__init__()
        self._kind = checkpoint.tokens
        self._layout = RowLayout.of(checkpoint)
        self._groups = checkpoint.layers.groups
        self._rows = checkpoint.tables
        self._dtype: torch.dtype = getattr(torch, checkpoint.dtype)
        width = checkpoint.layers.d_model
        self.tables = nn.ModuleList(
            VocabParallelEmbedding(rows, width, prefix=f"{prefix}.tables.{i}")
            for i, rows in enumerate(checkpoint.tables)
        )
        self.places = nn.Embedding(checkpoint.places, width) if checkpoint.places else None

    def empty_rows(self, count: int, device: torch.device) -> Tensor:
        """Zeros (T, E)."""
        width = self._layout.width(self._dtype)
        return torch.zeros(count, width, dtype=self._dtype, device=device)

    def forward(
        self,
        input_ids: Tensor | None,
        places_T: Tensor,
        rows_TE: Tensor | None,
        pages: Pages | None,
    ) -> tuple[Tensor, Step]:
        """The stack's input (T, D), and what the layers need besides."""
        low_T = torch.zeros(len(places_T), dtype=torch.int32, device=places_T.device)
        high_T = places_T.int() + 1
        groups_T = times_T = next_times_T = None
        layout = self._layout
        if self._kind == "ids":
            assert input_ids is not None
            x_TD = self._sum(input_ids[:, None])
        else:
            assert rows_TE is not None
            x_TD, words_TA = layout.split(rows_TE)
            if self._kind == "columns":
                x_TD = self._sum(words_TA[:, layout.ids])
            else:
                interval = words_TA[:, layout.interval]
                low_T, high_T = interval[:, 0].contiguous(), interval[:, 1].contiguous()
            if layout.group is not None:
                groups_T = words_TA[:, layout.group].long().clamp(0, self._groups - 1)
            if layout.times.stop > layout.times.start:
                times = words_TA[:, layout.times]
                times_T, next_times_T = times[:, 0].contiguous(), times[:, 1].contiguous()
        if self.places is not None:
            last = self.places.num_embeddings - 1
            x_TD = x_TD + self.places(places_T.clamp(max=last))
        return x_TD, Step(pages, low_T, high_T, groups_T, times_T, next_times_T)

    def _sum(self, ids_TW: Tensor) -> Tensor:
        x_TD = self.tables[0](self._clamped(ids_TW[:, 0], 0))
        for i in range(1, len(self.tables)):
            x_TD = x_TD + self.tables[i](self._clamped(ids_TW[:, i], i))
        return x_TD

    def _clamped(self, ids_T: Tensor, table: int) -> Tensor:
        # An id that is none would read beyond the table, and end the process for everybody.
        return ids_T.long().clamp(0, self._rows[table] - 1)
