"""Launches of the points' sizes, measured before the points are: what `gr kernels tune` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gr_kernels import tuning
from gr_kernels.benchmark.gpu.layers import DTYPE, LayersPoint, point
from gr_kernels.benchmark.work import make_work
from gr_kernels.tune import Case, Timer, best, cases
from gr_kernels.tuning import power_of_two


def rows_and_queries(points: Sequence[LayersPoint]) -> tuple[list[int], list[int]]:
    """Numbers of rows that are projected at once, and of queries of a sequence, as tables have
    them: of all tokens and of the candidates, with what is cached and anew."""
    rows: set[int] = set()
    queries: set[int] = set()
    for of in points:
        for one in {of, of.recomputed}:
            tokens = one.tokens
            rows |= {tokens, one.users * one.candidates}
            # A graph is recorded as if one sequence had all tokens.
            queries |= {max(one.lengths) + one.candidates, tokens if of.cached else 0}
    return (
        sorted({power_of_two(count, least=16, most=65536) for count in rows}),
        sorted({power_of_two(count, least=16, most=4096) for count in queries if count}),
    )


def todo(points: Sequence[LayersPoint], device: str) -> Sequence[Case]:
    """What the points' layers launch, each once."""
    found = {}
    for width in dict.fromkeys(of.width for of in points):
        rows, queries = rows_and_queries([of for of in points if of.width == width])
        stack = make_work(point(1, width, [1], 1)).stack
        for case in cases(stack, DTYPE, device, rows=rows, queries=queries):
            found[case.key] = case
    return list(found.values())


def tune(
    wanted: Sequence[Case], timer: Timer, advance: Callable[[str], None] = lambda step: None
) -> int:
    """Completes the table of this GPU in the user's folder; how many entries that made.

    It is written after each, and used from the next launch on.
    """
    path = tuning.user_folder() / f"{tuning.device_name()}.json"
    found = {}
    if path.exists():
        found = {entry.key: entry for entry in tuning.parse(path.read_text(encoding="utf-8"))}
    missing = [case for case in wanted if case.key not in found]
    made = 0
    for number, case in enumerate(missing, 1):
        sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items())
        advance(f"tuning {number} of {len(missing)}: {case.kernel.name}, {sizes}")
        entry = best(case, timer)
        if entry is not None:
            found[case.key], made = entry, made + 1
            tuning.write(path, list(found.values()))
    tuning.forget()
    return made
