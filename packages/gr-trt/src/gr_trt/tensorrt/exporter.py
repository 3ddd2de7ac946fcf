"""The exporter ``tensorrt``: every graph of a folder as a plan."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gr_core.contracts import Artifact, ExportOptions, Model
from gr_core.errors import BundleError, PlanError
from gr_trt.ensemble import Ensemble, Graph
from gr_trt.options import own_options
from gr_trt.tensorrt import graphs, plan_cache, plan_file
from gr_trt.tensorrt.builder import build
from gr_trt.tensorrt.graphs import OnnxGraph, Peak
from gr_trt.tensorrt.library import Library, choose, current_target
from gr_trt.tensorrt.network import parse
from gr_trt.tensorrt.options import CURRENT, BuildOptions
from gr_trt.tensorrt.plan_file import PlanFacts
from gr_trt.tensorrt.profiles import BATCH, Profile, distinct, profiles, shrunk
from gr_trt.tensorrt.refit import refit
from gr_trt.tensorrt.runner import open_plan
from gr_trt.tensorrt.verify import verify

logger = logging.getLogger(__name__)

_MIB = 2**20
_OWN = 16 * _MIB
"""What TensorRT's kernels take of a workspace for themselves, about."""
_ALIVE = 3
"""Tensors of the largest size that are alive at once: scores, activated, masked."""


@dataclass(frozen=True, slots=True)
class _Goal:
    """What the plans of one export are for."""

    library: Library
    targets: tuple[str, ...]
    """Compute capabilities."""
    asked: tuple[str, ...]
    """The same, or ``current``."""
    gpu: str
    """This machine's GPU, e.g. ``cuda:0``, where it is built for that."""
    device: str
    """Name of that GPU."""
    options: BuildOptions


class TensorRTExporter:
    """Implements `gr_core.contracts.Exporter`; its options are those of `BuildOptions`."""

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        own = own_options(BuildOptions, options.extra, "exporter tensorrt")
        goal = _goal(own, options.device)
        ensemble = Ensemble.read(artifact.path)
        if ensemble.notes.get("int8", {}).get("activations") == "uint8":
            raise PlanError(
                f"{artifact.path}: its int8 is made for CPUs (activations uint8), which TensorRT "
                "does not read; export with --target or --device cuda, or --option activations=int8"
            )
        began = time.monotonic()
        made: list[Graph] = []
        notes: dict[str, Any] = {}
        for graph in ensemble.graphs:
            with torch.cuda.device(goal.gpu) if goal.gpu else nullcontext():
                plan, facts = _plan(graph, artifact.path / graph.file, ensemble, goal)
            file = f"{Path(graph.file).stem}{plan_file.SUFFIX}"
            plan_file.write(out_dir / file, plan, facts)
            plan_file.read(out_dir / file)
            made.append(replace(graph, file=file))
            notes[graph.name] = _note(facts)
        if not made:
            raise BundleError(f"{artifact.path}: there is no graph in it; export the model again")
        summary = {
            "library": goal.library.name,
            "version": goal.library.version,
            "targets": list(goal.targets),
            "device": goal.device,
            "seconds": round(time.monotonic() - began, 3),
            "graphs": notes,
        }
        all_notes = {**ensemble.notes, "tensorrt": summary}
        plans = replace(ensemble, graphs=tuple(made), notes=all_notes)
        plans.write(out_dir)
        if goal.gpu:
            verify(out_dir, plans, model, goal.gpu, open_plan)
        return Artifact("tensorrt", out_dir)


def _goal(options: BuildOptions, device: str) -> _Goal:
    asked = options.targets
    library = choose(options.library, asked)
    if list(asked) == [CURRENT]:
        gpu = device if device.startswith("cuda") else "cuda"
        capability, title = current_target(gpu)
        if library.targets and capability not in library.targets:
            raise PlanError(
                f"target: {library.label} has no kernels for {title} ({capability}), only for "
                f"{', '.join(library.targets)}; install tensorrt (gr-trt[tensorrt])"
            )
        return _Goal(library, (capability,), asked, gpu, title, options)
    return _Goal(library, asked, asked, "", "", options)


def _plan(
    graph: Graph, path: Path, ensemble: Ensemble, goal: _Goal
) -> tuple[bytes | memoryview, PlanFacts]:
    """A plan from the cache, from one with other weights, or built."""
    onnx_graph = graphs.read(path)
    fitting = _fitting(graph, onnx_graph, ensemble, goal.options)
    key = plan_cache.key(onnx_graph, goal.library, goal.targets, goal.device, fitting, goal.options)
    if goal.options.plan_cache_mib and (found := plan_cache.get(key)) is not None:
        logger.info("%s: its plan was built before", graph.name)
        return found
    plan, facts = _make(graph, onnx_graph, fitting, goal)
    if goal.options.plan_cache_mib:
        plan_cache.put(key, plan, facts, goal.options.plan_cache_mib)
    return plan, facts


def _make(
    graph: Graph, onnx_graph: OnnxGraph, fitting: Sequence[Profile], goal: _Goal
) -> tuple[bytes | memoryview, PlanFacts]:
    facts = PlanFacts(
        library=goal.library.name,
        version=goal.library.version,
        targets=goal.targets,
        device=goal.device,
        platform=plan_file.this_platform(),
        bytes=0,
        sha256="",
        profiles=tuple(fitting),
        structure=onnx_graph.structure,
        refit=goal.options.refit,
        weight_streaming=goal.options.weight_streaming,
    )
    plan: bytes | memoryview | None = None
    if goal.options.refit and goal.device:
        plan, facts = _refitted(onnx_graph, facts, goal)
    if plan is None:
        network = parse(goal.library, onnx_graph)
        built = build(network, graph, fitting, goal.asked, goal.options)
        plan = built.plan
        facts = replace(
            facts,
            activation_bytes=built.activation_bytes,
            weight_bytes=built.weight_bytes,
            seconds=round(built.seconds, 3),
            network=built.network,
            layers=built.layers,
        )
    return plan, replace(facts, bytes=len(plan), sha256=plan_file.digest(plan))


def _refitted(
    onnx_graph: OnnxGraph, facts: PlanFacts, goal: _Goal
) -> tuple[bytes | None, PlanFacts]:
    """A plan of an older version of the model with this one's weights, if there is such a plan."""
    old = plan_cache.refittable(goal.library, facts)
    if old is None:
        return None, facts
    plan = refit(goal.library, old[0], onnx_graph.path)
    return plan, facts if plan is None else replace(old[1], seconds=0.0)


def _fitting(
    graph: Graph, onnx_graph: OnnxGraph, ensemble: Ensemble, options: BuildOptions
) -> list[Profile]:
    """Profiles whose largest tensor fits in the workspace."""
    limit = options.workspace_mib * _MIB
    found: list[Profile] = []
    for wanted in profiles(ensemble, graph, options):
        profile = wanted
        while (peak := _peak(onnx_graph, profile)).bytes > limit - _OWN or (
            profile.batch > 1 and _ALIVE * peak.bytes > limit - _OWN
        ):
            smaller = shrunk(profile)
            if smaller is None:
                sizes = ", ".join(f"{a} {r.most}" for a, r in profile.axes.items() if a != BATCH)
                raise PlanError(
                    f"graph {graph.name!r}: for a single request of the largest sizes ({sizes}), "
                    f"{peak.name!r} alone takes {peak.bytes / _MIB:,.1f} MiB, too much for "
                    f"workspace_mib={options.workspace_mib}; allow more, or lower max_history or "
                    "max_candidates"
                )
            profile = smaller
        if profile != wanted:
            logger.info("%s: profile %s is made to fit: %s", graph.name, wanted, profile)
        found.append(profile)
    return distinct(found)


def _peak(graph: OnnxGraph, profile: Profile) -> Peak:
    return graphs.peak(graph, {axis: r.most for axis, r in profile.axes.items()})


def _note(facts: PlanFacts) -> dict[str, Any]:
    return {
        "bytes": facts.bytes,
        "seconds": facts.seconds,
        "activation_bytes": facts.activation_bytes,
        "weight_bytes": facts.weight_bytes,
        "profiles": [profile.as_dict() for profile in facts.profiles],
        "network": dict(facts.network),
        "layers": dict(Counter(layer.split()[0] for layer in facts.layers)),
    }
