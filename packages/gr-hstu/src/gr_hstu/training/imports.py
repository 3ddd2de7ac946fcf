"""``gr hstu import``: a public checkpoint as a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gr_core.repository import Catalogue, write_bundle
from gr_core.types import Task
from gr_hstu.features import FeatureSchema
from gr_hstu.importers import ImportedModel, import_checkpoint

TRUNCATE_STEP = 16


def import_bundle(
    checkpoint: Path,
    importer: str,
    out: Path,
    options: Mapping[str, Any],
    catalogue: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Imports and writes to ``out`` = ``…/NAME/VERSION``; returns what to tell the user."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out}: exists; choose another folder, or say --overwrite")
    imported = import_checkpoint(checkpoint, importer=importer, **options)
    notes = [f"note: {note}" for note in imported.notes]
    if importer == "meta-ranking":
        return [*notes, _write_stack(imported, out)]
    items = (
        Catalogue.read(catalogue)
        if catalogue is not None
        else Catalogue(list(range(1, imported.item_count + 1)))
    )
    if len(items) != imported.item_count:
        raise ValueError(
            f"{catalogue}: {len(items)} items, but the checkpoint has {imported.item_count}"
        )
    schema = FeatureSchema(
        max_history=imported.max_history,
        truncate_step=min(TRUNCATE_STEP, imported.max_history),
    )
    bundle = write_bundle(
        out,
        name=out.parent.name,
        version=out.name,
        architecture="hstu",
        tasks=(Task.RETRIEVE, Task.RANK),
        config=imported.config.to_dict(),
        catalogue=items,
        weights=lambda path: save_file(
            {name: tensor.contiguous() for name, tensor in imported.state_dict.items()}, path
        ),
        features=schema.to_dict(),
        description=f"HSTU imported from {checkpoint.name}",
        card=_card(checkpoint, importer, options, imported),
        overwrite=overwrite,
    )
    return [*notes, f"{bundle.path}: {imported.item_count} items, serves retrieve and rank"]


def _write_stack(imported: ImportedModel, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in imported.state_dict.items()}
    save_file(state, out / "model.safetensors")
    config = {"stack": imported.config.to_dict()}
    (out / "stack.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    layers = imported.config.num_layers
    return (
        f"{out}: {layers} layers for HSTUStack of gr_hstu.modules.hstu; the checkpoint has no "
        "embeddings and heads, so it cannot be served by itself"
    )


def _card(
    checkpoint: Path, importer: str, options: Mapping[str, Any], imported: ImportedModel
) -> str:
    lines = [
        f"# HSTU imported from {checkpoint.name}",
        "",
        f"- importer: {importer}",
        *(f"- {name}: {value}" for name, value in options.items()),
        *(f"- note: {note}" for note in imported.notes),
        "",
        "Quality was not measured here: the checkpoint's own data decide it.",
        "",
    ]
    return "\n".join(lines)
