"""Plans of TensorRT for Triton's backend of that name: one profile that takes every batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from gr_core.contracts import Artifact, Exporter, ExportOptions, Model
from gr_core.errors import PlanError
from gr_core.types import Task
from gr_trt.ensemble import Ensemble
from gr_trt.tensorrt.options import TENSORRT_RTX
from gr_trt.tensorrt.profiles import BATCH, Profile
from gr_trt.triton.layout import graph_for
from gr_trt.triton.options import RepositoryOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one task."""

    file: Path
    profile: Profile
    """The one that Triton is to use, of the largest batches."""
    place: int
    """Of the profile among those of the plan."""
    profiles: int


def build(
    graphs: Path, model: Model, out_dir: Path, options: ExportOptions, own: RepositoryOptions
) -> None:
    """Builds plans of a folder of graphs, by default with a profile for all batches alone."""
    extra = {**options.extra}
    extra.setdefault("batches", [own.triton_batch])
    exporter: Exporter = import_module("gr_trt.tensorrt.exporter").TensorRTExporter()
    exporter.export(Artifact("onnx", graphs), model, out_dir, replace(options, extra=extra))
    notes = Ensemble.read(out_dir).notes.get("tensorrt", {})
    if notes.get("library") == TENSORRT_RTX:
        logger.warning(
            "the plans are of TensorRT for RTX: Triton needs a backend tensorrt that was built "
            "with it; those of NVIDIA's containers read plans of their own version of TensorRT, "
            "built with the option library=tensorrt"
        )


def plan_for(folder: Path, task: Task, own: RepositoryOptions) -> Plan:
    """Raises `PlanError` for a plan that does not take the batches that Triton would make."""
    ensemble = Ensemble.read(folder)
    graph = graph_for(ensemble, task, f"triton-repository, backend {own.backend}")
    notes: Any = ensemble.notes["tensorrt"]
    profiles = [Profile.of(profile) for profile in notes["graphs"][graph.name]["profiles"]]
    place = max(range(len(profiles)), key=lambda i: profiles[i].batch)
    profile = profiles[place]
    if profile.axes[BATCH].most < own.triton_batch:
        raise PlanError(
            f"triton-repository: the plan of {task.value} takes at most {profile.batch} requests, "
            f"option triton_batch is {own.triton_batch}; say triton_batch={profile.batch}, or "
            "leave out the option batches, or give more memory by the option workspace_mib"
        )
    return Plan(folder / graph.file, profile, place, len(profiles))


def longest(plan: Plan) -> dict[str, int]:
    """Length of each jagged axis that the plan takes at most."""
    return {axis: r.most for axis, r in plan.profile.axes.items() if axis != BATCH}
