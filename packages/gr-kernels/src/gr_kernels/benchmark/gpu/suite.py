"""The points that are measured, and the order in which that happens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from gr_kernels import choice
from gr_kernels.benchmark.gpu import attention, from_host, layers, tables
from gr_kernels.benchmark.gpu.attention import AttentionPoint
from gr_kernels.benchmark.gpu.ceilings import Ceilings, measure_ceilings
from gr_kernels.benchmark.gpu.device import Device
from gr_kernels.benchmark.gpu.layers import LayersPoint, Part, mixed_lengths, point
from gr_kernels.benchmark.gpu.measure import Case, CaseResult, Settings, explained, measure
from gr_kernels.benchmark.gpu.tables import GatherPoint, TopkPoint

STACK, RETURNING, HOST = "stack", "returning", "host"
ATTENTION, TABLES = "attention", "tables"
SERIES = (STACK, RETURNING, HOST, ATTENTION, TABLES)

AIM_MS = 7.0
"""For the dense stack of DLRMv3; 9.30 ms are published for Meta's Triton kernels on an H100."""
AIM_RATIO = 7.7
"""How many times faster a batch of 8 users is with 3968 of 4096 tokens cached."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All sizes."""

    stack: Sequence[LayersPoint]
    returning: Sequence[LayersPoint]
    host: Sequence[LayersPoint]
    attention: Sequence[AttentionPoint]
    gather: Sequence[GatherPoint]
    topk: Sequence[TopkPoint]
    matrix: int = 8192
    copied: int = 2**30
    sets: int = 2
    """Of inputs that take turns; twice as many where one user's are computed."""


DENSE = point(5, 512, mixed_lengths(32, 1024), 2048)
"""DLRMv3's, ranking variant."""


def _returning(users: int, cached: int = 3968) -> LayersPoint:
    return point(8, 1024, [128] * users, 256, cached)


def _attention(lengths: Sequence[int], columns: Sequence[int]) -> Sequence[AttentionPoint]:
    return [AttentionPoint(n, max(1, 32768 // n), d) for d in columns for n in lengths]


FULL = Plan(
    stack=[DENSE],
    returning=[_returning(1), _returning(8)],
    host=[_returning(users, c) for users in (1, 8) for c in (256, 512, 1024, 2048, 3968)],
    attention=_attention((1024, 2048, 4096, 8192), (128, 256)),
    gather=[GatherPoint(26, 200_000, 128, tokens) for tokens in (2048, 65536)],
    topk=[TopkPoint(1_000_000, 256, users, 100) for users in (1, 32, 256)],
)
QUICK = replace(
    FULL,
    host=[_returning(8, cached) for cached in (512, 3968)],
    attention=_attention((2048,), (128, 256)),
    gather=FULL.gather[:1],
    topk=FULL.topk[1:2],
)


@dataclass(slots=True)
class Outcome:
    """Everything that was found out."""

    settings: Settings
    machine: dict[str, str] = field(default_factory=dict)
    machine_after: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    series: dict[str, list[tuple[LayersPoint | None, CaseResult]]] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    host_gb_per_s: float | None = None
    """Copied from the host's pinned memory in blocks, where that is of interest."""
    chosen: list[str] = field(default_factory=list)
    """Which implementations ran at which sizes, and why, as `gr_kernels.choice` logs it."""
    broken: list[str] = field(default_factory=list)
    """What ended before it was measured, and why."""
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def cases(self) -> Sequence[CaseResult]:
        return [case for series in self.series.values() for _, case in series]

    @property
    def red(self) -> Sequence[str]:
        """What of ours is wrong or failed, one sentence each."""
        found = []
        for case in self.cases:
            for side in case.red:
                found.append(f"{case.name}: {side.name}: {side.skipped or side.trouble}")
        return found


def run(
    plan: Plan,
    device: Device,
    settings: Settings,
    only: Sequence[str] = SERIES,
    advance: Callable[[str], None] = lambda step: None,
    tell: Callable[[CaseResult], None] = lambda case: None,
) -> Outcome:
    """Measures everything, one case after another; ``tell`` is told of each when it is done."""
    outcome = Outcome(settings, dict(device.describe()))
    advance("ceilings")
    outcome.ceilings = measure_ceilings(
        device, settings.rounds, size=plan.matrix, copied=plan.copied
    )
    if HOST in only and plan.host:
        try:
            outcome.host_gb_per_s = device.host_copies() / 1e9
        except Exception as error:
            outcome.broken.append(f"copies from the host: {explained(error)}")
    with _told(outcome.chosen):
        _run(plan, device, only, advance, tell, outcome)
    outcome.machine_after = dict(device.describe())
    return outcome


def _run(
    plan: Plan,
    device: Device,
    only: Sequence[str],
    advance: Callable[[str], None],
    tell: Callable[[CaseResult], None],
    outcome: Outcome,
) -> None:
    settings = outcome.settings
    for series, of, name, make in _cases(plan, device):
        if series not in only:
            continue
        found = outcome.series.setdefault(series, [])
        try:
            case = measure(make(), device, settings, advance)
        except Exception as error:
            outcome.broken.append(f"{name}: {explained(error)}")
            device.forget()
            continue
        found.append((of, case))
        tell(case)
    if STACK in only and plan.stack:
        advance("kernel by kernel")
        try:
            outcome.parts = layers.breakdown(plan.stack[0], device, settings.rounds)
        except Exception as error:
            outcome.broken.append(f"kernel by kernel: {explained(error)}")


@contextmanager
def _told(chosen: list[str]) -> Iterator[None]:
    """Collects what is logged of choices."""

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            chosen.append(record.getMessage())

    logger, handler = logging.getLogger(choice.__name__), Collecting()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _cases(
    plan: Plan, device: Device
) -> Iterator[tuple[str, LayersPoint | None, str, Callable[[], Case]]]:
    """Series, point, name, and how a case is made: not before its turn, for the memory."""
    for of in plan.stack:
        name = f"{of.layers} layers of {of.width}, batch {of.users}"
        yield STACK, of, name, partial(layers.case, of, device, sets=plan.sets, name=name)
    for of in plan.returning:
        name = f"{of.cached} tokens cached, batch {of.users}"
        sets = plan.sets * (2 if of.users == 1 else 1)
        yield RETURNING, of, name, partial(layers.case, of, device, sets=sets, name=name)
    for of in plan.host:
        name = f"{of.cached} tokens from the host, batch {of.users}"
        yield HOST, of, name, partial(from_host.case, of, device, name=name)
    for at in plan.attention:
        yield ATTENTION, None, at.name, partial(attention.case, at, device)
    for rows in plan.gather:
        yield TABLES, None, rows.name, partial(tables.gather_case, rows, device)
    for items in plan.topk:
        yield TABLES, None, items.name, partial(tables.topk_case, items, device)
