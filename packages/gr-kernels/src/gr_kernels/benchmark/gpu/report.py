"""What was measured, as Markdown for people and pages and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gr_kernels.benchmark.gpu import layers
from gr_kernels.benchmark.gpu.attention import CUDNN, FLASH
from gr_kernels.benchmark.gpu.attention import OP as ATTENTION_OP
from gr_kernels.benchmark.gpu.ceilings import Ceilings
from gr_kernels.benchmark.gpu.from_host import FIRST, OVERLAPPED, break_even
from gr_kernels.benchmark.gpu.layers import ANEW, ANEW_REPLAYED, OURS, REPLAYED, LayersPoint
from gr_kernels.benchmark.gpu.measure import CaseResult, Kind, SideResult
from gr_kernels.benchmark.gpu.suite import (
    AIM_MS,
    AIM_RATIO,
    ATTENTION,
    HOST,
    RETURNING,
    STACK,
    TABLES,
    Outcome,
)
from gr_kernels.benchmark.measure import quartiles
from gr_kernels.benchmark.report import Table, markdown

TITLES = {
    STACK: "The dense stack of DLRMv3",
    RETURNING: "Returning users",
    HOST: "From the host's memory",
    ATTENTION: "Attention alone",
    TABLES: "Tables and items",
}
_PUBLISHED = (
    "Published for such a stack: 9.30 ms on an H100 with Meta's Triton kernels. The lengths of its "
    "histories are not published beyond their mean."
)


def as_markdown(outcome: Outcome) -> str:
    """Sections that pages quote by their headings. No speed-up of what is wrong, or by it."""
    parts = ["# HSTU layers on a GPU\n"]
    if outcome.red:
        parts.append(
            "**Parity is red**; what is wrong is not timed, and nothing is compared with it:\n\n"
            + "".join(f"- {sentence}\n" for sentence in outcome.red)
        )
    parts.append("## Machine\n\n" + markdown(machine_table(outcome)))
    parts.append("## Targets\n\n" + markdown(targets_table(outcome)))
    for series, title in TITLES.items():
        if not (found := outcome.series.get(series)):
            continue
        parts.append(f"## {title}\n")
        if series == STACK:
            parts.append(_PUBLISHED + "\n")
        summary = {HOST: host_table, ATTENTION: attention_table}.get(series)
        if summary is not None:
            parts.append(markdown(summary(found)))
        if series == HOST:
            parts.append("By the host's clock, finding the blocks included.\n")
            parts += [
                f"Copying from the host takes less time than computing, batch {batch}: {verdict}.\n"
                for batch, verdict in break_even(_with_points(found)).items()
            ]
        for _, case in found:
            parts.append(f"### {case.name}\n")
            parts.append(_facts(case.facts) + "\n")
            parts.append(markdown(case_table(case, outcome.ceilings)))
        if series == STACK and outcome.parts:
            parts.append("### Kernel by kernel\n")
            parts.append("One layer that computes all rows, medians over layers and rounds.\n")
            parts.append(markdown(parts_table(outcome)))
    if outcome.chosen:
        parts.append("## What ran\n\n" + "".join(f"- {line}\n" for line in outcome.chosen))
    if left := reasons(outcome):
        parts.append("## Not measured\n\n" + "".join(f"- {reason}\n" for reason in left))
    return "\n".join(parts)


def machine_table(outcome: Outcome) -> Table:
    facts = dict(outcome.machine)
    for name, value in outcome.machine_after.items():
        if facts.get(name) != value:
            facts[f"{name}, at the end"] = value
    if (ceilings := outcome.ceilings) is not None:
        facts[f"matrix product {ceilings.size}³, bfloat16"] = f"{ceilings.tflops_per_s:.0f} TFLOP/s"
        facts["copy on the device"] = f"{ceilings.gb_per_s:.0f} GB/s"
    if outcome.host_gb_per_s is not None:
        facts["copies from the host's pinned memory"] = f"{outcome.host_gb_per_s:.1f} GB/s"
    facts["rounds"] = str(outcome.settings.rounds)
    facts["when"] = outcome.when
    return ("what", "here"), list(facts.items())


def targets_table(outcome: Outcome) -> Table:
    """What was aimed at for a GPU of the class of an H200, and what this one reached."""
    rows = []
    for _, case in outcome.series.get(STACK, ()):
        ours = case.side(OURS)
        took = None if ours is None or ours.wrong else ours.median_ms
        met = "" if took is None else _verdict(took <= AIM_MS)
        rows.append((case.name, f"at most {AIM_MS:g} ms", _ms(took), met))
    for point, case in outcome.series.get(RETURNING, ()):
        if point is None:
            continue
        ratio = cached_ratio(case)
        demanded = f"at least {AIM_RATIO:g} times faster than anew" if point.users == 8 else ""
        met = _verdict(ratio >= AIM_RATIO) if ratio is not None and demanded else ""
        rows.append((case.name, demanded, "" if ratio is None else f"{ratio:.2f} times", met))
    return ("what", "aim", "measured", "met"), rows


def cached_ratio(case: CaseResult) -> float | None:
    """The fastest that computes everything, by the fastest that has K and V at hand."""
    if case.red:
        return None

    def fastest(*names: str) -> str:
        sides = [side for name in names if (side := case.side(name)) is not None and side.ms]
        return min(sides, key=lambda side: statistics.median(side.ms)).name if sides else ""

    return case.ratio(fastest(ANEW, ANEW_REPLAYED), fastest(OURS, REPLAYED))


def case_table(case: CaseResult, ceilings: Ceilings | None) -> Table:
    """Everything about one case, a row for each side."""
    columns = (
        "side", "ms", "middle half", "wall ms", f"{case.ours} is faster", "error", "worst row",
        "TFLOP/s", "of the ceiling", "GB/s",
    )  # fmt: skip
    rows = []
    for side in case.sides:
        if side.skipped:
            rows.append((side.name, "not measured", *[""] * 8))
            continue
        shown = side.ms if not side.wrong else []
        rate = side.tflops_per_s if shown else None
        of_ceiling = ""
        if rate is not None and ceilings is not None:
            of_ceiling = f"{100 * rate / ceilings.tflops_per_s:.0f} %"
        rows.append(
            (
                side.name,
                _ms(statistics.median(shown) if shown else None),
                "–".join(map(_ms, quartiles(shown))) if shown else "",
                _ms(side.median_wall_ms if shown else None),
                _ratio(side),
                _error(side),
                "" if side.worst is None else f"{side.worst:.2g}",
                "" if rate is None else f"{rate:.0f}",
                of_ceiling,
                "" if side.gb_per_s is None or not shown else f"{side.gb_per_s:.0f}",
            )
        )
    return columns, rows


def host_table(found: Sequence[tuple[LayersPoint | None, CaseResult]]) -> Table:
    """Milliseconds by where K and V come from."""
    names = {
        OURS: "on the device",
        OVERLAPPED: "from the host, layer by layer",
        FIRST: "from the host, copied first",
        ANEW: "computed anew",
    }
    columns = ("batch", "cached tokens", *names.values(), "anew by layer by layer")
    rows = []
    for point, case in _with_points(found):
        ratio = case.ratio(ANEW, OVERLAPPED)
        cells = [_time(case, name) for name in names]
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append((str(point.users), str(point.cached), *cells, shown))
    return columns, rows


def attention_table(found: Sequence[tuple[LayersPoint | None, CaseResult]]) -> Table:
    """Milliseconds, and how many times each kernel is faster than softmax attention."""
    kernels = list(dict.fromkeys(s.name for _, c in found for s in c.sides if s.kind is Kind.OURS))
    columns = ["attention", layers.PLAIN, FLASH, CUDNN]
    for name in kernels:
        short = name.removeprefix(f"{ATTENTION_OP}-")
        columns += [f"HSTU, {short}", f"faster than {FLASH}", f"than {CUDNN}"]
    rows = []
    for _, case in found:
        row = [case.name, *(_time(case, name) for name in (layers.PLAIN, FLASH, CUDNN))]
        for name in kernels:
            ratios = [case.ratio(softmax, name) for softmax in (FLASH, CUDNN)]
            row += [_time(case, name), *("" if r is None else f"{r:.2f}" for r in ratios)]
        rows.append(row)
    return columns, rows


def parts_table(outcome: Outcome) -> Table:
    rows = [(part.name, _ms(part.ms), part.rate) for part in outcome.parts]
    rows.append(("together", _ms(sum(part.ms for part in outcome.parts)), ""))
    return ("kernel", "ms", "rate"), rows


def reasons(outcome: Outcome) -> Sequence[str]:
    """Why there are no figures, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in outcome.cases:
        for side in case.sides:
            if side.skipped:
                found.setdefault((side.name, side.skipped), []).append(case.name)
    left = [f"{name}: {reason} ({'; '.join(at)})" for (name, reason), at in found.items()]
    return [*outcome.broken, *left]


def json_text(outcome: Outcome) -> str:
    raw = {
        "what": "HSTU layers on a GPU: gr-kernels beside what else computes them",
        "when": outcome.when,
        "machine": outcome.machine,
        "machine_after": outcome.machine_after,
        "settings": dataclasses.asdict(outcome.settings),
        "ceilings": outcome.ceilings and dataclasses.asdict(outcome.ceilings),
        "red": outcome.red,
        "broken": outcome.broken,
        "series": {
            name: [_case_as_json(point, case) for point, case in found]
            for name, found in outcome.series.items()
        },
        "host_gb_per_s": outcome.host_gb_per_s,
        "chosen": outcome.chosen,
        "kernel_by_kernel": [dataclasses.asdict(part) for part in outcome.parts],
    }
    return json.dumps(raw, indent=1, allow_nan=False) + "\n"


def _case_as_json(point: LayersPoint | None, case: CaseResult) -> Mapping[str, Any]:
    return {
        "case": case.name,
        "facts": dict(case.facts),
        "point": point and dataclasses.asdict(point),
        "ours": case.ours,
        "sides": [_side_as_json(side) for side in case.sides],
    }


def _side_as_json(side: SideResult) -> Mapping[str, Any]:
    raw = dataclasses.asdict(side) | {"kind": side.kind.value, "wrong": side.wrong}
    for name in ("error", "limit", "worst", "worst_limit"):
        if raw[name] is not None and not math.isfinite(raw[name]):
            raw[name] = None  # which JSON has no number for
    return raw


def _with_points(
    found: Sequence[tuple[LayersPoint | None, CaseResult]],
) -> Sequence[tuple[LayersPoint, CaseResult]]:
    return [(point, case) for point, case in found if point is not None]


def _facts(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in facts.items()) + "."


def _time(case: CaseResult, name: str) -> str:
    side = case.side(name)
    if side is None or side.skipped:
        return ""
    return "wrong" if side.wrong else _ms(side.median_ms)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _ms(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def _ratio(side: SideResult) -> str:
    if side.faster is None or side.faster_quartiles is None:
        return side.withheld
    low, high = side.faster_quartiles
    return f"{side.faster:.2f} ({low:.2f}–{high:.2f})"


def _error(side: SideResult) -> str:
    if side.kind is Kind.OTHER:
        return "another function"
    if side.error is None:
        return ""
    if side.wrong:
        return f"WRONG: {side.trouble}"
    return f"{side.error:.2g}"
