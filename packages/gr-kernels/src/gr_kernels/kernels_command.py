"""The commands ``gr kernels …``. Imports click alone; torch waits until it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gr_core.cli.output import emit, table
from gr_core.errors import GrError, UserError
from gr_kernels.tune_command import tune

if TYPE_CHECKING:
    from gr_core import KernelDescriptor

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(name="kernels")
def kernels() -> None:
    """Kernels of this machine: which there are, building and measuring them."""


kernels.add_command(tune)


@kernels.command(name="list")
@click.option("--op", "ops", multiple=True, help="Only this op; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_kernels(ops: tuple[str, ...], as_json: bool) -> None:
    """All kernels by op, the preferred ones first, and whether they can be used here."""
    from gr_kernels.descriptors import KERNELS

    known = sorted({kernel.op for kernel in KERNELS})
    for op in ops:
        if op not in known:
            raise UserError(f"there is no op {op!r}; there are: {', '.join(known)}")
    chosen = sorted(
        (kernel for kernel in KERNELS if not ops or kernel.op in ops),
        key=lambda kernel: (kernel.op, -kernel.priority, kernel.name),
    )
    rows = [_row(kernel) for kernel in chosen]
    columns = ("op", "kernel", "device", "dtypes", "status", "reason")
    if as_json:
        emit([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table(columns, rows)


def _row(kernel: KernelDescriptor) -> Sequence[str]:
    ok, reason = (True, "") if kernel.probe is None else kernel.probe()
    status = "ok" if ok else "unusable"
    return (kernel.op, kernel.name, kernel.device, ", ".join(kernel.dtypes), status, reason)


@kernels.command(name="build")
@click.option(
    "--arch",
    "wanted",
    multiple=True,
    metavar="ARCHITECTURE",
    help="sm_80 or sm_90a; repeatable. Default: the best for the CUDA device here, else all.",
)
@click.option(
    "--out",
    type=_FOLDER,
    metavar="DIR",
    help="Build here, for other machines: name the folder in GR_CUDA_LIBRARIES there.",
)
def build(wanted: tuple[str, ...], out: Path | None) -> None:
    """Compile the kernels in CUDA C++, then test them on the CUDA device, if there is one.

    Needs nvcc and the headers of CUTLASS (pip install nvidia-cutlass). What is built already is
    not built again. Only a library that passed its test on a device is used there.
    """
    from gr_kernels.cuda import library

    capability = _capability()
    fitting = library.architectures(capability) if capability else ()
    chosen = dict.fromkeys(wanted or fitting[:1] or library.ARCHITECTURES)
    for architecture in chosen:
        if architecture not in library.ARCHITECTURES:
            raise UserError(
                f"architecture is {architecture!r}; expected one of "
                f"{', '.join(library.ARCHITECTURES)}"
            )

    def report(line: str) -> None:
        click.echo(line, err=True)

    with ThreadPoolExecutor(len(chosen)) as pool:
        building = {one: pool.submit(library.build, one, out, report) for one in chosen}
    files = {one: done.result() for one, done in building.items()}
    failures = []
    for architecture, file in files.items():
        if architecture in fitting:
            failures += _test(file)
        else:
            click.echo(f"{architecture}: not tested, no CUDA device here runs it", err=True)
        click.echo(file)
    if failures:
        raise GrError("; ".join(failures))


@kernels.command(name="test")
def test() -> None:
    """Test the kernels in CUDA C++ that were built, on the CUDA device, without building any.

    For libraries that came from another machine, see ``GR_CUDA_LIBRARIES``.
    """
    from gr_kernels.cuda import library

    capability = _capability()
    if capability is None:
        raise UserError("there is no CUDA device that torch can use")
    found = {one: library.find(one) for one in library.architectures(capability)}
    files = [file for file in found.values() if file is not None]
    if not files:
        raise UserError(f"not built for {' or '.join(found)}; run `gr kernels build`")
    if failures := [failure for file in files for failure in _test(file)]:
        raise GrError("; ".join(failures))


def _test(file: Path) -> list[str]:
    """Runs the self-test on the current device and keeps how it went; what failed, if anything."""
    from gr_kernels import tuning
    from gr_kernels.cuda import library
    from gr_kernels.cuda.self_test import failure_of

    device = tuning.device_name()
    library.record(file, device, failure_of(file, "cuda"))
    ok, reason = library.outcome(file, device)
    click.echo(reason, err=True)
    return [] if ok else [reason]


def _capability() -> tuple[int, int] | None:
    """Of the current CUDA device; None without one."""
    from gr_core.devices import machine

    if not machine().available("cuda")[0]:
        return None
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
