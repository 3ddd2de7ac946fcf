"""Launches of the points' sizes, measured before the points are: what `gr kernels tune` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gr_kernels import tuning
from gr_kernels.benchmark.gpu.layers import DTYPE, LayersPoint, point
from gr_kernels.benchmark.work import make_work
from gr_kernels.ops.hstu_stack.cuda import GRAPH_QUERIES
from gr_kernels.tune import Case, Timer, cases, complete
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
            # And those that graphs are recorded with.
            queries |= {max(one.lengths) + one.candidates, GRAPH_QUERIES if of.cached else 0}
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


def tune(wanted: Sequence[Case], timer: Timer, report: Callable[[str], None]) -> int:
    """Completes the table of this GPU in the user's folder; how many entries that made."""
    path = tuning.user_folder() / f"{tuning.device_name()}.json"
    return complete(path, wanted, timer, report)
