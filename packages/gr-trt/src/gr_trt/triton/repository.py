"""Writes a repository for Triton, and adds one to another.

All that is written is complete before Triton can see it: versions appear as folders that are
renamed to their place, and the ensemble that leads to a version is the last to change.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import Model
from gr_core.errors import BundleError, PlanError
from gr_core.types import Task
from gr_trt.ensemble import FILE, Ensemble, Role
from gr_trt.triton.config import FILES, WarmUp, Wiring, ensemble_config, step_config
from gr_trt.triton.files import copy, copy_bundle, copy_graph, share, write_model, write_warm_up
from gr_trt.triton.layout import (
    ARTIFACT,
    BUNDLE,
    CONFIG,
    ITEMS,
    REPORT,
    REQUEST,
    STATE,
    STEPS,
    WARM_UP,
    Names,
    Port,
    Step,
    axes_of,
    engine_ports,
    features_ports,
    graph_for,
    names_of,
    port_of,
    step_inputs,
)
from gr_trt.triton.loading import load_features
from gr_trt.triton.options import ONNXRUNTIME, PYTHON, TENSORRT, RepositoryOptions
from gr_trt.triton.plans import Plan, longest, plan_for
from gr_trt.triton.samples import sample_rows

_CLASSES = {"features": "FeaturesModel", "engine": "EngineModel", "answer": "AnswerModel"}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Source:
    """What a repository is made of."""

    model: Model
    graphs: Path
    """A folder of the format ``onnx``, see `gr_trt.triton.graphs`."""
    plans: Path | None
    """A folder of the format ``tensorrt``, for that backend."""
    device: str


def version_of(model: Model, options: RepositoryOptions) -> int:
    """The number of the version folders. Raises `PlanError` for a version that is none."""
    version = model.bundle.version
    if options.triton_version:
        return options.triton_version
    if version.isascii() and version.isdigit() and version[0] != "0" and len(version) < 10:
        return int(version)
    raise PlanError(
        f"{model.bundle.name}: its version {version!r} is not a number as Triton's versions are; "
        "give one with the option triton_version"
    )


def write_repository(
    out_dir: Path, source: Source, task: Task, options: RepositoryOptions
) -> Names:
    """All models of one task. Raises `GrError` for a model that cannot be served like this."""
    version = version_of(source.model, options)
    names = names_of(options.triton_name or source.model.bundle.name, task)
    ensemble = Ensemble.read(source.graphs)
    wiring = _wiring(source.model, ensemble, task, options.backend)
    plan = None if source.plans is None else plan_for(source.plans, task, options)
    step = Step(
        task=task,
        backend=options.backend,
        device=source.device,
        dtype=ensemble.dtype,
        batch=options.triton_batch,
        threads=options.engine_threads,
        longest=_longest(ensemble, plan, options.backend),
    )
    for name in STEPS:
        folder = out_dir / names.step(name) / str(version)
        folder.mkdir(parents=True)
        if name == "engine" and options.backend != PYTHON:
            _write_graph(source, ensemble, task, plan, folder)
        else:
            _write_step(source, ensemble, step, name, folder, out_dir / names.step(STEPS[0]))
    warm = _warm_ups(out_dir, names, version, source.model, wiring, options)
    for name in STEPS:
        profile = "" if plan is None or plan.profiles == 1 else str(plan.place)
        text = step_config(name, names, wiring, options, source.device, profile, warm[name])
        (out_dir / names.step(name) / CONFIG).write_text(text)
    for name in (names.ensemble, names.pinned(version)):
        folder = out_dir / name / str(version)
        folder.mkdir(parents=True)
        text = ensemble_config(name, names, version, options.triton_batch, wiring)
        (out_dir / name / CONFIG).write_text(text)
    return names


def write_report(out_dir: Path, names: Names, version: int, report: Mapping[str, Any]) -> None:
    for name in (names.ensemble, names.pinned(version)):
        text = json.dumps(report, indent=2) + "\n"
        (out_dir / name / str(version) / REPORT).write_text(text)


def _wiring(model: Model, ensemble: Ensemble, task: Task, backend: str) -> Wiring:
    where = f"triton-repository, backend {backend}"
    graph = graph_for(ensemble, task, where)
    specs: Sequence[Any] = step_inputs(model, task) if backend == PYTHON else graph.inputs
    inputs: list[Port] = [port_of(spec, where) for spec in specs]
    axes = axes_of([*specs])
    return Wiring(
        task=task,
        inputs=inputs,
        features=features_ports(inputs, backend, axes),
        outputs=engine_ports(task, backend, len(model.heads), graph),
    )


def _write_step(
    source: Source, ensemble: Ensemble, step: Step, name: str, folder: Path, first: Path
) -> None:
    """A Python model; the bundle is copied for the first of them and linked for the others."""
    write_model(folder, _CLASSES[name])
    step.write(folder)
    if name == STEPS[0]:
        copy_bundle(source.model.bundle, folder / BUNDLE)
    else:
        share(first / folder.name / BUNDLE, folder / BUNDLE)
    wanted: tuple[Role, ...] = ()
    if name == "engine":
        wanted = (Role.SINGLE_PASS, Role.TOP_K)
    elif name == "answer" and step.backend != PYTHON:
        wanted = (Role.TOP_K,)
    (folder / ARTIFACT).mkdir()
    graphs = [graph for graph in ensemble.graphs if step.task in graph.tasks]
    # Who reads the description alone finds all of the task's graphs in it.
    replace(ensemble, graphs=tuple(graphs)).write(folder / ARTIFACT)
    if wanted:
        kept = tuple(graph for graph in graphs if graph.role in wanted)
        replace(ensemble, graphs=kept).write(folder / ARTIFACT)
        for graph in kept:
            copy_graph(source.graphs / graph.file, folder / ARTIFACT / graph.file)


def _write_graph(
    source: Source, ensemble: Ensemble, task: Task, plan: Plan | None, folder: Path
) -> None:
    if plan is not None:
        copy(plan.file, folder / FILES[TENSORRT])
        copy(plan.file.parent / FILE, folder / FILE)
        return
    graph = graph_for(ensemble, task, f"triton-repository, backend {ONNXRUNTIME}")
    copy_graph(source.graphs / graph.file, folder / FILES[ONNXRUNTIME])


def _longest(ensemble: Ensemble, plan: Plan | None, backend: str) -> Mapping[str, int]:
    """See `gr_trt.triton.layout.Step`."""
    if backend == PYTHON:
        return {}
    if plan is not None:
        return longest(plan)
    return {name: axis.maximum for name, axis in ensemble.axes.items()}


def _warm_ups(
    out_dir: Path,
    names: Names,
    version: int,
    model: Model,
    wiring: Wiring,
    options: RepositoryOptions,
) -> Mapping[str, Sequence[WarmUp]]:
    """A sample request for each step, alone and in the largest batch; writes their files."""
    folder = out_dir / names.step("features") / str(version)
    features = load_features(folder, model)
    ((text, row),) = sample_rows(features, model, wiring.task, Step.read(folder).longest, 1)
    given: dict[str, Array] = {REQUEST: np.array([[text]], np.object_)}
    made = features.tensors([row])
    ports = {port.name: port for port in wiring.features}
    engine = {name: made[name] for name in ports if name not in (STATE, ITEMS)}
    answer = {name: made[name] for name in (STATE, ITEMS)}
    length = {port.name: _zero_shape(port) for port in wiring.outputs}
    if wiring.task is Task.RANK:
        length = {name: (made[ITEMS].shape[1], *shape[1:]) for name, shape in length.items()}
    found = {}
    for step, arrays, zeros in (
        ("features", given, {}),
        ("engine", engine, {}),
        ("answer", answer, length),
    ):
        write_warm_up(out_dir / names.step(step) / WARM_UP, arrays)
        shapes = {name: array.shape[1:] for name, array in arrays.items()} | zeros
        found[step] = [
            WarmUp(f"{size} at once", size, shapes, frozenset(arrays))
            for size in dict.fromkeys((1, options.triton_batch))
        ]
    return found


def _zero_shape(port: Port) -> tuple[int, ...]:
    return tuple(1 if size == -1 else size for size in port.dims)


# ── Several versions ──────────────────────────────────────────────────────────────────────────


def add(exported: Path, repository: Path) -> Sequence[str]:
    """Moves what was exported into a repository that may be served meanwhile; names what is new.

    Raises `BundleError`, and changes nothing, where a version is there already or where the models
    are configured in another way.
    """
    models = _models(exported)
    _models(repository)
    _check(models, exported, repository)
    ensembles = [name for name in models if _is_ensemble(exported / name)]
    # Steps before ensembles, and of these the pinned ones first: who asks finds all that is needed.
    order = sorted(models, key=lambda name: (name in ensembles, not _is_pinned(name), name))
    for name in order:
        target = repository / name
        if not target.exists():
            _appear(exported / name, target)
        elif name in ensembles:
            _lead_on(exported / name, target)
        else:
            for version in _versions(exported / name):
                _appear(exported / name / version, target / version)
    return [f"{name}/{version}" for name in order for version in _versions(exported / name)]


def _check(models: Sequence[str], exported: Path, repository: Path) -> None:
    for name in models:
        ours, theirs = exported / name, repository / name
        if not theirs.exists():
            continue
        if taken := set(_versions(ours)) & set(_versions(theirs)):
            raise BundleError(
                f"{theirs}: has version {min(taken)} already; export with another number by the "
                "option triton_version, or delete that version everywhere first"
            )
        if _is_ensemble(ours):
            newest = max(map(int, _versions(theirs)))
            if not _is_pinned(name) and max(map(int, _versions(ours))) < newest:
                raise BundleError(
                    f"{theirs}: leads to version {newest}, newer than what is to be added; "
                    "export with a higher number by the option triton_version"
                )
            continue
        mine, others = ((at / CONFIG).read_text() for at in (ours, theirs))
        if _contract(mine) != _contract(others):
            differing = next(
                (a, b)
                for a, b in zip(
                    [*_contract(mine), "the end"], [*_contract(others), "the end"], strict=False
                )
                if a != b
            )
            raise BundleError(
                f"{theirs / CONFIG}: says {differing[1].strip()!r} where the new version has "
                f"{differing[0].strip()!r}, and Triton has one configuration for all versions; "
                "export with the same options, or under another name by the option triton_name"
            )


def _contract(config: str) -> list[str]:
    """The lines of a configuration without the warm-up, which may differ between versions."""
    return config.partition("model_warmup {")[0].splitlines()


def _models(repository: Path) -> Sequence[str]:
    if not repository.is_dir():
        raise BundleError(f"{repository}: no such folder")
    found = sorted(p.name for p in repository.iterdir() if (p / CONFIG).is_file())
    if not found:
        raise BundleError(f"{repository}: not a repository for Triton, no folder has a {CONFIG}")
    return found


def _versions(model: Path) -> Sequence[str]:
    return sorted((p.name for p in model.iterdir() if p.name.isdigit() and p.is_dir()), key=int)


def _is_ensemble(model: Path) -> bool:
    return 'platform: "ensemble"' in (model / CONFIG).read_text()


def _is_pinned(name: str) -> bool:
    return name.rpartition("-v")[2].isdigit()


def _appear(source: Path, target: Path) -> None:
    """A complete copy of a folder, at its place all at once."""
    # Staged beside the repository: in it, Triton would take the folder for a model.
    root = target.parent.parent if target.name.isdigit() else target.parent
    stage = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        shutil.copytree(source, stage / target.name)
        try:
            os.replace(stage / target.name, target)
        except OSError as error:
            raise BundleError(f"{target}: {error.strerror}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _lead_on(source: Path, target: Path) -> None:
    """Makes an ensemble lead to its new version."""
    before = _versions(target)
    for version in _versions(source):
        _appear(source / version, target / version)
    handle, temporary = tempfile.mkstemp(prefix=f".{CONFIG}-", dir=target)
    with os.fdopen(handle, "w") as file:
        file.write((source / CONFIG).read_text())
    Path(temporary).chmod(0o644)
    os.replace(temporary, target / CONFIG)
    for version in before:
        with suppress(OSError):
            shutil.rmtree(target / version)
