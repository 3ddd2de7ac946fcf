"""Who sees whom, said as intervals: the usual masks of HSTU and MTGR for the op `hstu_attention`.

Keys are the tokens of one sequence: prefix features, behaviours oldest first, then candidates.
Queries are the tokens from ``start`` on; what comes before is cached. A candidate sees the history
and itself, so each mask here is an interval and a token's own key.

Shapes: T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

USER, LONG_HISTORY, REALTIME, CANDIDATE = range(4)
"""Groups of MTGR's tokens: U, S, R and C in arXiv 2505.18654."""


class Intervals(NamedTuple):
    """Arguments of the op: int32, (T,)."""

    low_T: Tensor
    high_T: Tensor
    own_T: Tensor


def causal(
    history: int,
    candidates: int = 0,
    *,
    start: int = 0,
    window: int = 0,
    contextual: int = 0,
) -> Intervals:
    """Each token sees the tokens of the history before it, and itself.

    ``history`` counts all tokens but the candidates. With a ``window``, a token sees those at most
    so many places before. The first ``contextual`` tokens share one place: they see the whole
    history, and are seen where their place is. Raises `ValueError` for numbers out of range.
    """
    _check(history, candidates, start)
    if not 0 <= contextual <= history:
        raise ValueError(f"contextual is {contextual}; expected 0 to {history}, the history")
    if window < 0:
        raise ValueError(f"window is {window}; expected at least 0, which is none")
    token_T = np.arange(start, history + candidates)
    # Contextual tokens have the place 0, candidates the one after the last behaviour.
    shared = max(contextual - 1, 0)
    place_T = np.maximum(np.minimum(token_T, history) - shared, 0)
    high_T = np.minimum(token_T, history)
    low_T = np.zeros_like(token_T)
    if window:
        first_T = place_T - window
        low_T = np.where(first_T <= 0, 0, first_T + shared)
    is_contextual_T = token_T < contextual
    return _intervals(
        np.where(is_contextual_T, 0, low_T), np.where(is_contextual_T, history, high_T), token_T
    )


def mtgr(groups_S: npt.ArrayLike, times_S: npt.ArrayLike, *, start: int = 0) -> Intervals:
    """MTGR's dynamic mask, of each token's group and time in seconds (unused for U and S).

    U and S are seen by all tokens; a token of R by itself, and by the tokens of R and the
    candidates that are strictly later; a candidate by itself. Raises `ValueError` where that is no
    interval: the order must be U and S, then R sorted by time, then the candidates.
    """
    group_S, time_S = np.asarray(groups_S), np.asarray(times_S)
    if group_S.ndim != 1 or group_S.shape != time_S.shape:
        raise ValueError(
            f"groups and times have the shapes {group_S.shape} and {time_S.shape}; "
            "expected one axis, the same"
        )
    order_S = np.maximum(group_S, LONG_HISTORY)
    if len(group_S) and (group_S.min() < USER or group_S.max() > CANDIDATE):
        raise ValueError(f"groups must be from {USER} to {CANDIDATE}")
    if (np.diff(order_S) < 0).any():
        raise ValueError("tokens must be in the order U and S, R, candidates")
    realtime_R = time_S[group_S == REALTIME]
    if (np.diff(realtime_R) < 0).any():
        raise ValueError("tokens of R must be sorted by time, or what is seen is no interval")
    static = int((order_S == LONG_HISTORY).sum())
    _check(static + len(realtime_R), int((group_S == CANDIDATE).sum()), start)
    earlier_S = np.searchsorted(realtime_R, time_S, side="left")
    high_S = static + np.where(order_S == LONG_HISTORY, 0, earlier_S)
    token_T = np.arange(start, len(group_S))
    return _intervals(np.zeros_like(token_T), high_S[start:], token_T)


def joined(parts: Sequence[Intervals]) -> Intervals:
    """Those of several sequences, one after another."""
    return Intervals(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _check(history: int, candidates: int, start: int) -> None:
    if history < 0 or candidates < 0:
        raise ValueError(f"history is {history}, candidates {candidates}; expected at least 0")
    if not 0 <= start <= history + candidates:
        raise ValueError(f"start is {start}; expected 0 to {history + candidates}, the tokens")


def _intervals(*columns: npt.NDArray[np.int64]) -> Intervals:
    return Intervals(*(torch.from_numpy(column.astype(np.int32)) for column in columns))
