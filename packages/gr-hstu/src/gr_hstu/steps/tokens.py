"""What the steps of all models share: where tokens stand, whom they see, and K and V around them.

A step's tokens follow the cached ones of their history, so that the number of those says where
each of them stands. Padded tokens stand after the history, and padded keys nowhere: no interval
has either.

Shapes: B batch, W ids of a token, T tokens given, P tokens cached, S = P + T keys, C candidates,
R = T + C rows, M layers, H heads, K columns of Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core.contracts import ArraySpec
from gr_core.steps import (
    CANDIDATE,
    KEYS,
    PAST,
    PAST_KEYS,
    PAST_LENGTHS,
    PAST_VALUES,
    TOKEN,
    VALUES,
)
from gr_hstu.modules.attention import hstu_attention
from gr_hstu.modules.embeddings import FeatureEmbeddings

IDS, LOW, HIGH = "ids", "low", "high"
CANDIDATE_ITEMS, CANDIDATE_FEATURES = "candidate_items", "candidate_features"
CANDIDATE_LOW, CANDIDATE_HIGH = "candidate_low", "candidate_high"
CANDIDATE_BUCKET, CONTEXT_FEATURES = "candidate_bucket", "context_features"

NOWHERE = -1
"""A place that is in no interval."""


class Past(NamedTuple):
    """Cached tokens, padded on the right."""

    keys_BMPHK: Tensor
    values_BMPHV: Tensor
    lengths_B: Tensor

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.keys_BMPHK[:, i], self.values_BMPHV[:, i]


def token_places(ids_BTW: Tensor, past: Past | None) -> Tensor:
    """int32 places in the history (B, T); (1, T) in a prefill, whose tokens are the first."""
    place_1T = torch.arange(ids_BTW.shape[1], dtype=torch.int32, device=ids_BTW.device)[None]
    return place_1T if past is None else past.lengths_B[:, None] + place_1T


def key_places(place_BT: Tensor, past: Past | None) -> Tensor:
    """int32 places (B, S) of the cached tokens, `NOWHERE` where padded, and of the given ones."""
    if past is None:
        return place_BT
    place_P = torch.arange(past.keys_BMPHK.shape[2], dtype=torch.int32, device=place_BT.device)
    cached_BP = torch.where(place_P < past.lengths_B[:, None], place_P, NOWHERE)
    return torch.cat([cached_BP, place_BT], dim=1)


def inside(low_BR: Tensor, high_BR: Tensor, key_BS: Tensor) -> Tensor:
    """(B, R, S) bool: the key stands in the row's interval."""
    key_B1S = key_BS[:, None, :]
    return (key_B1S >= low_BR[:, :, None]) & (key_B1S < high_BR[:, :, None])


def itself(place_BT: Tensor, key_BS: Tensor) -> Tensor:
    """(B, T, S) bool: the key is the token."""
    return place_BT[:, :, None] == key_BS[:, None, :]


class Sight(NamedTuple):
    """Whom the rows of a decode step see among the keys; each sees itself besides."""

    others_BRS: Tensor
    """bool."""
    tokens: int
    """T, how many of the rows are keys."""


def sight(
    place_BT: Tensor, low_BT: Tensor, high_BT: Tensor, low_BC: Tensor, high_BC: Tensor, past: Past
) -> Sight:
    """Of given tokens, then candidates."""
    key_BS = key_places(place_BT, past)
    place_BR = torch.cat([place_BT, torch.full_like(low_BC, NOWHERE)], dim=1)
    low_BR, high_BR = torch.cat([low_BT, low_BC], dim=1), torch.cat([high_BT, high_BC], dim=1)
    others_BRS = inside(low_BR, high_BR, key_BS) & ~itself(place_BR, key_BS)
    return Sight(others_BRS, place_BT.shape[1])


def attention_with_self(
    q_BRHK: Tensor,
    k_BRHK: Tensor,
    v_BRHV: Tensor,
    sight: Sight,
    past: tuple[Tensor, Tensor],
    *,
    alpha: float,
    divisor: float,
) -> Tensor:
    """(B, R, H, V): `hstu_attention` over cached and given tokens, and over each row itself.

    The attention is a sum over keys, so that a candidate's own one can be added apart. Else each
    candidate were a key of all others, only to be masked.
    """
    k_BSHK = torch.cat([past[0], k_BRHK[:, : sight.tokens]], dim=1)
    v_BSHV = torch.cat([past[1], v_BRHV[:, : sight.tokens]], dim=1)
    others_BRHV = hstu_attention(
        q_BRHK, k_BSHK, v_BSHV, sight.others_BRS, alpha=alpha, divisor=divisor
    )
    score_BRH1 = (q_BRHK * k_BRHK).sum(-1, keepdim=True) * alpha
    return others_BRHV + F.silu(score_BRH1) / divisor * v_BRHV


def by_layer(parts: Sequence[Tensor]) -> Tensor:
    """K or V of each layer as (B, M, T, H, columns)."""
    return torch.stack(list(parts), dim=1)


def feature_rows(
    ids_BT: Tensor, place_BT: Tensor, offsets: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """For prefix tokens rows of one table of all features, for behaviours items; else 0, (B, T).

    ``offsets`` int32 (prefix,): the first row of each prefix token's feature.
    """
    is_feature_BT = place_BT < prefix
    first_BT = offsets[place_BT.clamp(max=prefix - 1)]
    return torch.where(is_feature_BT, ids_BT + first_BT, 0), torch.where(is_feature_BT, 0, ids_BT)


def tables_of(features: FeatureEmbeddings) -> list[Tensor]:
    """One (rows, columns) a feature."""
    return [cast("nn.Embedding", table).weight for table in features.tables]


def offsets_of(tables: Sequence[Tensor]) -> Tensor:
    """int32: where each table begins in all of them together."""
    rows = torch.tensor([0, *(len(table) for table in tables)], dtype=torch.int32)
    return rows.cumsum(0, dtype=torch.int32)[:-1]


def jagged(name: str, dtype: str, axis: str, *columns: int) -> ArraySpec:
    return ArraySpec(name, dtype, (axis, *columns))


def past_specs(layers: int, heads: int, d_qk: int, d_v: int) -> tuple[ArraySpec, ...]:
    return (
        ArraySpec(PAST_KEYS, "float32", (layers, PAST, heads, d_qk)),
        ArraySpec(PAST_VALUES, "float32", (layers, PAST, heads, d_v)),
        ArraySpec(PAST_LENGTHS, "int32"),
    )


def kv_specs(layers: int, heads: int, d_qk: int, d_v: int) -> tuple[ArraySpec, ...]:
    return (
        ArraySpec(KEYS, "float32", (layers, TOKEN, heads, d_qk)),
        ArraySpec(VALUES, "float32", (layers, TOKEN, heads, d_v)),
    )


def interval_specs() -> tuple[ArraySpec, ...]:
    return jagged(LOW, "int32", TOKEN), jagged(HIGH, "int32", TOKEN)


def candidate_interval_specs() -> tuple[ArraySpec, ...]:
    return jagged(CANDIDATE_LOW, "int32", CANDIDATE), jagged(CANDIDATE_HIGH, "int32", CANDIDATE)
