"""The learned bias of position and time on the scores of pairs of tokens.

Shapes: T tokens of the pass, B sequences, S_b keys of sequence b, P positions, M pairs (query, key)
of all sequences: those of sequence b row by row, one sequence after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr_vllm.worker.step import Pages

# The public code divides by 0.301, about log10(2), so a bucket is a factor of 1.35 in time.
_LOG_BUCKET_WIDTH = 0.301


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which rows of the tables each pair reads; the same in all layers.

    There are millions of pairs, and fresh memory costs as much as what is written to it. So all
    layers, which run one after another, write to the same.
    """

    place_M: Tensor | None
    """int32 row of the table of positions."""
    bucket_M: Tensor | None
    """int32 row of the table of times."""
    bias_M: Tensor
    """float32, for the answer of `RelativeBias`."""
    part_M: Tensor
    """float32, for what is added to it."""


def pairs_of(
    pages: Pages,
    positions: int,
    time_buckets: int,
    next_times_T: Tensor | None,
    times: Sequence[Tensor],
) -> Pairs:
    """``times`` are those of the keys, (S_b,) of each sequence, where there is a time bias."""
    ends, counts = pages.query_offsets.tolist(), pages.key_counts.tolist()
    places, buckets = [], []
    for b, keys in enumerate(counts):
        queries = ends[b + 1] - ends[b]
        if positions:
            places.append(_places(queries, keys, positions, pages.slots_T.device).flatten())
        if time_buckets:
            assert next_times_T is not None
            following = next_times_T[ends[b] : ends[b + 1], None]
            buckets.append(_buckets(following - times[b], time_buckets).flatten())
    place_M = torch.cat(places) if positions else None
    bucket_M = torch.cat(buckets) if time_buckets else None
    rows_M = bucket_M if place_M is None else place_M
    assert rows_M is not None
    both = place_M is not None and bucket_M is not None
    bias_M = torch.empty(rows_M.shape, dtype=torch.float32, device=rows_M.device)
    return Pairs(place_M, bucket_M, bias_M, torch.empty_like(bias_M) if both else bias_M)


def _places(queries: int, keys: int, positions: int, device: torch.device) -> Tensor:
    """(queries, keys) int32, of the last tokens of a sequence; what is farther is as the end."""
    key_S = torch.arange(keys, device=device, dtype=torch.int32)
    offset = key_S - key_S[keys - queries :, None]
    return offset.add_(positions - 1).clamp_(0, 2 * positions - 2)


def _buckets(seconds: Tensor, buckets: int) -> Tensor:
    """int32, of the times from keys to what follows queries."""
    logs = seconds.abs().clamp_(min=1).float().log_()
    return logs.div_(_LOG_BUCKET_WIDTH).int().clamp_(max=buckets - 1)


class RelativeBias(nn.Module):
    """The two tables of one layer."""

    def __init__(self, positions: int, time_buckets: int) -> None:
        super().__init__()
        self.position = _table(2 * positions - 1) if positions else None
        self.time = _table(time_buckets) if time_buckets else None

    def forward(self, pairs: Pairs) -> Tensor:
        """(M,) float32, to be used before the next layer's is asked for."""
        found: Tensor | None = None
        for table, rows_M in ((self.position, pairs.place_M), (self.time, pairs.bucket_M)):
            if table is None or rows_M is None:
                continue
            if found is None:
                found = torch.index_select(table.float(), 0, rows_M, out=pairs.bias_M)
            else:
                found += torch.index_select(table.float(), 0, rows_M, out=pairs.part_M)
        assert found is not None
        return found


def _table(rows: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows), requires_grad=False)
