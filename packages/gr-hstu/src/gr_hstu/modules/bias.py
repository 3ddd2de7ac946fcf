"""Relative position and time bias of the research variant.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# The public code divides by 0.301, about log10(2), so a bucket is a factor of 1.35 in time.
_LOG_BUCKET_WIDTH = 0.301


class RelativeIndex(NamedTuple):
    """Where each pair of tokens looks up its bias; the same for all layers."""

    position_BTS: Tensor
    """int64 in [0, 2N - 1)."""
    time_BTS: Tensor
    """int64 in [0, buckets]."""


def relative_index(
    query_position_BT: Tensor,
    query_next_time_BT: Tensor,
    key_position_BS: Tensor,
    key_time_BS: Tensor,
    *,
    num_positions: int,
    num_buckets: int,
) -> RelativeIndex:
    """Position difference, and bucketed time from a key to what *follows* the query.

    Times are int64 seconds. The shift by one (t[i+1] - t[j]) is the public code's: a token that
    predicts the next item may know when the next item comes.
    """
    position_BTS = key_position_BS[:, None, :] - query_position_BT[:, :, None] + num_positions - 1
    elapsed_BTS = query_next_time_BT[:, :, None] - key_time_BS[:, None, :]
    bucket_BTS = (torch.log(elapsed_BTS.abs().clamp(min=1).float()) / _LOG_BUCKET_WIDTH).long()
    return RelativeIndex(position_BTS, bucket_BTS.clamp(0, num_buckets))


class RelativeBias(nn.Module):
    """position_weight[j - i + N - 1] + time_weight[bucket(t[i+1] - t[j])], shared by the heads."""

    def __init__(self, num_positions: int, num_buckets: int) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.empty(2 * num_positions - 1))
        self.time_weight = nn.Parameter(torch.empty(num_buckets + 1))
        nn.init.normal_(self.position_weight, std=0.02)
        nn.init.normal_(self.time_weight, std=0.02)

    def forward(self, index: RelativeIndex) -> Tensor:
        return self.position_weight[index.position_BTS] + self.time_weight[index.time_BTS]
