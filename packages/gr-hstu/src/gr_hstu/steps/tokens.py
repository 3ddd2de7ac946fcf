"""What the steps of all models share: where tokens stand, whom they see, and what they are given.

A step's tokens follow the cached ones of their history, so that the number of those says where
each of them stands. Padded tokens stand after the history, and padded keys nowhere: no interval
has either.

Shapes: B batch, W ids of a token, T tokens given, P tokens cached, S = P + T keys, C candidates,
R rows, M layers, H heads, K columns of Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from gr_core.contracts import ArraySpec
from gr_core.stack import TokenSequence
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
from gr_hstu.jagged.intervals import Int32Array
from gr_hstu.jagged.rows import to_ids
from gr_hstu.models import MTGR, HSTURanking
from gr_hstu.modules.embeddings import FeatureEmbeddings

IDS, LOW, HIGH = "ids", "low", "high"
CANDIDATE_ITEMS, CANDIDATE_FEATURES = "candidate_items", "candidate_features"
CANDIDATE_LOW, CANDIDATE_HIGH = "candidate_low", "candidate_high"
CANDIDATE_BUCKET, CONTEXT_FEATURES = "candidate_bucket", "context_features"

NOWHERE = -1
"""A place that is in no interval."""
_NO_ROWS = np.zeros(0, np.int32)


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


def history_sight(
    place_BR: Tensor, low_BR: Tensor, high_BR: Tensor, key_BS: Tensor, divisor: float
) -> Tensor:
    """float32 (B, R, S) of tokens: 1 / divisor for keys that are seen, 0 for others."""
    mask_BRS = itself(place_BR, key_BS) | inside(low_BR, high_BR, key_BS)
    return mask_BRS.float() / divisor


def prefill_sight(
    place_1T: Tensor, low_BT: Tensor | None, high_BT: Tensor | None, divisor: float
) -> Tensor | None:
    """`history_sight` (B, T, T), if there are intervals."""
    if low_BT is None or high_BT is None:
        return None
    return history_sight(place_1T, low_BT, high_BT, place_1T, divisor)


def candidate_sights(
    place_BT: Tensor,
    low_BT: Tensor | None,
    high_BT: Tensor | None,
    low_BC: Tensor,
    high_BC: Tensor,
    past: Past,
    divisor: float,
) -> tuple[Tensor | None, Tensor]:
    """`history_sight` less the rows' own keys, of all rows and of the candidates.

    That is (B, T + C, S), if there are intervals of the tokens, and (B, C, S).
    """
    key_BS = key_places(place_BT, past)
    if low_BT is None or high_BT is None:
        return None, inside(low_BC, high_BC, key_BS).float() / divisor
    place_BR = torch.cat([place_BT, torch.full_like(low_BC, NOWHERE)], dim=1)
    low_BR, high_BR = torch.cat([low_BT, low_BC], dim=1), torch.cat([high_BT, high_BC], dim=1)
    others_BRS = inside(low_BR, high_BR, key_BS) & ~itself(place_BR, key_BS)
    sight_BRS = others_BRS.float() / divisor
    return sight_BRS, sight_BRS[:, place_BT.shape[1] :]


def tables_of(model: HSTURanking | MTGR) -> list[Tensor]:
    """Embeddings (rows, columns) of each prefix token's feature."""
    tables = [*model.users.tables]
    if model.config.context_placement == "prefix":
        tables += model.contexts.tables
    return [cast("nn.Embedding", table).weight for table in tables]


def first_rows(tables: Sequence[Tensor]) -> Int32Array:
    """Where each table begins in all of them together."""
    return np.cumsum([0, *map(len, tables)], dtype=np.int32)[:-1]


def step_ids(
    sequence: TokenSequence, start: int, width: int, first_rows_P: Int32Array = _NO_ROWS
) -> Int32Array:
    """Ids (T, width) of the tokens from ``start`` on, to be read only.

    Of prefix tokens, the first id is the row of one table of all features.
    """
    ids_TW = to_ids(sequence.content)[start:, :width]
    if start < len(first_rows_P):
        ids_TW = ids_TW.copy()
        ids_TW[: len(first_rows_P) - start, 0] += first_rows_P[start:]
    return ids_TW


def first_ids(ids_BTW: Tensor, item_side: FeatureEmbeddings) -> Tensor:
    """The first id of each token (B, T), int64 where it looks up an item's side features."""
    return ids_BTW[..., 0].long() if len(item_side) else ids_BTW[..., 0]


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


def interval_specs(layers: int = 2) -> tuple[ArraySpec, ...]:
    """Whom tokens see, which one layer alone does not need: of it only K and V are read."""
    if layers == 1:
        return ()
    return jagged(LOW, "int32", TOKEN), jagged(HIGH, "int32", TOKEN)


def candidate_interval_specs() -> tuple[ArraySpec, ...]:
    return jagged(CANDIDATE_LOW, "int32", CANDIDATE), jagged(CANDIDATE_HIGH, "int32", CANDIDATE)
