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
    from gr_kernels.tune import cases, complete, cuda_timer

    torch.cuda.set_device(torch.device(device))
    path = out or tuning.user_folder() / f"{tuning.device_name()}.json"
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
    started = time.monotonic()
    made = complete(path, todo, cuda_timer, lambda line: click.echo(line, err=True), again=again)
    click.echo(f"{path}: {made} entries made in {time.monotonic() - started:.0f} s")
