"""``gr plan``: which chain of plugins would run each model, and why."""

from __future__ import annotations

import click

from gr_core.cli.options import Setup, configured, engine_options, json_option
from gr_core.cli.output import emit, table


@click.command(name="plan")
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@configured
@engine_options
@json_option
@click.option("--explain", is_flag=True, help="Print every chain considered and why it lost.")
def plan(
    setup: Setup,
    names: tuple[str, ...],
    strategy: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    explain: bool,
) -> int:
    """Show which chain of plugins would run each model, and why. Nothing is loaded."""
    from gr_core.artifacts import cache_folder
    from gr_core.errors import PlanError
    from gr_core.planner import PROFILE, load_profile
    from gr_core.planner import plan as make_plan

    measured = load_profile(cache_folder() / PROFILE)
    plans, failures = [], []
    for model in setup.models(names):
        bundle = setup.repository.bundle(model.name, model.versions[-1] if model.versions else "")
        for task in bundle.tasks:
            try:
                made = make_plan(
                    setup.registry,
                    bundle.architecture,
                    task,
                    strategy=strategy or model.strategy,
                    device=device or model.device,
                    dtype=dtype or model.dtype,
                    profile=measured.get(f"{bundle.architecture}/{task}"),
                )
            except PlanError as error:
                failures.append((bundle, task, str(error)))
            else:
                plans.append((bundle, made))
    if as_json:
        emit(
            [{"name": b.name, "version": b.version, **p.as_dict()} for b, p in plans]
            + [
                {"name": b.name, "version": b.version, "task": t.value, "error": why}
                for b, t, why in failures
            ]
        )
        return 1 if failures else 0
    for bundle, made in plans:
        print(f"{bundle.name}/{bundle.version} {made.task.value}: {made.summary()}")
        if explain:
            rows = [("→" if c.chosen else "", c, c.verdict) for c in made.considered]
            table(("", "chain", "why"), rows)
            print()
    for bundle, task, why in failures:
        print(f"{bundle.name}/{bundle.version} {task.value}: {why}")
    return 1 if failures else 0
