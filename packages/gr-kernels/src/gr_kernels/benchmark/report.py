"""What was measured, as tables for people, Markdown for pages and JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gr_kernels.benchmark.measure import Demand, PointResult, Settings, SideResult

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Names of columns, and rows."""

GRID = "grid"
"""The name of the series whose points have targets."""

_NATIVE = "native-bf16"
_AT_GEMM_RATE = "at GEMM rate"


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the benchmark."""

    machine: Mapping[str, Any]
    gemm_gflops_per_s: Mapping[str, float]
    keeps_freed_memory: bool
    settings: Settings
    series: Mapping[str, Sequence[PointResult]]
    """Points by what they have in common: `GRID`, or the series of `growth`."""
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def points(self) -> Sequence[PointResult]:
        return [point for points in self.series.values() for point in points]

    @property
    def wrong(self) -> Sequence[tuple[PointResult, SideResult]]:
        return [(point, side) for point in self.points for side in point.sides if side.wrong]

    def as_json(self) -> Mapping[str, Any]:
        return {
            "what": "HSTU layers: the native stack beside what else computes such layers",
            "when": self.when,
            "machine": self.machine,
            "gemm_gflops_per_s": self.gemm_gflops_per_s,
            "keeps_freed_memory": self.keeps_freed_memory,
            "settings": dataclasses.asdict(self.settings),
            "series": {
                name: [_point_as_json(point) for point in points]
                for name, points in self.series.items()
            },
        }

    def as_markdown(self) -> str:
        """Sections that pages quote by their headings."""
        sections = {"Machine": ("", self.machine_table()), **self._sections()}
        parts = [f"# {self._title}\n"]
        for heading, (words, table) in sections.items():
            parts.append(f"## {heading}\n\n" + (f"{words}\n\n" if words else "") + markdown(table))
        if reasons := self.reasons():
            parts.append("## Not measured\n\n" + "".join(f"- {reason}\n" for reason in reasons))
        return "\n".join(parts)

    @property
    def _title(self) -> str:
        return "The native stack on the work grid" if self._is_grid else "How time grows"

    @property
    def _is_grid(self) -> bool:
        return GRID in self.series

    def _sections(self) -> Mapping[str, tuple[str, Table]]:
        if not self._is_grid:
            return {
                heading: section
                for name, points in self.series.items()
                for heading, section in (
                    (
                        name.capitalize(),
                        ("Milliseconds of processor time, medians.", growth_table(points)),
                    ),
                    (
                        f"{name.capitalize()} doubled",
                        (
                            "Processor time to that of the point before: 2 where time is linear, "
                            "4 where it is quadratic.",
                            doubling_table(points),
                        ),
                    ),
                )
            }
        points = self.points
        return {
            "Processor time": (
                "Milliseconds of processor time, medians. The target is for a processor with AMX; "
                f"'{_AT_GEMM_RATE}' is what the arithmetic of {_NATIVE} takes at this machine's "
                "rate of matrix products in bf16, nothing else counted.",
                self.times_table(points),
            ),
            "Speed-up": (
                f"How many times {_NATIVE} is faster, beside what is demanded, and what the ratio "
                f"would be '{_AT_GEMM_RATE}'; the middle half of the rounds in brackets.",
                self.demands_table(points),
            ),
            "Against each side": (
                "How many times the native side of the same precision is faster.",
                grid_table(points, _ratio),
            ),
            "Error": (
                "Relative to float32, in the Euclidean norm of the candidates' rows.",
                grid_table(points, lambda side: _number(side.error, ".2g")),
            ),
            "Rate": (
                "GFLOP/s that the work needs, by the processor time that it took.",
                grid_table(points, lambda side: _number(side.gflops_per_s, ".0f")),
            ),
            "Wall time": (
                "Milliseconds, medians.",
                grid_table(points, lambda side: _milliseconds(side.wall_ms)),
            ),
            "Memory": (
                "MiB that a run needs besides weights, input and mask.",
                grid_table(points, lambda side: _mebibytes(side.peak_bytes)),
            ),
        }

    def times_table(self, points: Sequence[PointResult]) -> Table:
        """Times of all sides, the targets, and what this machine's matrix products allow."""
        columns, rows = growth_table(points)
        shown = []
        for point, row in zip(points, rows, strict=True):
            native = point.side(_NATIVE)
            target = point.target_ms
            met = ""
            if target is not None and native is not None and native.cpu_ms is not None:
                met = _verdict(native.cpu_ms <= target and not native.wrong)
            floor_ms = self._at_gemm_rate_ms(point)
            shown.append((*row, _milliseconds(floor_ms), _milliseconds(target), met))
        return (*columns, _AT_GEMM_RATE, "target", "met"), shown

    def _at_gemm_rate_ms(self, point: PointResult) -> float:
        work = point.point.gflops(all_rows=False)
        return work / self.gemm_gflops_per_s["bfloat16"] * 1e3

    def demands_table(self, points: Sequence[PointResult]) -> Table:
        """The ratios that are demanded, columns for each side that they concern."""
        names = list(dict.fromkeys(d.side for point in points for d in point.demands))
        columns = ["point"]
        for name in names:
            columns += [f"{name} / {_NATIVE}", "demanded", "met", _AT_GEMM_RATE]
        rows = []
        for point in points:
            demands = {demand.side: demand for demand in point.demands}
            row = [point.point.label]
            for name in names:
                side = point.side(name)
                if side is None or side.cpu_ms is None:
                    row += ["", *_demand_cells(demands.get(name)), ""]
                    continue
                possible = side.cpu_ms / self._at_gemm_rate_ms(point)
                row += [_ratio(side), *_demand_cells(demands.get(name)), f"{possible:.2f}"]
            rows.append(row)
        return columns, rows

    def machine_table(self) -> Table:
        """What the figures were taken on, and how."""
        facts: dict[str, Any] = {
            "when": self.when,
            **self.machine,
            **{
                f"matrix product 2048³, {dtype}": f"{rate:.0f} GFLOP/s"
                for dtype, rate in self.gemm_gflops_per_s.items()
            },
            "threads": self.settings.threads,
            "malloc": "keeps freed memory" if self.keeps_freed_memory else "as the system has it",
            "rounds": f"at most {self.settings.rounds}, or {self.settings.seconds:g} s for a side "
            "at a point",
            "native-bf16": ", ".join(
                dict.fromkeys(s.implementation for s in self._natives() if s.implementation)
            ),
        }
        return ("what", "here"), [
            (name, " ".join(value) if isinstance(value, list) else str(value))
            for name, value in facts.items()
        ]

    def _natives(self) -> Sequence[SideResult]:
        return [side for point in self.points if (side := point.side(_NATIVE)) is not None]

    def reasons(self) -> Sequence[str]:
        """Why sides have no figures, each reason once."""
        found: dict[tuple[str, str], list[str]] = {}
        for point in self.points:
            for side in point.sides:
                if side.skipped:
                    found.setdefault((side.name, side.skipped), []).append(point.point.label)
        return [
            f"{name}: {reason}" + ("" if len(at) == len(self.points) else f" ({', '.join(at)})")
            for (name, reason), at in found.items()
        ]


def _point_as_json(result: PointResult) -> Mapping[str, Any]:
    point = result.point
    return {
        "point": point.label,
        **dataclasses.asdict(point),
        "lengths": point.lengths,
        "gflops": point.gflops(all_rows=False),
        "gflops_all_rows": point.gflops(all_rows=True),
        "target_ms": result.target_ms,
        "sides": [_side_as_json(side) for side in result.sides],
        "demands": [{**dataclasses.asdict(d), "met": d.met} for d in result.demands],
    }


def _side_as_json(side: SideResult) -> Mapping[str, Any]:
    fields = dataclasses.asdict(side)
    if side.error is not None and not math.isfinite(side.error):
        fields["error"] = None  # which JSON has no number for
    return {**fields, "wrong": side.wrong}


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────


def point_table(result: PointResult) -> Table:
    """Everything about one point, a row for each side."""
    columns = (
        "side", "CPU ms", "middle half", "wall ms", "native is faster", "error", "GFLOP/s",
        "MiB", "rounds", "what ran",
    )  # fmt: skip
    rows = []
    for side in result.sides:
        if side.skipped:
            rows.append((side.name, *[""] * 8, f"not measured: {side.skipped}"))
            continue
        rows.append(
            (
                side.name,
                _milliseconds(side.cpu_ms),
                "–".join(map(_milliseconds, side.cpu_ms_quartiles or ())),
                _milliseconds(side.wall_ms),
                _ratio(side),
                _error(side),
                _number(side.gflops_per_s, ".0f"),
                _mebibytes(side.peak_bytes),
                str(side.rounds),
                side.implementation,
            )
        )
    return columns, rows


def growth_table(points: Sequence[PointResult]) -> Table:
    return grid_table(points, lambda side: _milliseconds(side.cpu_ms))


def _demand_cells(demand: Demand | None) -> tuple[str, str]:
    if demand is None:
        return "", ""
    return f"{demand.ratio:g}", "" if demand.met is None else _verdict(demand.met)


def grid_table(points: Sequence[PointResult], cell: Callable[[SideResult], str]) -> Table:
    """A row for each point, a column for each side that has something to show somewhere."""
    names = dict.fromkeys(side.name for point in points for side in point.sides)
    cells = {
        name: ["" if (s := point.side(name)) is None else cell(s) for point in points]
        for name in names
    }
    shown = {name: column for name, column in cells.items() if any(column)}
    rows = [
        [point.point.label, *(column[i] for column in shown.values())]
        for i, point in enumerate(points)
    ]
    return ["point", *shown], rows


def doubling_table(points: Sequence[PointResult]) -> Table:
    """For each point and side, its processor time by that of the point before."""

    def grown(index: int, name: str) -> str:
        now, before = points[index].side(name), points[index - 1].side(name)
        if index == 0 or now is None or before is None or not now.cpu_ms or not before.cpu_ms:
            return ""
        return f"{now.cpu_ms / before.cpu_ms:.2f}"

    names = list(dict.fromkeys(side.name for point in points for side in point.sides))
    rows = [
        [point.point.label, *(grown(i, name) for name in names)] for i, point in enumerate(points)
    ]
    return ["point", *names], rows[1:]


def markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _ratio(side: SideResult) -> str:
    if side.faster is None or side.faster_quartiles is None:
        return side.withheld
    low, high = side.faster_quartiles
    return f"{side.faster:.2f} ({low:.2f}–{high:.2f})"


def _error(side: SideResult) -> str:
    if side.error is None:
        return "another function"
    if side.wrong:
        return f"{side.error:.2g}, WRONG: limit {side.limit:g}"
    return f"{side.error:.2g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


# ── Files ────────────────────────────────────────────────────────────────────────────────────────


def write(files: Mapping[Path, str]) -> None:
    """Writes files whole: at any time each is as it was or as it shall be."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def json_text(report: Report) -> str:
    return json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n"
