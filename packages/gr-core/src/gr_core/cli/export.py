"""``gr export``: turns a model into another format by a chain of exporters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gr_core.cli.options import Setup, configured
from gr_core.cli.output import progress

if TYPE_CHECKING:
    from gr_core.plugins.descriptors import ExporterDescriptor


@click.command(name="export")
@click.argument("name", metavar="[MODEL]", default="")
@configured
@click.option("--model", "named", default="", metavar="MODEL", help="The same as the argument.")
@click.option(
    *("--format", "--to", "format_"),
    required=True,
    metavar="FORMAT",
    help="E.g. onnx, tensorrt, triton-repository.",
)
@click.option("--version", "version", default="", help="Version; default: the active one.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder; default: NAME-VERSION-FORMAT."
)
@click.option("--device", default="cpu", help="Device that it is made for.")
@click.option("--precision", "--dtype", "dtype", default="float32", help="E.g. float16, int8.")
@click.option(
    "--task", "tasks", multiple=True, help="Only this task; may be repeated. The option `tasks`."
)
@click.option(
    "--target", default="", help="Machine that it is made for, e.g. sm89. The option `target`."
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="For the exporters.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it is there.")
def export(
    setup: Setup,
    name: str,
    named: str,
    format_: str,
    version: str,
    out: Path | None,
    device: str,
    dtype: str,
    tasks: tuple[str, ...],
    target: str,
    options: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Turn a model into another format.

    The folder appears at the end, complete and checked by its exporters, or not at all.
    """
    from gr_core.contracts import Artifact, ExportOptions
    from gr_core.errors import BundleError
    from gr_core.planner import export_path
    from gr_core.repository.bundle import atomic_folder, room_at

    if bool(name) == bool(named):
        raise click.UsageError("name one model, as the argument or with --model")
    bundle = setup.repository.bundle(name or named, version)
    descriptor = setup.registry.models[bundle.architecture]
    start, path = export_path(setup.registry, bundle.architecture, format_)
    out = out or Path(f"{bundle.name}-{bundle.version}-{format_}")
    if out.exists() and not overwrite:
        raise BundleError(f"{out}: exists; choose another folder with --out, or say --overwrite")
    extra = _options(options)
    if tasks:
        extra["tasks"] = list(tasks)
    if target:
        extra["target"] = target
    given = ExportOptions(device, dtype, extra)
    bundle.check_files()
    model = descriptor.resolve()(bundle)
    artifact = Artifact(start, bundle.path)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="gr-export-") as scratch,
            progress(len(path), "exporting") as done,
        ):
            for step in path[:-1]:
                folder = Path(scratch) / step.name
                folder.mkdir()
                with room_at(folder):
                    artifact = step.resolve()().export(artifact, model, folder, given)
                done(step.name)
            with atomic_folder(out) as partial:
                path[-1].resolve()().export(artifact, model, partial, given)
            done(path[-1].name)
    finally:
        model.close()
    print(f"{_shown(start, path)}: wrote {out}")


def _shown(start: str, path: Sequence[ExporterDescriptor]) -> str:
    return " → ".join([start, *(step.target for step in path)])


def _options(assignments: Sequence[str]) -> dict[str, Any]:
    """Values are read as TOML where they are, else as text."""
    import tomllib

    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"{assignment!r}, expected NAME=VALUE", param_hint="--option")
        try:
            options[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[name] = text
    return options
