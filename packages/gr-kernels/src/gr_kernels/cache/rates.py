"""What is worth loading: recomputing a block may take less time than copying it."""

from __future__ import annotations

from collections.abc import Sequence


def most_saving(
    saved: Sequence[float], seconds_per_block: float, latency: float, instead: float = 0.0
) -> int:
    """How many of some blocks to load, from the first on, so that it saves the most time.

    ``saved[i]`` are the seconds that computing block i takes, ``latency`` those until the first
    block comes, ``instead`` what is saved where none is loaded. O(blocks).
    """
    best, most, total = 0, instead, -latency
    for i, seconds in enumerate(saved):
        total += seconds - seconds_per_block
        if total > most:
            best, most = i + 1, total
    return best
