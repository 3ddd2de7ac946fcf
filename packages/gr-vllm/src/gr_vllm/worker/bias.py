"""The learned bias of position and time on the scores of pairs of tokens.

Shapes: T tokens of the pass, B sequences, S_b keys of sequence b, P positions, M pairs (query, key)
of all sequences: those of sequence b row by row, one sequence after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr_vllm.worker.step import Pages

# The public code divides by 0.301, about log10(2), so a bucket is a factor of 1.35 in time.
_LOG_BUCKET_WIDTH = 0.301


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which entries of the tables each pair reads; the same in all layers."""

    offsets_M: Tensor | None
    """Place of the key minus place of the query."""
    seconds_M: Tensor | None
    """int32, from the key's time to what follows the query."""


def pairs_of(pages: Pages, next_times_T: Tensor | None, times: list[Tensor]) -> Pairs:
    """``times`` are those of the keys, (S_b,) of each sequence, where there is a time bias."""
    ends, counts = pages.query_offsets.tolist(), pages.key_counts.tolist()
    offsets, seconds = [], []
    device = pages.slots_T.device
    for b, keys in enumerate(counts):
        queries = ends[b + 1] - ends[b]
        key_S = torch.arange(keys, device=device)
        query_T = torch.arange(keys - queries, keys, device=device)
        offsets.append((key_S - query_T[:, None]).flatten())
        if next_times_T is not None:
            following = next_times_T[ends[b] : ends[b + 1], None]
            seconds.append((following - times[b]).flatten())
    return Pairs(torch.cat(offsets), torch.cat(seconds) if seconds else None)


class RelativeBias(nn.Module):
    """The two tables of one layer."""

    def __init__(self, positions: int, time_buckets: int) -> None:
        super().__init__()
        self.position = _table(2 * positions - 1) if positions else None
        self.time = _table(time_buckets) if time_buckets else None

    def forward(self, pairs: Pairs) -> Tensor:
        """(M,) float32."""
        bias: Tensor | None = None
        if self.position is not None:
            assert pairs.offsets_M is not None
            last = len(self.position) - 1
            bias = self.position[(pairs.offsets_M + last // 2).clamp(0, last)]
        if self.time is not None:
            assert pairs.seconds_M is not None
            logs = pairs.seconds_M.abs().clamp(min=1).float().log()
            buckets = (logs / _LOG_BUCKET_WIDTH).long().clamp(max=len(self.time) - 1)
            bias = self.time[buckets] if bias is None else bias + self.time[buckets]
        assert bias is not None
        return bias.float()


def _table(rows: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows), requires_grad=False)
