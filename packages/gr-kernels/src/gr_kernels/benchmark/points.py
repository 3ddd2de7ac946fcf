"""The points of the work grid: how much is computed, and what is demanded of it.

A point is written ``layers/width/history/candidates``, where history is ``2048``, for a batch of
users with histories of mixed length ``8x2048`` (the longest), and where K and V of the beginning
are at hand ``2000+48``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

HEADS = 4

_LABEL = re.compile(r"(\d+)/(\d+)/(?:(\d+)x)?(?:(\d+)\+)?(\d+)/(\d+)")
_MOST = {
    "layers": 64,
    "width": 4096,
    "users": 64,
    "cached": 2**17,
    "new": 2**17,
    "candidates": 2**14,
}


@dataclass(frozen=True, slots=True)
class Point:
    """Ranking-variant HSTU layers with `HEADS` heads over histories and their candidates."""

    layers: int
    width: int
    """Of the model; a head has width / `HEADS` columns of each of U, V, Q, K."""
    users: int
    cached: int
    """Tokens of each history whose K and V are at hand."""
    new: int
    """Tokens of the longest history besides."""
    candidates: int
    """Of each user."""

    @staticmethod
    def parse(label: str) -> Point:
        """Raises `ValueError` for what is no point, or one out of bounds."""
        match = _LABEL.fullmatch(label)
        if match is None:
            raise ValueError(
                f"point is {label!r}; expected layers/width/history/candidates, e.g. "
                "4/256/2048/256, 4/256/8x1024/64 (eight users), 4/256/2000+48/256 (cached)"
            )
        layers, width, users, cached, new, candidates = (int(g) if g else 0 for g in match.groups())
        point = Point(layers, width, users or 1, cached, new, candidates)
        for field, most in _MOST.items():
            value, least = getattr(point, field), 0 if field == "cached" else 1
            if not least <= value <= most:
                raise ValueError(
                    f"point {label}: {field} is {value}; expected from {least} to {most}"
                )
        if point.cached and point.users > 1:
            raise ValueError(
                f"point {label}: cached tokens are for one user; leave out one of x, +"
            )
        if point.width % (16 * HEADS):
            raise ValueError(
                f"point {label}: width is {width}; expected a multiple of {16 * HEADS}"
            )
        return point

    @property
    def label(self) -> str:
        users = f"{self.users}x" if self.users > 1 else ""
        cached = f"{self.cached}+" if self.cached else ""
        return f"{self.layers}/{self.width}/{users}{cached}{self.new}/{self.candidates}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each history: evenly spaced, from a quarter of the longest to it."""
        if self.users == 1:
            return (self.new,)
        shortest = self.new / 4
        step = (self.new - shortest) / (self.users - 1)
        return tuple(max(1, round(shortest + step * i)) for i in range(self.users))

    @property
    def recomputed(self) -> Point:
        """The same tokens with nothing cached."""
        return replace(self, cached=0, new=self.cached + self.new)

    @property
    def tokens(self) -> int:
        """That are computed: new ones of the histories, and candidates."""
        return sum(self.lengths) + self.users * self.candidates

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, in one layer; every token sees itself."""
        return sum(_history_pairs(self.cached, n) for n in self.lengths) + self.candidate_pairs

    @property
    def candidate_pairs(self) -> int:
        return sum(self.candidates * (self.cached + n + 1) for n in self.lengths)

    def gflops(self, *, all_rows: bool) -> float:
        """Arithmetic of the projections and of the attention's visible pairs, in 1e9.

        Without ``all_rows`` the last layer computes only K and V of the history's tokens.
        """
        projection, output, pair = 8 * self.width**2, 6 * self.width**2, 4 * self.width
        layer = self.tokens * (projection + output) + self.pairs * pair
        if all_rows:
            return self.layers * layer / 1e9
        candidates = self.users * self.candidates
        last = candidates * (projection + output) + self.candidate_pairs * pair
        last += sum(self.lengths) * projection // 2
        return ((self.layers - 1) * layer + last) / 1e9


def _history_pairs(cached: int, new: int) -> int:
    return new * cached + new * (new + 1) // 2


TARGETS_MS: Mapping[str, float] = {
    "4/256/256/64": 1.2,
    "4/256/512/256": 3.4,
    "4/256/1024/256": 7.0,
    "4/256/2048/256": 18.0,
    "4/256/4096/256": 53.0,
    "4/256/2048/1024": 27.0,
    "4/512/2048/256": 43.0,
    "8/512/1024/256": 39.0,
    "8/512/4096/1024": 277.0,
    "4/256/8x1024/64": 26.0,
    "4/256/8x2048/256": 79.0,
    "4/256/2000+48/256": 3.5,
    "4/512/2000+48/256": 7.5,
}
"""Processor milliseconds on one core that multiplies bf16 in tiles (AMX): 1.4 times a floor of
1.8 TFLOP/s for projections and 1.34 (head width 64) or 1.8 (128) for attention."""

GRID = tuple(Point.parse(label) for label in TARGETS_MS)


def demanded_ratios(point: Point) -> Mapping[str, float]:
    """How many times faster than other sides the native one has to be, by their names."""
    demanded = {"sdpa-bf16": 2.0}
    if point.width == 512:
        demanded["dense-bf16"] = 3.0
    elif point.width == 256 and point.cached + point.new >= 1024:
        demanded["dense-bf16"] = 6.0
    return demanded
