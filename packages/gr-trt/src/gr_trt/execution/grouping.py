"""Which requests of a batch are computed together, where shorter ones are padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_PADDING = 0.5
"""Padding that a group may add to its work, as a part of it."""
FREE_WORK = 1 << 20
"""Work so small that splitting costs more than padding."""


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens of one request."""

    rows: int
    """Tokens that are computed."""
    keys: int
    """Tokens that they see."""

    def work(self, width: int) -> int:
        """Multiplications of one layer, up to a factor: projections, and scores."""
        return self.rows * (4 * width + self.keys)


def grouped(
    sizes: Sequence[Size], width: int, fits: Callable[[int, Size], bool]
) -> list[list[int]]:
    """Indices of the requests in groups of similar sizes, none of which is larger than ``fits``.

    ``width`` is the model's, ``fits(n, size)`` says whether ``n`` requests padded to ``size`` may
    be computed at once; a single request always may.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i].rows, sizes[i].keys))
    groups: list[list[int]] = []
    for i in order:
        if groups:
            group = [*groups[-1], i]
            padded = Size(max(sizes[j].rows for j in group), max(sizes[j].keys for j in group))
            work = len(group) * padded.work(width)
            needed = sum(sizes[j].work(width) for j in group)
            worth = work - needed <= max(MAX_PADDING * needed, FREE_WORK)
            if worth and fits(len(group), padded):
                groups[-1] = group
                continue
        groups.append([i])
    return groups
