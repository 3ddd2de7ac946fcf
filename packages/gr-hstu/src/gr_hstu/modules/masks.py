"""Who sees whom: the attention masks of HSTU and MTGR, from descriptions of the tokens.

Both take query and key tokens, where the queries are always the last tokens of the keys. So one
rule covers a single pass (the same tokens on both sides), and new tokens against cached K/V.

Shapes: B batch, T queries, S keys, L history, C candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HSTUTokens(NamedTuple):
    """What the mask of HSTU depends on."""

    rank_BT: Tensor
    """int64 place in the sequence; all candidates share the rank after the last behaviour, all
    contextual tokens share rank 0."""
    valid_BT: Tensor
    """bool; False for padding."""
    target_BT: Tensor
    """bool; True for candidates."""


class MTGRTokens(NamedTuple):
    """What the mask of MTGR depends on."""

    group_BT: Tensor
    """int64, one of the group constants below."""
    time_BT: Tensor
    """int64 seconds: of the behaviour, or of the request for a candidate; unused for U."""
    valid_BT: Tensor
    """bool; False for padding."""


USER, LONG_HISTORY, REALTIME, CANDIDATE = range(4)
NUM_GROUPS = 4


def lengths_to_valid(lengths_B: Tensor, size: int) -> Tensor:
    """(B, size) bool: True before each length."""
    return torch.arange(size, device=lengths_B.device)[None, :] < lengths_B[:, None]


def history_tokens(
    prefix: int, items_BL: Tensor, lengths_B: Tensor, *, contextual: bool
) -> HSTUTokens:
    """Tokens of `prefix` feature tokens followed by the right-padded history: (B, prefix + L)."""
    batch, length = items_BL.shape
    device = items_BL.device
    prefix_rank_P = torch.arange(prefix, device=device) * (0 if contextual else 1)
    base = history_base(prefix, contextual=contextual)
    history_rank_L = base + torch.arange(length, device=device)
    rank_BT = torch.cat([prefix_rank_P, history_rank_L]).expand(batch, -1)
    valid_BP = torch.ones(batch, prefix, dtype=torch.bool, device=device)
    valid_BT = torch.cat([valid_BP, lengths_to_valid(lengths_B, length)], dim=1)
    return HSTUTokens(rank_BT, valid_BT, torch.zeros_like(valid_BT))


def history_base(prefix: int, *, contextual: bool) -> int:
    """Rank of the oldest behaviour; rank 0 is the contextual tokens' where there may be any."""
    return 1 if contextual else prefix


def candidate_tokens(
    prefix: int, candidates_BC: Tensor, counts_B: Tensor, lengths_B: Tensor, *, contextual: bool
) -> HSTUTokens:
    """Tokens of the candidates after a history of `lengths_B` behaviours: (B, C)."""
    rank_B1 = (history_base(prefix, contextual=contextual) + lengths_B)[:, None]
    valid_BC = lengths_to_valid(counts_B, candidates_BC.shape[1])
    return HSTUTokens(rank_B1.expand_as(candidates_BC), valid_BC, torch.ones_like(valid_BC))


def _is_self(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S): the queries are the last of the keys."""
    query_T = torch.arange(queries, device=device) + (keys - queries)
    return query_T[:, None] == torch.arange(keys, device=device)[None, :]


def hstu_mask(
    query: HSTUTokens, key: HSTUTokens, *, window: int = 0, contextual: bool = False
) -> Tensor:
    """(B, T, S) bool: the query sees the key.

    A token sees itself and the valid tokens of a lower rank, so a candidate sees the whole history
    and itself. With a window, only those at most `window` ranks before. With `contextual`, tokens
    of rank 0 see everything but candidates.
    """
    distance_BTS = query.rank_BT[:, :, None] - key.rank_BT[:, None, :]
    sees_BTS = distance_BTS > 0
    if window > 0:
        sees_BTS = sees_BTS & (distance_BTS <= window)
    if contextual:
        sees_BTS = sees_BTS | ((query.rank_BT == 0)[:, :, None] & ~key.target_BT[:, None, :])
    is_self_TS = _is_self(query.rank_BT.shape[1], key.rank_BT.shape[1], key.rank_BT.device)
    return (sees_BTS | is_self_TS) & key.valid_BT[:, None, :]


def mtgr_mask(query: MTGRTokens, key: MTGRTokens) -> Tensor:
    """(B, T, S) bool: the query sees the key, by MTGR's dynamic mask.

    U and S are seen by all tokens. A token of R is seen by itself and by the tokens of R and the
    candidates that are strictly later in time. A candidate is seen by itself only.
    """
    dynamic_BT = (query.group_BT == REALTIME) | (query.group_BT == CANDIDATE)
    static_BS = (key.group_BT == USER) | (key.group_BT == LONG_HISTORY)
    later_BTS = query.time_BT[:, :, None] > key.time_BT[:, None, :]
    realtime_BTS = (key.group_BT == REALTIME)[:, None, :] & dynamic_BT[:, :, None] & later_BTS
    is_self_TS = _is_self(query.group_BT.shape[1], key.group_BT.shape[1], key.group_BT.device)
    return (static_BS[:, None, :] | realtime_BTS | is_self_TS) & key.valid_BT[:, None, :]


def mtgr_history_tokens(
    prefix: int, timestamps_BL: Tensor, lengths_B: Tensor, realtime_counts_B: Tensor
) -> MTGRTokens:
    """Tokens of `prefix` user features followed by the history: (B, prefix + L)."""
    batch, length = timestamps_BL.shape
    device = timestamps_BL.device
    position_L = torch.arange(length, device=device)
    realtime_BL = position_L[None, :] >= (lengths_B - realtime_counts_B)[:, None]
    user_BP = torch.full((batch, prefix), USER, device=device)
    group_BT = torch.cat([user_BP, realtime_BL * (REALTIME - LONG_HISTORY) + LONG_HISTORY], dim=1)
    time_BP = torch.zeros(batch, prefix, dtype=timestamps_BL.dtype, device=device)
    valid_BP = torch.ones(batch, prefix, dtype=torch.bool, device=device)
    return MTGRTokens(
        group_BT,
        torch.cat([time_BP, timestamps_BL], dim=1),
        torch.cat([valid_BP, lengths_to_valid(lengths_B, length)], dim=1),
    )


def mtgr_candidate_tokens(
    candidates_BC: Tensor, counts_B: Tensor, request_time_B: Tensor
) -> MTGRTokens:
    """Tokens of the candidates of a request: (B, C)."""
    return MTGRTokens(
        torch.full_like(candidates_BC, CANDIDATE),
        request_time_B[:, None].expand_as(candidates_BC),
        lengths_to_valid(counts_B, candidates_BC.shape[1]),
    )
