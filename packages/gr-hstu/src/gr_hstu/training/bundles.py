"""From a trained model to a bundle: weights, catalogue, feature schema and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.samples import SAMPLES
from gr_core.types import Task
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.report import Table
from gr_hstu.features import FeatureSchema

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights to what ``dtype`` keeps of them, in place, so that what is measured is
    what is written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def stored(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors to write: weights in ``dtype``, integer tables as int32."""
    return {
        name: tensor.to(dtype if tensor.is_floating_point() else torch.int32).contiguous()
        for name, tensor in model.state_dict().items()
    }


def write(
    out: Path,
    model: Any,
    *,
    architecture: str,
    tasks: Sequence[Task],
    catalogue: Catalogue,
    schema: FeatureSchema,
    data: Interactions,
    description: str,
    card: str,
    dtype: torch.dtype = torch.float32,
    head_weights: Mapping[str, float] | None = None,
    samples: str = "",
    overwrite: bool = False,
) -> Bundle:
    """Writes the bundle ``out`` = ``…/NAME/VERSION``; the data's terms go with it."""
    files = {}
    if data.attribution:
        files["ATTRIBUTION.txt"] = f"{data.attribution}\n\nLicence: {data.licence}\n".encode()
    if data.licence_text:
        files["LICENSE"] = data.licence_text.encode()
    if samples:
        files[SAMPLES] = samples.encode()
    return write_bundle(
        out,
        name=out.parent.name,
        version=out.name,
        architecture=architecture,
        tasks=tasks,
        config=model.config.to_dict(),
        catalogue=catalogue,
        weights=lambda path: _save(stored(model, dtype), path),
        features=schema.to_dict(),
        head_weights=head_weights or {},
        description=description,
        license=data.licence,
        card=card,
        extra_files=files,
        overwrite=overwrite,
    )


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(tensors), path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def card(
    title: str,
    *,
    data: Interactions,
    facts: Mapping[str, str],
    tables: Sequence[Table],
    notes: Sequence[str],
    command: str,
) -> str:
    """A model card in Markdown."""
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Quality", ""]
    for table in tables:
        lines += [table.markdown(), ""]
    if missed := [line for table in tables for line in table.not_above]:
        lines.append(
            "- **Not clearly better** (the interval is not above zero): " + "; ".join(missed)
        )
    lines += [*(f"- {note}" for note in notes), ""]
    lines += ["## Reproduce", "", f"    {command}", ""]
    if data.attribution:
        lines += ["## Data and licence", "", data.attribution, "", f"Licence: {data.licence}.", ""]
        lines += ["What is trained on the data carries the same attribution and licence.", ""]
    return "\n".join(lines)
