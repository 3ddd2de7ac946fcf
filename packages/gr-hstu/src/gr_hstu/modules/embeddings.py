"""Embeddings of features, positions and times.

Shapes: B batch, T tokens, D width, F feature columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INIT_STD = 0.02
_SECONDS_PER_MINUTE = 60.0

NEVER = 1 << 40
"""Seconds longer than any real gap: falls into the last time bucket."""


def item_embedding(num_items: int, width: int) -> nn.Embedding:
    """Rows 1..num_items for the items, and a row of zeros for padding."""
    table = nn.Embedding(num_items + 1, width, padding_idx=0)
    nn.init.trunc_normal_(table.weight, std=_INIT_STD)
    with torch.no_grad():
        table.weight[0].zero_()
    return table


class FeatureEmbeddings(nn.Module):
    """One table a feature column; ids int64 (..., F) give a list of F embeddings (..., D)."""

    def __init__(self, cardinalities: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in cardinalities)
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.trunc_normal_(table.weight, std=_INIT_STD)

    def __len__(self) -> int:
        return len(self.tables)

    def forward(self, ids: Tensor) -> list[Tensor]:
        return [table(ids[..., i]) for i, table in enumerate(self.tables)]


def elapsed_buckets(seconds: Tensor, last_bucket: int) -> Tensor:
    """Bucket of int64 seconds: floor(sqrt(minutes)), clamped to [0, last_bucket] (DLRMv3)."""
    minutes = seconds.clamp(min=0).float() / _SECONDS_PER_MINUTE
    return minutes.sqrt().long().clamp(max=last_bucket)


def since_previous(timestamps_BL: Tensor) -> Tensor:
    """Seconds since the previous behaviour, int64 (B, L); more than `NEVER` for the first."""
    return timestamps_BL - F.pad(timestamps_BL, (1, 0), value=-NEVER)[:, :-1]


def last_timestamp(timestamps_BL: Tensor, lengths_B: Tensor) -> Tensor:
    """Time of the last behaviour, int64 (B,); `-NEVER` for an empty history."""
    before_B1 = timestamps_BL.new_full((timestamps_BL.shape[0], 1), -NEVER)
    return torch.cat([before_B1, timestamps_BL], dim=1).gather(1, lengths_B[:, None]).squeeze(1)


def sum_embeddings(embeddings: Sequence[Tensor], start: Tensor) -> Tensor:
    """start + each of the embeddings."""
    for embedding in embeddings:
        start = start + embedding
    return start


class PositionTimeEmbedding(nn.Module):
    """Sum of a position and a time embedding; either is absent with zero buckets."""

    def __init__(self, position_buckets: int, time_buckets: int, width: int) -> None:
        super().__init__()
        self.position: nn.Embedding | None = None
        self.time: nn.Embedding | None = None
        if position_buckets:
            self.position = nn.Embedding(position_buckets, width)
            nn.init.uniform_(
                self.position.weight, -(position_buckets**-0.5), position_buckets**-0.5
            )
        if time_buckets:
            self.time = nn.Embedding(time_buckets + 1, width)
            nn.init.uniform_(self.time.weight, -(time_buckets**-0.5), time_buckets**-0.5)

    def buckets(self, seconds: Tensor) -> Tensor | None:
        """Rows of the time table for elapsed int64 seconds; None without times."""
        if self.time is None:
            return None
        return elapsed_buckets(seconds, self.time.num_embeddings - 1)

    def forward(self, x: Tensor, position: Tensor, bucket: Tensor | None) -> Tensor:
        """x (..., D) plus the embeddings of positions, clamped to the last row, and of `buckets`.

        Both are integers (...).
        """
        if self.position is not None:
            x = x + self.position(position.clamp(max=self.position.num_embeddings - 1))
        if self.time is not None:
            x = x + self.time(bucket)
        return x
