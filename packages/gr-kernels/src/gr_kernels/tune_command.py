"""The command ``gr kernels tune``: measures launches on this GPU, for the layers of models."""

from __future__ import annotations

import time
from pathlib import Path

import click

from gr_core.cli.options import Setup, configured
from gr_core.devices import machine
from gr_core.errors import PlanError

_DTYPES = ("bfloat16", "float16", "float32")


@click.command(name="tune")
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@configured
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(_DTYPES), help="Repeatable.")
@click.option("--device", default="cuda", show_default=True, help="E.g. cuda:1.")
@click.option("--again", is_flag=True, help="Measure what the table already has, too.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Table to complete; default: this GPU's, in the user's cache.",
)
def tune(
    setup: Setup,
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    again: bool,
    out: Path | None,
) -> None:
    """Measure how the kernels of models' layers are launched best on this GPU.

    The table is written after each kernel and size, so what is stopped goes on where it was.
    Without a --dtype, for bfloat16.
    """
    from gr_core.stack import StackModel

    ok, reason = machine().available(device)
    if not ok:
        raise PlanError(f"{reason}; launches can only be measured on a GPU")
    import torch

    from gr_kernels import tuning
    from gr_kernels.tune import best, cases, cuda_timer

    torch.cuda.set_device(torch.device(device))
    path = out or tuning.user_folder() / f"{tuning.device_name()}.json"
    found = {}
    if path.exists():
        found = {e.key: e for e in tuning.parse(path.read_text(encoding="utf-8"))}
    todo = []
    for section in setup.models(names):
        bundle = setup.repository.bundle(section.name)
        bundle.check_files()
        model = setup.registry.models[bundle.architecture].resolve()(bundle)
        try:
            if not isinstance(model, StackModel):
                click.echo(f"{section.name}: does not open its layers; passed over", err=True)
                continue
            stacks = {id(s): s for s in (model.stack(task) for task in model.tasks)}.values()
        finally:
            model.close()
        for dtype in dtypes or ("bfloat16",):
            todo += [case for stack in stacks for case in cases(stack, dtype, device)]
    unique = {case.key: case for case in todo if again or case.key not in found}
    started = time.monotonic()
    for number, (key, case) in enumerate(unique.items(), 1):
        entry = best(case, cuda_timer)
        sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items())
        label = f"[{number}/{len(unique)}] {case.kernel.name} {case.dtype} {sizes}"
        if entry is None:
            click.echo(f"{label}: does not run", err=True)
            continue
        found[key] = entry
        tuning.write(path, list(found.values()))
        click.echo(f"{label}: {entry.microseconds:.0f} µs {dict(entry.config)}", err=True)
    tuning.forget()
    took = time.monotonic() - started
    click.echo(f"{path}: {len(found)} entries, {len(unique)} measured in {took:.0f} s")
