"""The command ``gr bench-stack``. Imports click alone; torch waits for a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gr_core.cli.output import progress, table
from gr_core.errors import UserError

if TYPE_CHECKING:
    from gr_kernels.benchmark.measure import PointResult, Settings
    from gr_kernels.benchmark.peers import Side
    from gr_kernels.benchmark.points import Point
    from gr_kernels.benchmark.report import Report

_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(name="bench-stack")
@click.option(
    "--point",
    "labels",
    multiple=True,
    metavar="LAYERS/WIDTH/HISTORY/CANDIDATES",
    help="Only this point, e.g. 4/256/2048/256, 4/256/8x1024/64, 4/256/2000+48/256; repeatable.",
)
@click.option("--side", "names", multiple=True, help="Only this side; repeatable.")
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=15, show_default=True, help="At most."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600, min_open=True),
    default=5.0,
    show_default=True,
    help="For each side at each point; slow sides take part in fewer rounds.",
)
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Measure memory as well."
)
@click.option(
    "--growth",
    is_flag=True,
    help="Measure how time grows with history and candidates, instead of the grid.",
)
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write all measurements.")
@click.option("--markdown", "markdown_file", type=_FILE, metavar="FILE", help="Write the tables.")
def bench_stack(
    labels: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    seconds: float,
    threads: int,
    memory: bool,
    growth: bool,
    json_file: Path | None,
    markdown_file: Path | None,
) -> int:
    """Measure HSTU layers: the native stack beside PyTorch, its compiler, ONNX Runtime.

    In process, the sides in turns within each round. Parity with float32 comes first: no speed-up
    is shown for what is wrong, and the command then ends with 1. Files are written at the end,
    whole or not at all.
    """
    for file in (json_file, markdown_file):
        if file is not None:
            _check_writable(file)
    if growth and labels:
        raise UserError("--growth has points of its own; leave out --point or --growth")
    from gr_kernels.benchmark.points import GRID, Point

    try:
        points = [Point.parse(label) for label in labels] or list(GRID)
    except ValueError as error:
        raise UserError(str(error)) from error

    from gr_kernels.benchmark import peers
    from gr_kernels.benchmark.growth import SIDES as GROWTH_SIDES
    from gr_kernels.benchmark.machine import describe, gemm_gflops_per_s, keep_freed_memory
    from gr_kernels.benchmark.measure import Settings
    from gr_kernels.benchmark.report import Report, json_text, write

    sides = _chosen(names, peers.SIDES) if names else GROWTH_SIDES if growth else peers.SIDES
    settings = Settings(rounds=rounds, seconds=seconds, threads=threads)
    kept = keep_freed_memory()
    machine, rates = describe(), gemm_gflops_per_s(threads)
    series = _growth(settings, sides) if growth else _grid(points, settings, sides, memory)
    report = Report(machine, rates, kept, settings, series)
    _print(report)
    files = {}
    if json_file is not None:
        files[json_file] = json_text(report)
    if markdown_file is not None:
        files[markdown_file] = report.as_markdown()
    write(files)
    for point, side in report.wrong:
        click.echo(
            f"wrong: {side.name} at {point.point.label}: its error is {side.error:.2g}, "
            f"the limit {side.limit:g}",
            err=True,
        )
    return 1 if report.wrong else 0


def _check_writable(file: Path) -> None:
    """Before the measurements rather than after them."""
    folder = file.absolute().parent
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{file} cannot be written: {there} is not a folder to write to")


def _chosen(names: Sequence[str], sides: Sequence[type[Side]]) -> Sequence[type[Side]]:
    known = {kind.name: kind for kind in sides}
    for name in names:
        if name not in known:
            raise UserError(f"there is no side {name!r}; there are: {', '.join(known)}")
    return [kind for kind in sides if kind.name in names]


def _grid(
    points: Sequence[Point], settings: Settings, sides: Sequence[type[Side]], memory: bool
) -> Mapping[str, Sequence[PointResult]]:
    from gr_kernels.benchmark.measure import measure_point
    from gr_kernels.benchmark.report import GRID, point_table

    results = []
    steps = sum(1 + len(_at(point, sides)) for point in points) + (len(sides) if memory else 0)
    with progress(steps, "measuring") as advance:
        for point in points:
            result = measure_point(point, sides, settings, advance)
            table(*point_table(result), title=_title(result))
            results.append(result)
        if memory:
            _add_memory(results, settings.threads, advance)
    return {GRID: results}


def _at(point: Point, sides: Sequence[type[Side]]) -> Sequence[type[Side]]:
    return [kind for kind in sides if point.cached or not kind.recomputes]


def _title(result: PointResult) -> str:
    point = result.point
    lengths = ", ".join(map(str, point.lengths))
    cached = f"{point.cached} cached, " if point.cached else ""
    target = "" if result.target_ms is None else f"; target with AMX {result.target_ms:g} ms"
    return (
        f"{point.label}: {cached}history {lengths}, {point.candidates} candidates, "
        f"{point.gflops(all_rows=False):.1f} GFLOP{target}"
    )


def _add_memory(
    results: Sequence[PointResult], threads: int, advance: Callable[[str], None]
) -> None:
    from gr_kernels.benchmark.memory import peak_bytes

    names = dict.fromkeys(
        side.name for result in results for side in result.sides if not side.skipped
    )
    for name in names:
        advance(f"memory of {name}")
        ran = [r for r in results if (side := r.side(name)) is not None and not side.skipped]
        measured, trouble = peak_bytes(name, [r.point.label for r in ran], threads)
        if trouble:
            click.echo(f"memory of {name} was not measured everywhere: {trouble}", err=True)
        for result in ran:
            side = result.side(name)
            assert side is not None
            side.peak_bytes = measured.get(result.point.label)


def _growth(settings: Settings, sides: Sequence[type[Side]]) -> Mapping[str, Sequence[PointResult]]:
    from gr_kernels.benchmark.growth import SERIES, measure_growth

    steps = sum(len(points) * (1 + len(sides)) for points in SERIES.values())
    with progress(steps, "measuring") as advance:
        return measure_growth(settings, sides, advance=advance)


def _print(report: Report) -> None:
    from gr_kernels.benchmark import report as tables

    table(*report.machine_table())
    for name, points in report.series.items():
        title = f"\n{name}: CPU milliseconds"
        if name == tables.GRID:
            table(*report.times_table(points), title=title)
            if any(point.demands for point in points):
                title = "\nHow many times faster the native side is"
                table(*report.demands_table(points), title=title)
        else:
            table(*tables.growth_table(points), title=title)
            table(*tables.doubling_table(points), title=f"\n{name}: times the point before")
    for reason in report.reasons():
        click.echo(f"not measured: {reason}", err=True)
