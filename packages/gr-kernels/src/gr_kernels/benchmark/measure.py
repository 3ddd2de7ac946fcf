"""Measuring the sides at a point: parity first, then rounds in which they take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gr_kernels.benchmark.peers import NATIVE, SIDES, JaggedSide, Side, reference_rows
from gr_kernels.benchmark.points import TARGETS_MS, Point, demanded_ratios
from gr_kernels.benchmark.work import make_work

_SLICE_S = 0.03
"""A turn of a side repeats its run for so long, so that short runs are not measured with the
caches full of another side's data."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int = 15
    seconds: float = 5.0
    """For each side at each point; one that is slow takes part in fewer rounds, but in one."""
    threads: int = 1


@dataclass(slots=True)
class SideResult:
    """What a side took at a point. Times are of one run, medians over its rounds."""

    name: str
    implementation: str = ""
    skipped: str = ""
    """Why it was not measured; then there are no figures."""
    failed: bool = False
    """Whether it could have run and did not."""
    error: float | None = None
    """Relative to float32, in the Euclidean norm of the candidates' rows; None where the side
    computes another function."""
    limit: float | None = None
    cpu_ms: float | None = None
    cpu_ms_quartiles: tuple[float, float] | None = None
    wall_ms: float | None = None
    gflops_per_s: float | None = None
    """Arithmetic that the work needs, by the processor time that it took."""
    compared_with: str = ""
    faster: float | None = None
    """How many times the native side of the same precision is faster: the median, within rounds,
    of the ratio of processor times; with several threads, which take processor time while they
    wait for each other, of wall times."""
    faster_quartiles: tuple[float, float] | None = None
    withheld: str = ""
    """Why that is not told, although both ran: one of the two is wrong."""
    peak_bytes: int | None = None
    cpu_s: list[float | None] = field(default_factory=list)
    """Of each round."""
    wall_s: list[float | None] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Parity is red."""
        return self.limit is not None and self.error is not None and not self.error <= self.limit

    @property
    def rounds(self) -> int:
        return sum(seconds is not None for seconds in self.cpu_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """A ratio that the native side has to reach."""

    side: str
    ratio: float
    measured: float | None

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.ratio


@dataclass(frozen=True, slots=True)
class PointResult:
    point: Point
    sides: Sequence[SideResult]

    def side(self, name: str) -> SideResult | None:
        return next((side for side in self.sides if side.name == name), None)

    @property
    def target_ms(self) -> float | None:
        return TARGETS_MS.get(self.point.label)

    @property
    def demands(self) -> Sequence[Demand]:
        found = {side.name: side.faster for side in self.sides}
        return [
            Demand(name, ratio, found[name])
            for name, ratio in demanded_ratios(self.point).items()
            if name in found
        ]


def relative_error(rows_CD: Tensor, expected_CD: Tensor) -> float:
    """|rows - expected| / |expected|, Euclidean; infinite where a value is not finite."""
    difference = (rows_CD.double() - expected_CD.double()).norm() / expected_CD.double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")


def measure_point(
    point: Point,
    sides: Sequence[type[Side]] = SIDES,
    settings: Settings = Settings(),
    advance: Callable[[str], None] = lambda step: None,
) -> PointResult:
    """Runs the sides that can run; ``advance`` is told of each that is ready, and of the rounds."""
    torch.set_num_threads(settings.threads)
    work = make_work(point)
    expected_CD = reference_rows(work)
    results: dict[str, SideResult] = {}
    ready: dict[str, tuple[Side, int]] = {}
    try:
        for kind in sides:
            if kind.recomputes and not point.cached:
                continue
            advance(f"{point.label} {kind.name}")
            result = results[kind.name] = SideResult(kind.name, limit=kind.limit)
            result.skipped = kind.unavailable()
            if result.skipped:
                continue
            try:
                side = kind(work, settings.threads)
                side.before()
                side.run()
                seconds = _slice(side)[1]
            except Exception as error:
                if issubclass(kind, JaggedSide):
                    raise
                # Compilers and other runtimes raise what they like; the others can be compared.
                lines = str(error).strip().splitlines() or [""]
                result.skipped, result.failed = f"{type(error).__name__}: {lines[0]}", True
                continue
            result.implementation = side.implementation
            if kind.limit is not None:
                result.error = relative_error(side.rows(), expected_CD)
            turns = int(settings.seconds / max(seconds, _SLICE_S))
            ready[kind.name] = side, max(1, min(turns, settings.rounds))
        advance(f"{point.label} rounds")
        _take_turns(ready, results)
    finally:
        for side, _ in ready.values():
            side.close()
    for name, (side, _) in ready.items():
        _summarize(results[name], side)
    for name, (side, _) in ready.items():
        _compare(results[name], results.get(NATIVE[side.dtype]), settings.threads)
    return PointResult(point, list(results.values()))


def _take_turns(ready: dict[str, tuple[Side, int]], results: dict[str, SideResult]) -> None:
    """Another side comes first in every round; one with fewer turns sits out evenly."""
    names = list(ready)
    rounds = max((turns for _, turns in ready.values()), default=0)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            side, turns = ready[name]
            cpu_s = wall_s = None
            if (number + 1) * turns // rounds > number * turns // rounds:
                cpu_s, wall_s = _slice(side)
            results[name].cpu_s.append(cpu_s)
            results[name].wall_s.append(wall_s)


def _slice(side: Side) -> tuple[float, float]:
    """Medians of processor time and of wall time of a run, in seconds."""
    cpu_s: list[float] = []
    wall_s: list[float] = []
    while sum(wall_s) < _SLICE_S:
        side.before()
        wall, cpu = time.perf_counter(), time.process_time()
        side.run()
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    return statistics.median(cpu_s), statistics.median(wall_s)


def _summarize(result: SideResult, side: Side) -> None:
    cpu_ms = [seconds * 1e3 for seconds in result.cpu_s if seconds is not None]
    wall_ms = [seconds * 1e3 for seconds in result.wall_s if seconds is not None]
    result.cpu_ms = statistics.median(cpu_ms)
    result.cpu_ms_quartiles = quartiles(cpu_ms)
    result.wall_ms = statistics.median(wall_ms)
    if result.limit is not None:
        work = side.work.point.gflops(all_rows=side.all_rows)
        result.gflops_per_s = work / result.cpu_ms * 1e3


def _compare(result: SideResult, native: SideResult | None, threads: int) -> None:
    """Fills in how many times the native side is faster, or why that is not told."""
    if native is None or native is result or native.skipped:
        return
    wrong = [side.name for side in (result, native) if side.wrong]
    if wrong:
        result.withheld = f"{' and '.join(wrong)} wrong"
        return
    times = (result.cpu_s, native.cpu_s) if threads == 1 else (result.wall_s, native.wall_s)
    ratios = [
        theirs / ours
        for theirs, ours in zip(*times, strict=True)
        if theirs is not None and ours is not None
    ]
    if ratios:
        result.compared_with = native.name
        result.faster = statistics.median(ratios)
        result.faster_quartiles = quartiles(ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; the value itself twice where there is one."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
