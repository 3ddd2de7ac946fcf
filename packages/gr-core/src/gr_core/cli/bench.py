"""``gr bench``: measures the engines of this machine, and remembers what the planner needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gr_core.cli.options import DTYPES, Setup, configured, json_option
from gr_core.cli.output import emit, progress, table

if TYPE_CHECKING:
    from gr_core.benchmark import Measurement
    from gr_core.repository import Bundle
    from gr_core.types import Task


@click.command(name="bench")
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@configured
@json_option
@click.option("--engine", "engines", multiple=True, help="Only this engine; may be repeated.")
@click.option("--device", default="auto", help="Only on this device.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(DTYPES[1:]),
    help="Only in this precision; default: float32.",
)
@click.option("--requests", type=click.IntRange(1, 1_000_000), default=100, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 4096), default=1, show_default=True)
@click.option("--save", is_flag=True, help="Let `auto` choose by these figures from now on.")
def bench(
    setup: Setup,
    names: tuple[str, ...],
    as_json: bool,
    engines: tuple[str, ...],
    device: str,
    dtypes: tuple[str, ...],
    requests: int,
    rounds: int,
    concurrency: int,
    save: bool,
) -> int:
    """Measure this machine's engines on a model.

    Closed loop, in process, the engines in turns within each round. What is measured is features,
    queue, batch, engine and decoding. Engines whose scores are wrong are not measured: parity with
    the reference is checked first.
    """
    from gr_core.artifacts import cache_folder
    from gr_core.batcher import BatchingOptions
    from gr_core.benchmark import Work, measure
    from gr_core.engines import Only, feasible_plans
    from gr_core.parity import compare
    from gr_core.planner import PROFILE, save_profile

    results, seconds, red = [], {}, []
    only = Only(engines, device, dtypes or ("float32",))
    models = setup.models(names)
    batching = BatchingOptions(**dict(setup.config.batching))
    with progress(len(models), "measuring") as done:
        for section in models:
            bundle = setup.repository.bundle(section.name)
            bundle.check_files()
            model = setup.registry.models[bundle.architecture].resolve()(bundle)
            try:
                for task in model.tasks:
                    checked = compare(setup.registry, model, task, only, requests=8)
                    wrong = {parity.engine for parity in checked if not parity.ok}
                    red += [(bundle.name, parity) for parity in checked if not parity.ok]
                    plans = [
                        p
                        for p in feasible_plans(setup.registry, bundle.architecture, task, only)
                        if f"{p.engine.name} ({p.device}, {p.dtype})" not in wrong
                    ]
                    work = Work(task, requests, rounds, concurrency)
                    found = measure(plans, model, work, batching)
                    results.append((bundle, task, found))
                    seconds[f"{bundle.architecture}/{task}"] = _quickest(found)
            finally:
                model.close()
            done(section.name)
    if save:
        save_profile(cache_folder() / PROFILE, seconds)
    if as_json:
        emit(
            [
                {
                    "model": bundle.name,
                    "version": bundle.version,
                    "task": task.value,
                    "concurrency": concurrency,
                    "requests": requests * rounds,
                    "engines": found,
                }
                for bundle, task, found in results
            ]
        )
    else:
        _print(results)
    for model_name, parity in red:
        click.echo(
            f"not measured: {model_name} {parity.task.value} on {parity.engine} is wrong: "
            f"{parity.problem}",
            err=True,
        )
    return 1 if red else 0


def _quickest(found: Sequence[Measurement]) -> dict[str, float]:
    """Median latency of each engine, on the best of its devices."""
    best: dict[str, float] = {}
    for m in found:
        best[m.name] = min(m.p50_s, best.get(m.name, m.p50_s))
    return best


def _print(results: Sequence[tuple[Bundle, Task, Sequence[Measurement]]]) -> None:
    rows = []
    for bundle, task, found in results:
        for m in found:
            rows.append(
                (
                    f"{bundle.name}/{bundle.version}",
                    task.value,
                    m.engine,
                    f"{m.p50_s * 1e3:.2f}",
                    f"{m.p99_s * 1e3:.2f}",
                    f"{m.requests_per_s:.0f}",
                    f"{m.median_batch:g}",
                    f"{m.requests_per_s / found[0].requests_per_s:.2f}",
                )
            )
    table(
        ("model", "task", "engine", "p50 ms", "p99 ms", "requests/s", "batch", "ratio"),
        rows,
    )
