"""``gr verify``: parity of engines on a bundle."""

from __future__ import annotations

import click

from gr_core.cli.options import DTYPES, Setup, configured, json_option
from gr_core.cli.output import emit, progress, table


@click.command(name="verify")
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@configured
@json_option
@click.option("--engine", "engines", multiple=True, help="Only this engine; may be repeated.")
@click.option("--device", default="auto", help="Only on this device.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES[1:]))
@click.option("--requests", type=click.IntRange(1, 100_000), default=32, show_default=True)
@click.option("-k", type=click.IntRange(1, 10_000), default=10, show_default=True)
def verify(
    setup: Setup,
    names: tuple[str, ...],
    as_json: bool,
    engines: tuple[str, ...],
    device: str,
    dtypes: tuple[str, ...],
    requests: int,
    k: int,
) -> int:
    """Compare every engine with the float32 reference on a model.

    The same top-k, and scores within the tolerance of the engine's precision, or the exit code
    is 1. Requests are the model's own samples, or made up from its catalogue.
    """
    from gr_core.engines import Only
    from gr_core.parity import compare

    rows = []
    models = setup.models(names)
    with progress(len(models), "verifying") as done:
        for section in models:
            bundle = setup.repository.bundle(section.name)
            bundle.check_files()
            model = setup.registry.models[bundle.architecture].resolve()(bundle)
            try:
                for task in model.tasks:
                    found = compare(
                        setup.registry,
                        model,
                        task,
                        Only(engines, device, dtypes),
                        requests=requests,
                        k=k,
                    )
                    rows += [(bundle, parity) for parity in found]
            finally:
                model.close()
            done(section.name)
    failed = [parity for _, parity in rows if not parity.ok]
    if as_json:
        emit(
            [
                {"model": b.name, "version": b.version, "ok": p.ok}
                | {name: getattr(p, name) for name in p.__slots__}
                for b, p in rows
            ]
        )
    elif not rows:
        print("nothing to compare: the reference is the only engine that can run here")
    else:
        table(
            ("model", "task", "engine", "reference", "error", "allowed", "same top-k", "verdict"),
            [
                (
                    f"{bundle.name}/{bundle.version}",
                    p.task.value,
                    p.engine,
                    p.reference,
                    f"{p.max_error:.2g}",
                    f"{p.tolerance:g}",
                    f"{p.overlap:.1%}",
                    "ok" if p.ok else f"FAILED: {p.problem}",
                )
                for bundle, p in rows
            ],
        )
    return 1 if failed else 0
