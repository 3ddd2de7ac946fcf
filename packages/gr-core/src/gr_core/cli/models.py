"""``gr models``: the versions of a repository, and which of them is active."""

from __future__ import annotations

from typing import Any

import click

from gr_core.cli.options import Setup, configured, json_option
from gr_core.cli.output import emit, table


@click.group(name="models")
def models() -> None:
    """List models and versions; activate one or roll back."""


@models.command("list")
@configured
@json_option
def list_(setup: Setup, as_json: bool) -> None:
    """List every version of every model of the repository."""
    from gr_core.errors import BundleError

    rows: list[dict[str, Any]] = []
    for name in setup.repository.names():
        active = setup.repository.active(name)
        for version in setup.repository.versions(name):
            row = {"name": name, "version": version, "active": version == active}
            try:
                bundle = setup.repository.bundle(name, version)
            except BundleError as error:
                row |= {"architecture": "", "tasks": [], "description": f"damaged: {error}"}
            else:
                row |= {
                    "architecture": bundle.architecture,
                    "tasks": [task.value for task in bundle.tasks],
                    "description": bundle.description,
                }
            rows.append(row)
    if as_json:
        emit(rows)
        return
    table(
        ("model", "version", "active", "architecture", "tasks", "description"),
        [
            (
                row["name"],
                row["version"],
                "yes" if row["active"] else "",
                row["architecture"],
                ", ".join(row["tasks"]),
                row["description"],
            )
            for row in rows
        ],
    )


@models.command()
@configured
@json_option
@click.argument("name")
@click.argument("version", default="")
def show(setup: Setup, name: str, version: str, as_json: bool) -> None:
    """Show a version of a model, the active one by default, with its model card."""
    from gr_core.repository.bundle import CARD

    bundle = setup.repository.bundle(name, version)
    bundle.check_files()
    facts = {
        "name": bundle.name,
        "version": bundle.version,
        "active": bundle.version == setup.repository.active(name),
        "architecture": bundle.architecture,
        "tasks": [task.value for task in bundle.tasks],
        "items": len(bundle.catalogue()),
        "description": bundle.description,
        "license": bundle.license,
        "path": str(bundle.path),
        "bytes": sum(facts["bytes"] for facts in bundle.files.values()),
        "config": bundle.config,
        "features": bundle.features,
        "head_weights": bundle.head_weights,
    }
    if as_json:
        emit(facts)
        return
    table(
        ("field", "value"),
        [(k, ", ".join(v) if isinstance(v, list) else v) for k, v in facts.items()],
    )
    card = bundle.path / CARD
    if card.is_file():
        print(f"\n{card.read_text(encoding='utf-8')}", end="")


@models.command()
@configured
@click.argument("name")
@click.argument("version")
def activate(setup: Setup, name: str, version: str) -> None:
    """Make a version the active one. Servers that watch the repository take it over."""
    before = setup.repository.activate(name, version)
    print(f"{name}: {version} is active now, before it was {before}")


@models.command()
@configured
@click.argument("name")
def rollback(setup: Setup, name: str) -> None:
    """Activate the version that was active before."""
    print(f"{name}: {setup.repository.rollback(name)} is active again")
