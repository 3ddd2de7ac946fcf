"""Artifacts that exporters make at load time, kept in a folder keyed by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr_core.contracts import Artifact, Exporter, ExportOptions, Model
from gr_core.planner import Plan
from gr_core.plugins.descriptors import ExporterDescriptor
from gr_core.repository.bundle import CONFIG, atomic_folder

_COMPLETE = ".complete"


def cache_folder() -> Path:
    """Where things that can be made again are kept: ``$GR_CACHE_DIR``, else ``~/.cache/gr``."""
    if own := os.environ.get("GR_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gr"


def materialize(
    plan: Plan, model: Model, folder: Path | None, extra: Mapping[str, Any]
) -> Artifact:
    """The artifact that the plan's engine loads: the bundle itself, or exported step by step.

    A step that was exported before, from the same bundle and weights by the same revision of the
    exporter with the same options, is not done again.
    """
    options = ExportOptions(plan.device, plan.dtype, extra)
    artifact = Artifact(plan.format, model.bundle.path)
    key = hashlib.sha256((model.bundle.path / CONFIG).read_bytes())
    key.update(repr(list(model.notes)).encode())  # say which of its sources the weights are from
    for descriptor in plan.exporters:
        key.update(_step(descriptor, options))
        out_dir = (
            (folder or cache_folder() / "artifacts") / model.bundle.name / key.hexdigest()[:24]
        )
        if not (out_dir / _COMPLETE).is_file():
            exporter: Exporter = descriptor.resolve()()
            with atomic_folder(out_dir) as partial:
                exporter.export(artifact, model, partial, options)
                (partial / _COMPLETE).touch()
        artifact = Artifact(descriptor.target, out_dir)
    return artifact


def _step(descriptor: ExporterDescriptor, options: ExportOptions) -> bytes:
    maker = [descriptor.name, descriptor.target, descriptor.revision, descriptor.api_version]
    wanted = [options.device, options.dtype, sorted(options.extra.items())]
    return json.dumps([maker, wanted], default=str).encode()
