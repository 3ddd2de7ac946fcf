"""What the steps of all models share: where tokens stand, whom they see, and K and V around them.

A step's tokens follow the cached ones of their history, so that the number of those says where
each of them stands. Padded tokens stand after the history, and padded keys nowhere: no interval
has either.

Shapes: B batch, W ids of a token, T tokens given, P tokens cached, S = P + T keys, C candidates,
R = T + C rows, M layers, H heads, K columns of Q and K per head, V columns of V per head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
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
from gr_hstu.modules.hstu import HSTULayer, HSTUStack

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


class Sight(NamedTuple):
    """Whom the rows of a step see."""

    weight_BRS: Tensor
    """float32, of keys that are seen 1 / divisor of the attention, of others 0."""
    divisor: float
    tokens: int
    """T, how many of the rows are keys."""
    apart: bool
    """Whether the mask leaves each row's own key to `attention`, as candidates are no keys."""


def history_sight(
    place_BT: Tensor,
    low_BT: Tensor | None,
    high_BT: Tensor | None,
    past: Past | None,
    divisor: float,
) -> Sight:
    """Of given tokens alone; without intervals only of themselves."""
    key_BS = key_places(place_BT, past)
    mask_BTS = itself(place_BT, key_BS)
    if low_BT is not None and high_BT is not None:
        mask_BTS = mask_BTS | inside(low_BT, high_BT, key_BS)
    return Sight(mask_BTS.float() / divisor, divisor, place_BT.shape[1], apart=False)


def candidate_sight(
    place_BT: Tensor,
    low_BT: Tensor,
    high_BT: Tensor,
    low_BC: Tensor,
    high_BC: Tensor,
    past: Past,
    divisor: float,
) -> Sight:
    """Of given tokens, then candidates."""
    key_BS = key_places(place_BT, past)
    place_BR = torch.cat([place_BT, torch.full_like(low_BC, NOWHERE)], dim=1)
    low_BR, high_BR = torch.cat([low_BT, low_BC], dim=1), torch.cat([high_BT, high_BC], dim=1)
    others_BRS = inside(low_BR, high_BR, key_BS) & ~itself(place_BR, key_BS)
    return Sight(others_BRS.float() / divisor, divisor, place_BT.shape[1], apart=True)


def attention(
    q_BRHK: Tensor,
    k_BRHK: Tensor,
    v_BRHV: Tensor,
    sight: Sight,
    past: tuple[Tensor, Tensor] | None,
    *,
    alpha: float,
    bias_BRS: Tensor | None = None,
) -> Tensor:
    """(B, R, H, V): `modules.attention.hstu_attention` in the form that compilers do best.

    That is products of matrices, and as few passes over all pairs as can be: mask and divisor are
    one factor, which asks for finite scores of padded keys too. As the attention is a sum over
    keys, a candidate's own key can be added apart: else each candidate were a key of all others,
    only to be masked.
    """
    q_BRHK = q_BRHK * alpha if alpha != 1.0 else q_BRHK
    k_BSHK, v_BSHV = k_BRHK, v_BRHV
    if sight.apart:
        k_BSHK, v_BSHV = k_BRHK[:, : sight.tokens], v_BRHV[:, : sight.tokens]
    if past is not None:
        k_BSHK, v_BSHV = torch.cat([past[0], k_BSHK], dim=1), torch.cat([past[1], v_BSHV], dim=1)
    score_BHRS = q_BRHK.transpose(1, 2) @ k_BSHK.permute(0, 2, 3, 1)
    if bias_BRS is not None:
        score_BHRS = score_BHRS + bias_BRS[:, None]
    # In a copy of lower precision, whose products go on in it.
    seen_B1RS = sight.weight_BRS[:, None].to(score_BHRS.dtype)
    weight_BHRS = F.silu(score_BHRS) * seen_B1RS
    sum_BRHV = (weight_BHRS @ v_BSHV.transpose(1, 2)).transpose(1, 2)
    if sight.apart:
        own_BRH1 = F.silu((q_BRHK * k_BRHK).sum(-1, keepdim=True)) / sight.divisor
        sum_BRHV = sum_BRHV + own_BRH1 * v_BRHV
    return sum_BRHV


def run_hstu(
    stack: HSTUStack,
    x_BRD: Tensor,
    sight: Sight,
    past: Past | None,
    bias_MBRS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y (B, R, D), and of the given tokens K (B, M, T, H, K) and V (B, M, T, H, V)."""
    keys, values = [], []
    for i, layer in enumerate(cast("Iterable[HSTULayer]", stack.layers)):
        u_BRF, v_BRHV, q_BRHK, k_BRHK = layer.project(x_BRD)
        attended_BRHV = attention(
            q_BRHK,
            k_BRHK,
            v_BRHV,
            sight,
            None if past is None else past.layer(i),
            alpha=layer.config.scale,
            bias_BRS=None if bias_MBRS is None else bias_MBRS[i],
        )
        x_BRD = layer.output(layer.gate(u_BRF, attended_BRHV.flatten(-2))) + x_BRD
        keys.append(k_BRHK)
        values.append(v_BRHV)
    return x_BRD, by_layer(keys, sight), by_layer(values, sight)


def by_layer(parts: Sequence[Tensor], sight: Sight) -> Tensor:
    """K or V (B, R, H, columns) of each layer as (B, M, T, H, columns)."""
    if sight.apart:
        parts = [part[:, : sight.tokens] for part in parts]
    return torch.stack(list(parts), dim=1)


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


def interval_specs() -> tuple[ArraySpec, ...]:
    return jagged(LOW, "int32", TOKEN), jagged(HIGH, "int32", TOKEN)


def candidate_interval_specs() -> tuple[ArraySpec, ...]:
    return jagged(CANDIDATE_LOW, "int32", CANDIDATE), jagged(CANDIDATE_HIGH, "int32", CANDIDATE)
