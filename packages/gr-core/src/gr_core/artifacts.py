"""Artifacts that exporters make at load time, kept in a folder keyed by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gr_core.contracts import (
    Artifact,
    AsyncEngine,
    Engine,
    EngineOptions,
    Exporter,
    ExportOptions,
    Model,
)
from gr_core.errors import BundleError
from gr_core.planner import Plan
from gr_core.plugins.descriptors import ExporterDescriptor
from gr_core.repository.bundle import CONFIG, atomic_folder
from gr_core.types import Task

logger = logging.getLogger(__name__)

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
    for descriptor, out_dir in _places(plan, model, folder, options):
        if not (out_dir / _COMPLETE).is_file():
            exporter: Exporter = descriptor.resolve()()
            with atomic_folder(out_dir) as partial:
                exporter.export(artifact, model, partial, options)
                (partial / _COMPLETE).touch()
        artifact = Artifact(descriptor.target, out_dir)
    return artifact


def load_engine(
    engine: Engine | AsyncEngine,
    plan: Plan,
    model: Model,
    tasks: Sequence[Task],
    options: EngineOptions,
    folder: Path | None = None,
) -> None:
    """Loads an engine with what the plan's exporters make, see `materialize`.

    What was kept from before and cannot be loaded, being damaged for example, is made again, once.
    """
    export = ExportOptions(plan.device, plan.dtype, options.extra)
    places = [out_dir for _, out_dir in _places(plan, model, folder, export)]
    kept = [out_dir for out_dir in places if (out_dir / _COMPLETE).is_file()]
    artifact = materialize(plan, model, folder, options.extra)
    try:
        engine.load(artifact, model, tasks, options)
    except BundleError as error:
        if not kept:
            raise
        logger.warning("%s: exporting it again, since %s", model.bundle.name, error)
        for out_dir in kept:
            shutil.rmtree(out_dir)
        engine.load(materialize(plan, model, folder, options.extra), model, tasks, options)


def _places(
    plan: Plan, model: Model, folder: Path | None, options: ExportOptions
) -> Iterator[tuple[ExporterDescriptor, Path]]:
    """Where each exporter's artifact is kept."""
    key = hashlib.sha256((model.bundle.path / CONFIG).read_bytes())
    key.update(repr(list(model.notes)).encode())  # say which of its sources the weights are from
    key.update(plan.model.revision.encode())
    parent = (folder or cache_folder() / "artifacts") / model.bundle.name
    for descriptor in plan.exporters:
        key.update(_step(descriptor, options))
        yield descriptor, parent / key.hexdigest()[:24]


def _step(descriptor: ExporterDescriptor, options: ExportOptions) -> bytes:
    maker = [descriptor.name, descriptor.target, descriptor.revision, descriptor.api_version]
    wanted = [options.device, options.dtype, sorted(options.extra.items())]
    return json.dumps([maker, wanted], default=str).encode()
