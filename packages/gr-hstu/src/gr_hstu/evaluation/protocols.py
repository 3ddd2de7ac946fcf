"""What is predicted from what: splits of a dataset into training, validation and test cases.

A case is a row of the dataset whose item is to be found, and the end of the history that may be
used: ``history_end`` <= row, so the history is the slice ``start_of_user : history_end``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from gr_hstu.data.interactions import BoolArray, IntArray, Interactions
from gr_hstu.data.kuairand import UTC_OFFSET_MS


@dataclass(frozen=True)
class Cases:
    """Rows to predict, (C,) each: the target's row and where its history begins and ends."""

    row_C: IntArray
    start_C: IntArray
    end_C: IntArray

    def __len__(self) -> int:
        return len(self.row_C)

    def take(self, which: np.ndarray) -> Cases:
        return Cases(self.row_C[which], self.start_C[which], self.end_C[which])


@dataclass(frozen=True)
class Split:
    """A protocol applied to a dataset.

    ``train_N`` marks the rows that models and counts may learn from while choices are made by
    ``validation``; ``refit_N`` those from before every test case, for a last fit with nothing
    left to choose.
    """

    name: str
    description: str
    train_N: BoolArray
    refit_N: BoolArray
    validation: Cases
    test: Cases
    training: Cases | None = None
    """Cases of the training rows, where models learn from cases and not from whole sequences."""


def leave_last_out(data: Interactions) -> Split:
    """Last row of each user for test, second last for validation; users with fewer than 3 rows
    are trained on only.

    Order is by time, then by row: events that share a timestamp stay apart by row alone.
    """
    last = np.flatnonzero(np.diff(data.user_N, append=-1))
    last = last[last - data.start_N[last] >= 2]
    train_N = np.ones(len(data), dtype=bool)
    train_N[last] = train_N[last - 1] = False
    refit_N = np.ones(len(data), dtype=bool)
    refit_N[last] = False

    def cases(row_C: IntArray) -> Cases:
        return Cases(row_C, data.start_N[row_C], row_C)

    return Split(
        "leave-last-out",
        "by time then row, the last event of each user is the test, the second last the validation",
        train_N,
        refit_N,
        cases(last - 1),
        cases(last),
    )


def retrieval_by_time(
    data: Interactions, validation_ms: int, test_ms: int, positive_N: BoolArray
) -> Split:
    """Each positive event from ``validation_ms`` (``test_ms``) on is predicted from what its user
    did strictly earlier, later than the split too; nothing from the split on is trained on.

    Events whose item the user has met before are no cases: a seen item is never recommended.
    """
    new_N = positive_N & first_meeting(data) & (data.strictly_before_N > data.start_N)
    time_N = data.timestamp_ms_N
    return Split(
        "by-time",
        "every positive event of the test period whose video is new to the user is predicted from "
        "all that the user did strictly earlier; models are fitted on earlier days only",
        time_N < validation_ms,
        time_N < test_ms,
        _cases(data, new_N & (time_N >= validation_ms) & (time_N < test_ms)),
        _cases(data, new_N & (time_N >= test_ms)),
    )


def held_out_users(data: Interactions, part: str, target: str, history: int) -> Split:
    """Every row with the signal ``target`` is found from the ``history`` rows of its user before.

    Users whose feature ``part`` is ``test`` are the test; of the others, every tenth validates and
    the rest is trained on.
    """
    test_U = np.concatenate([[False], data.users.features[part] == "test"])
    others = np.flatnonzero(~test_U[1:]) + 1
    held_out_U = np.zeros(len(test_U), np.bool_)
    held_out_U[others[::10]] = True
    row_C = np.flatnonzero(data.signals[target] == 1)
    cases = Cases(row_C, np.maximum(data.start_N[row_C], row_C - history), row_C)
    user_C = data.user_N[row_C]
    return Split(
        "held-out-users",
        f"every case of the test users is found from the last {history} items before it; models "
        "are fitted on other users, of whom every tenth is held out to choose by",
        ~(test_U | held_out_U)[data.user_N],
        ~test_U[data.user_N],
        cases.take(held_out_U[user_C]),
        cases.take(test_U[user_C]),
    )


def ranking_by_time(data: Interactions, validation_ms: int, test_ms: int) -> Split:
    """Every timed event from ``validation_ms`` (``test_ms``) on is an impression to score.

    Its history ends where its period begins; periods are as long as the validation is. So all that
    a user is shown in a period is ranked from one history, as the candidates of a request are. If
    an impression saw the outcomes just before it, each positive outcome would raise later scores
    and never its own, and the order within a user would be judged by that.
    """
    end_N = period_start_rows(data, test_ms, test_ms - validation_ms)
    timed_N = _timed(data)
    time_N = data.timestamp_ms_N

    def cases(mask_N: BoolArray) -> Cases:
        row_C = np.flatnonzero(mask_N & timed_N)
        return Cases(row_C, data.start_N[row_C], end_N[row_C])

    days = (test_ms - validation_ms) / 86_400_000
    return Split(
        "by-time",
        "impressions of the test period, all those of a user ranked from the history before it; "
        f"models are fitted on earlier days only, on periods of {days:g} days",
        time_N < validation_ms,
        time_N < test_ms,
        cases((time_N >= validation_ms) & (time_N < test_ms)),
        cases(time_N >= test_ms),
        cases(time_N < validation_ms),
    )


def period_start_rows(data: Interactions, origin_ms: int, period_ms: int) -> IntArray:
    """For each row the end of what its user did before the row's period, (N,) int64.

    Periods are counted from ``origin_ms`` in both directions. Events without a time of their own
    precede all timed ones and belong to the history of each.
    """
    row_N = np.arange(len(data))
    period_N = (data.timestamp_ms_N - origin_ms) // period_ms
    new_N = np.ones(len(data), dtype=bool)
    new_N[1:] = (data.user_N[1:] != data.user_N[:-1]) | (period_N[1:] != period_N[:-1])
    first_N = np.maximum.accumulate(np.where(new_N, row_N, 0))
    after_untimed_N = np.maximum.accumulate(np.where(_timed(data), 0, row_N + 1))
    return np.maximum(first_N, np.minimum(after_untimed_N, row_N)).astype(np.int64)


def _timed(data: Interactions) -> BoolArray:
    return np.ones(len(data), bool) if data.timed_N is None else data.timed_N


def first_meeting(data: Interactions) -> BoolArray:
    """Rows at which the user meets the item for the first time: (N,) bool."""
    key_N = data.user_N * (len(data.items) + 1) + data.item_N
    out = np.zeros(len(data), dtype=bool)
    out[np.unique(key_N, return_index=True)[1]] = True
    return out


def beijing_midnight_ms(day: str) -> int:
    """Start of a day (``YYYY-MM-DD``) in the time in which KuaiRand counts days."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    return int(start.timestamp() * 1000) - UTC_OFFSET_MS


def _cases(data: Interactions, mask_N: BoolArray) -> Cases:
    row_C = np.flatnonzero(mask_N)
    return Cases(row_C, data.start_N[row_C], data.strictly_before_N[row_C])
