"""Measuring the sides of a case: parity first, then rounds in which they take turns.

A side's error is relative to float32, in the Euclidean norm: of all rows together, and of the worst
row by the norm of a row on average, so that a few wrong rows do not hide among many. Each may be
twice that of plain PyTorch in the same precision. What is wrong is not timed, and nothing is
compared with it.
"""

from __future__ import annotations

import enum
import math
import statistics
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.benchmark.gpu.device import Device
from gr_kernels.benchmark.measure import quartiles, relative_error

SLACK, FLOOR = 2.0, 1e-6
"""As for every kernel, see `gr_core.testing.kernels`."""


class Kind(enum.Enum):
    """What a side is in a comparison."""

    OURS = "ours"
    PLAIN = "plain"
    """Plain PyTorch in the same precision, whose error is the measure; one in each case."""
    PEER = "peer"
    """Another implementation of the same function."""
    OTHER = "other"
    """Another function, whose answers are not checked."""


class Side(ABC):
    """Computes one case, again and again. Nothing but `output` waits for the device."""

    flops: float = 0.0
    """Arithmetic that a run needs: products of matrices over visible pairs, nothing else."""
    bytes: float = 0.0
    """The fewest that a run has to move through the device's memory, where that binds it."""
    implementation: str = ""
    """What runs, where the name does not say it."""

    def poison(self) -> None:
        """Fills what a run has to write with NaN, before it is checked."""
        return

    def before(self, number: int) -> None:
        """What a run on the inputs ``number`` needs and what is not measured."""
        return

    @abstractmethod
    def run(self, number: int) -> None:
        """What is measured."""

    @abstractmethod
    def output(self) -> Tensor:
        """What the last run gave."""

    def close(self) -> None:
        """Frees what outlives the object."""
        return


@dataclass(frozen=True, slots=True)
class Entry:
    """A side that is made when its turn comes."""

    name: str
    kind: Kind
    make: Callable[[], Side]


@dataclass(frozen=True, slots=True)
class Case:
    """What several sides compute."""

    name: str
    facts: Mapping[str, Any]
    """Sizes, for the report."""
    sets: int
    """Inputs that take turns, so that they are not in a cache where they would not be."""
    right: Callable[[int], Tensor]
    """What the inputs of a number give, in float32."""
    entries: Sequence[Entry]
    ours: str
    """Which side the others are compared with."""
    by_host: bool = False
    """Whether the host's clock counts: where what the host does first is a part of the work."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int = 15
    slice_ms: float = 30.0
    """A turn of a side repeats its run for about so long."""
    most_runs: int = 20
    """Of a turn."""
    wall_runs: int = 3
    """Of a turn, by the host's clock."""
    warm_ups: int = 4
    """Runs before the rounds, besides those that were checked."""


@dataclass(slots=True)
class SideResult:
    """What a side took. Times are of one run, medians over the rounds of medians of a turn."""

    name: str
    kind: Kind
    implementation: str = ""
    skipped: str = ""
    """Why it was not measured; then there are no times."""
    failed: bool = False
    """Whether it could have run and did not."""
    error: float | None = None
    """Of all rows together."""
    limit: float | None = None
    worst: float | None = None
    """Of the worst row."""
    worst_limit: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    ms: list[float] = field(default_factory=list)
    """Of each round. By the device's clock, from behind what was before to its end, the host being
    ahead if it can; where the host's clock counts, as ``wall_ms``."""
    wall_ms: list[float] = field(default_factory=list)
    """Of each round, by the host's clock, the device idle before and after."""
    faster: float | None = None
    """How many times our side is faster: the median, within rounds, of ratios of ``ms``."""
    faster_quartiles: tuple[float, float] | None = None
    withheld: str = ""
    """Why that is not told."""

    @property
    def wrong(self) -> bool:
        """Parity is red: the error is too large, or there is nothing to measure it by."""
        if self.kind is Kind.OTHER or self.error is None or self.worst is None:
            return False
        if self.limit is None or self.worst_limit is None:
            return True
        return not (self.error <= self.limit and self.worst <= self.worst_limit)

    @property
    def trouble(self) -> str:
        """What is wrong."""
        if not self.wrong or self.error is None or self.worst is None:
            return ""
        if self.limit is None or self.worst_limit is None:
            return f"its error is {self.error:.3g}, and plain PyTorch has none to compare with"
        return (
            f"its error is {self.error:.3g}, the limit {self.limit:.3g}; of the worst row "
            f"{self.worst:.3g}, the limit {self.worst_limit:.3g}"
        )

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.ms) if self.ms else None

    @property
    def median_wall_ms(self) -> float | None:
        return statistics.median(self.wall_ms) if self.wall_ms else None

    @property
    def tflops_per_s(self) -> float | None:
        took = self.median_ms
        return self.flops / took / 1e9 if took and self.flops else None

    @property
    def gb_per_s(self) -> float | None:
        took = self.median_ms
        return self.bytes / took / 1e6 if took and self.bytes else None


@dataclass(frozen=True, slots=True)
class CaseResult:
    name: str
    facts: Mapping[str, Any]
    ours: str
    sides: Sequence[SideResult]

    def side(self, name: str) -> SideResult | None:
        return next((side for side in self.sides if side.name == name), None)

    @property
    def red(self) -> Sequence[SideResult]:
        """Our sides that are wrong, or that failed."""
        ours = [side for side in self.sides if side.kind is Kind.OURS]
        return [side for side in ours if side.wrong or side.failed]

    def ratio(self, slow: str, fast: str) -> float | None:
        """How many times one side is faster than another, the median within rounds.

        None unless both are right and were measured.
        """
        one, other = self.side(slow), self.side(fast)
        if one is None or other is None or one.wrong or other.wrong:
            return None
        ratios = _ratios(one, other)
        return statistics.median(ratios) if ratios else None


def measure(
    case: Case,
    device: Device,
    settings: Settings = Settings(),
    advance: Callable[[str], None] = lambda step: None,
) -> CaseResult:
    """Checks all sides, times those that are right; ``advance`` is told of each step."""
    assert sum(entry.kind is Kind.PLAIN for entry in case.entries) <= 1
    results = {entry.name: SideResult(entry.name, entry.kind) for entry in case.entries}
    ready: dict[str, Side] = {}
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            advance(f"{case.name}: float32")
            right = [case.right(number) for number in range(case.sets)]
            for entry in case.entries:
                advance(f"{case.name}: {entry.name}")
                side = _checked(entry, results[entry.name], right, device)
                if side is not None:
                    ready[entry.name] = side
            _judge(results)
            timed = {name: side for name, side in ready.items() if not results[name].wrong}
            advance(f"{case.name}: rounds")
            _take_turns(case, timed, results, device, settings)
            # An error that has changed is a race.
            for name, side in timed.items():
                _check(side, results[name], right, device)
            _judge(results)
    finally:
        for side in ready.values():
            side.close()
        ready.clear()
        device.forget()
    for result in results.values():
        _compare(result, results[case.ours])
    return CaseResult(case.name, case.facts, case.ours, list(results.values()))


def _checked(
    entry: Entry, result: SideResult, right: Sequence[Tensor], device: Device
) -> Side | None:
    """The side, made and checked; None with a reason where it cannot run here."""
    side = None
    try:
        side = entry.make()
        result.implementation = side.implementation
        result.flops, result.bytes = side.flops, side.bytes
        _check(side, result, right, device)
    except PlanError as error:
        result.skipped = str(error)
    except torch.OutOfMemoryError:
        result.skipped = "there is not enough memory on the device"
    except Exception as error:
        # Compilers raise what they like; and one kernel that fails leaves the others to measure.
        result.skipped, result.failed = explained(error), True
    if not result.skipped:
        return side
    if side is not None:
        side.close()
    device.forget()
    return None


def explained(error: Exception) -> str:
    """What went wrong, and where, in one line."""
    lines = str(error).strip().splitlines() or [""]
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = place.filename.rpartition("/")[2]
    return f"{type(error).__name__} at {file}:{place.lineno}: {lines[0]}"


def _check(side: Side, result: SideResult, right: Sequence[Tensor], device: Device) -> None:
    """Runs a side on all inputs; keeps its largest error ever."""
    for number, expected in enumerate(right):
        side.poison()
        side.before(number)
        side.run(number)
        device.synchronize()
        output = side.output()
        if result.kind is Kind.OTHER:
            continue
        error = worst = float("inf")
        if output.shape == expected.shape:
            error = relative_error(output, expected)
            worst = worst_row(output, expected)
        result.error = max(error, result.error or 0.0)
        result.worst = max(worst, result.worst or 0.0)


def worst_row(output: Tensor, expected: Tensor) -> float:
    """|row - expected row| of the worst, by the root mean square of |expected row|."""
    rows, expected_rows = (x.flatten(0, -2).float() for x in (output, expected))
    scale = expected_rows.norm(dim=1).square().mean().sqrt()
    worst = float((rows - expected_rows).norm(dim=1).max() / scale)
    return worst if math.isfinite(worst) else float("inf")


def _judge(results: Mapping[str, SideResult]) -> None:
    plain = next((r for r in results.values() if r.kind is Kind.PLAIN), None)
    if plain is None or plain.error is None or plain.worst is None:
        return
    finite = math.isfinite(plain.error)
    for result in results.values():
        if result.kind is not Kind.OTHER:
            result.limit = SLACK * plain.error + FLOOR if finite else None
            result.worst_limit = SLACK * plain.worst + FLOOR if finite else None


def _take_turns(
    case: Case,
    sides: Mapping[str, Side],
    results: Mapping[str, SideResult],
    device: Device,
    settings: Settings,
) -> None:
    """Another side comes first in every round."""
    runs, sets = {}, case.sets
    for name, side in sides.items():
        took = _turn(side, range(settings.warm_ups), sets, device)[-1]
        runs[name] = max(1, min(settings.most_runs, int(settings.slice_ms / max(took, 1e-3))))
    names, done = list(sides), 0
    for number in range(settings.rounds):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            side, result = sides[name], results[name]
            walls = [_wall_ms(side, (done + i) % sets, device) for i in range(settings.wall_runs)]
            result.wall_ms.append(statistics.median(walls))
            found = walls
            if not case.by_host:
                found = _turn(side, range(done, done + runs[name]), sets, device)
            result.ms.append(statistics.median(found))
        done += max(runs.values(), default=0)


def _turn(side: Side, numbers: range, sets: int, device: Device) -> list[float]:
    """Milliseconds of runs that follow each other, by the device's clock."""
    stamps = []
    for number in numbers:
        side.before(number % sets)
        begin = device.stamp()
        side.run(number % sets)
        stamps.append((begin, device.stamp()))
    device.synchronize()
    return [device.milliseconds(begin, end) for begin, end in stamps]


def _wall_ms(side: Side, number: int, device: Device) -> float:
    side.before(number)
    device.synchronize()
    started = time.perf_counter()
    side.run(number)
    device.synchronize()
    return (time.perf_counter() - started) * 1e3


def _compare(result: SideResult, ours: SideResult) -> None:
    """Fills in how many times our side is faster, or why that is not told."""
    if result is ours or not (result.ms or result.wrong):
        return
    if wrong := [side.name for side in (result, ours) if side.wrong]:
        result.withheld = f"{' and '.join(wrong)} wrong"
    elif not ours.ms:
        result.withheld = f"{ours.name} was not measured"
    else:
        ratios = _ratios(result, ours)
        result.faster = statistics.median(ratios)
        result.faster_quartiles = quartiles(ratios)


def _ratios(slow: SideResult, fast: SideResult) -> Sequence[float]:
    if not slow.ms or not fast.ms:
        return []
    return [theirs / mine for theirs, mine in zip(slow.ms, fast.ms, strict=True)]
