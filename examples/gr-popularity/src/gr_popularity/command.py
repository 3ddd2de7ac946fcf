"""The command ``gr popularity``: makes a bundle from a file of interactions."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file

from gr_core.errors import UserError
from gr_core.repository import Catalogue, write_bundle
from gr_core.types import Task


@click.group("popularity")
def cli() -> None:
    """Models that count; the floor that personal ones have to beat."""


@cli.command()
@click.argument("interactions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="NAME/VERSION folder.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
def fit(interactions: Path, out: Path, overwrite: bool) -> None:
    """Counts the column item_id of a CSV file; a column title is kept where there is one."""
    counts: Counter[str] = Counter()
    titles: dict[str, str] = {}
    with interactions.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "item_id" not in (rows.fieldnames or ()):
            raise UserError(f"{interactions}: no column item_id; it has {rows.fieldnames}")
        for row in rows:
            if not row["item_id"]:
                raise UserError(f"{interactions}, line {rows.line_num}: item_id is empty")
            counts[row["item_id"]] += 1
            titles[row["item_id"]] = row.get("title") or ""
    if not counts:
        raise UserError(f"{interactions}: no interactions; give a file with at least one")
    items = [item for item, _ in counts.most_common()]
    shares = np.array([0, *(counts[item] for item in items)], np.float32) / counts.total()
    bundle = write_bundle(
        out,
        name=out.parent.name,
        version=out.name,
        architecture="popularity",
        tasks=(Task.RETRIEVE, Task.RANK),
        config={},
        catalogue=Catalogue(items, [titles[i] for i in items] if any(titles.values()) else ()),
        weights=lambda path: save_file({"shares": shares}, path),
        description=f"Share of {counts.total()} interactions with {len(items)} items",
        overwrite=overwrite,
    )
    click.echo(f"{bundle.path}: {bundle.description}")
