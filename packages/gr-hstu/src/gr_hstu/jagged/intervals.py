"""Who sees whom, as a range of keys for each token: `gr_hstu.modules.masks` without the pairs.

Shapes: P prefix tokens, L behaviours, N = P + L tokens of the history, C candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

_COUNTING = np.arange(16384, dtype=np.int32)
_ZEROS = np.zeros(16384, np.int32)


def counting(n: int) -> Int32Array:
    """0 to n - 1, to be read only."""
    return _COUNTING[:n] if n <= len(_COUNTING) else np.arange(n, dtype=np.int32)


def _zeros(n: int) -> Int32Array:
    """To be read only."""
    return _ZEROS[:n] if n <= len(_ZEROS) else np.zeros(n, np.int32)


def hstu_intervals(
    prefix: int, length: int, candidates: int, *, window: int = 0, contextual: bool = False
) -> tuple[Int32Array, Int32Array]:
    """low and high (N + C,) of HSTU's tokens; besides, each one sees itself.

    Behaviour i and the prefix tokens are causal. With a window, only so many tokens before are
    seen. With ``contextual``, all prefix tokens stand directly before the oldest behaviour, and see
    the whole history.
    """
    n = prefix + length
    high = np.empty(n + candidates, np.int32)
    high[:n] = counting(n)
    high[n:] = n
    low = _zeros(n + candidates)
    if window:
        low = high - np.int32(window)
        # The last token of a prefix is a place of its own, or all of it is one.
        low[low < (prefix if contextual else 0)] = 0
    if contextual and prefix:
        if window:
            low[:prefix] = 0
        high[:prefix] = n
    return low, high


def mtgr_intervals(
    prefix: int, times_L: npt.NDArray[np.int64], realtime: int, request_time: int, candidates: int
) -> tuple[Int32Array, Int32Array]:
    """low and high (N + C,) of MTGR's tokens; besides, each one sees itself.

    ``times_L`` ascend, as features make them, so that what is strictly earlier than a token of R is
    a range of R. The last ``realtime`` behaviours are R.
    """
    n = prefix + len(times_L)
    static = n - realtime
    high = np.empty(n + candidates, np.int32)
    high[:static] = static
    high[n:] = static
    if realtime:
        times_R = times_L[len(times_L) - realtime :]
        assert (times_R[1:] >= times_R[:-1]).all(), "a history must ascend in time"
        high[static:n] = static + times_R.searchsorted(times_R)
        high[n:] += times_R.searchsorted(request_time)
    return _zeros(n + candidates), high
