"""How time grows with the history, with the candidates, with the cached history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gr_kernels.benchmark.measure import PointResult, Settings, measure_point
from gr_kernels.benchmark.peers import (
    BlockedBFloat16,
    DenseBFloat16,
    NativeBFloat16,
    Side,
    TransformerBFloat16,
)
from gr_kernels.benchmark.points import Point

SERIES: Mapping[str, Sequence[Point]] = {
    "history": [Point.parse(f"4/256/{2**i}/256") for i in range(7, 14)],
    "candidates": [Point.parse(f"4/256/1024/{2**i}") for i in range(4, 13)],
    "cached history": [Point.parse(f"4/256/{2**i}+16/64") for i in range(7, 14)],
}
"""What the axis of each series is: L, N, or L of which all but 16 tokens are cached."""

SIDES: tuple[type[Side], ...] = (
    NativeBFloat16,
    BlockedBFloat16,
    DenseBFloat16,
    TransformerBFloat16,
)


def measure_growth(
    settings: Settings,
    sides: Sequence[type[Side]] = SIDES,
    series: Mapping[str, Sequence[Point]] = SERIES,
    advance: Callable[[str], None] = lambda step: None,
) -> Mapping[str, Sequence[PointResult]]:
    """A side leaves a series where the next point could take it more than ``settings.seconds``.

    Each point is twice the one before, and so at most four times its work.
    """
    measured: dict[str, list[PointResult]] = {}
    for name, points in series.items():
        remaining = list(sides)
        measured[name] = []
        for point in points:
            if not remaining:
                break
            result = measure_point(point, remaining, settings, advance)
            measured[name].append(result)
            slow = {
                side.name
                for side in result.sides
                if side.cpu_ms is not None and 4 * side.cpu_ms > settings.seconds * 1e3
            }
            remaining = [kind for kind in remaining if kind.name not in slow]
    return measured
