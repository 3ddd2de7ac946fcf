"""``gr plugins``: what is installed, what it offers, and why some of it cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import click

from gr_core.cli.options import Setup, configured, json_option
from gr_core.cli.output import emit, table


@click.group(name="plugins")
def plugins() -> None:
    """List plugins, what they offer, and why some cannot be used."""


@plugins.command("list")
@configured
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Print the tracebacks of what failed.")
def list_(setup: Setup, as_json: bool, verbose: bool) -> None:
    """Name, version, status, hooks and reason of every plugin."""
    # What failed is what is printed; there is no need to warn of it as well.
    logging.getLogger("gr_core.plugins").setLevel(logging.CRITICAL)
    infos = setup.host.plugins()
    if as_json:
        emit(infos)
        return
    table(
        ("name", "distribution", "status", "offers", "reason"),
        [
            (
                info.name,
                f"{info.distribution} {info.version}".strip(),
                info.status,
                _grouped(info.offers) or "-",
                info.reason or "-",
            )
            for info in infos
        ],
    )
    for info in infos:
        if verbose and info.traceback:
            print(f"\n{info.name}:\n{info.traceback}", end="")


def _grouped(offers: Sequence[str]) -> str:
    """``engine a, engine b, model c`` as ``engine a, b; model c``."""
    by_kind: dict[str, list[str]] = {}
    for offer in offers:
        kind, _, name = offer.partition(" ")
        by_kind.setdefault(kind, []).append(name)
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in by_kind.items())
