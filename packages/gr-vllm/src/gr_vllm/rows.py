"""Tokens as rows of a prompt's embeddings: how integers travel beside, or instead of, floats.

vLLM takes token ids or rows of floats. A token that is more than one id is a row: its integers are
words of 32 bits, and the row holds their very bits in the model's precision, one column a word in
float32 and two in 16 bits. Rows are only ever copied, so the bits arrive; and as vLLM hashes them
for its prefix cache, K and V are reused only where all that a token is made of is the same.

Shapes: N tokens, W ids of a token, D model width, A words of a row, E columns of a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gr_vllm.checkpoint import Checkpoint

_WORD_BYTES = 4
NONCE_WORDS = 4


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where what stands in a row. Made the same way at both ends."""

    values: int
    """Columns of floats before the words: D for ``rows``, else none."""
    ids: slice
    """Words of the ids, for ``columns``."""
    interval: slice
    """Words of `low` and `high`, for ``rows``; other tokens are causal."""
    group: int | None
    times: slice
    """Words of a token's time and the next one's, where the stack has a time bias."""
    nonce: slice
    """Words that keep a block from being found by what it must not be, for ``rows``."""
    words: int
    """A."""

    @staticmethod
    def of(checkpoint: Checkpoint) -> RowLayout:
        end = 0

        def take(count: int) -> slice:
            nonlocal end
            end += count
            return slice(end - count, end)

        rows = checkpoint.tokens == "rows"
        ids = take(len(checkpoint.tables) if checkpoint.tokens == "columns" else 0)
        interval = take(2 if rows else 0)
        group = take(1).start if checkpoint.layers.groups > 1 else None
        times = take(2 if checkpoint.layers.time_buckets else 0)
        nonce = take(NONCE_WORDS if rows else 0)
        return RowLayout(
            checkpoint.layers.d_model if rows else 0, ids, interval, group, times, nonce, end
        )

    def width(self, dtype: torch.dtype) -> int:
        """Columns of a row."""
        return self.values + self.words * (_WORD_BYTES // dtype.itemsize)

    def join(self, values_ND: Tensor | None, words_NA: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (N, width) from floats, where there are any, and int32 words."""
        bits = words_NA.contiguous().view(dtype)
        return bits if values_ND is None else torch.cat([values_ND.to(dtype), bits], dim=1)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse: (N, values), and words (N, A) int32."""
        return rows[:, : self.values], rows[:, self.values :].contiguous().view(torch.int32)
