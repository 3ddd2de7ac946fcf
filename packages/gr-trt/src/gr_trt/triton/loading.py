"""A version folder of a Python model, opened: the bundle, what the step is, and its engine."""

from __future__ import annotations

from pathlib import Path

from gr_core.contracts import Artifact, Engine, EngineOptions, Model
from gr_core.errors import PlanError
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.types import Task
from gr_trt.ensemble import Ensemble, Role
from gr_trt.triton.answer import Answers
from gr_trt.triton.engine import EngineStep
from gr_trt.triton.features import Features
from gr_trt.triton.layout import ARTIFACT, BUNDLE, Step, graph_for, step_inputs
from gr_trt.triton.options import PYTHON

ENGINE = "onnxruntime"
"""The platform's engine that the backend ``python`` runs."""


def load_model(folder: Path, registry: Registry | None = None) -> Model:
    """The model of a version folder. Raises `GrError`, naming what is missing."""
    bundle = Bundle.open(folder / BUNDLE)
    bundle.check_files()
    found = (registry or PluginHost.discover().registry).models
    model: Model = found[bundle.architecture].resolve()(bundle)
    return model


def load_features(folder: Path, model: Model) -> Features:
    step = Step.read(folder)
    if step.backend == PYTHON:
        return Features(model, step.task, step_inputs(model, step.task), {})
    graph = graph_for(Ensemble.read(folder / ARTIFACT), step.task, str(folder))
    return Features(model, step.task, [tensor.spec for tensor in graph.inputs], step.longest)


def load_engine(folder: Path, model: Model, device: str, engine: Engine) -> EngineStep:
    """Loads and warms up ``engine`` with the graphs of the folder."""
    step = Step.read(folder)
    options = EngineOptions(
        device=device, dtype=step.dtype, threads=step.threads, max_batch_size=step.batch
    )
    engine.load(Artifact("onnx", folder / ARTIFACT), model, [step.task], options)
    engine.warm_up()
    return EngineStep(engine, step.task, model.inputs(step.task), len(model.heads))


def load_answers(folder: Path, model: Model) -> Answers:
    step = Step.read(folder)
    name = ENGINE if step.backend == PYTHON else step.backend
    if step.backend == PYTHON or step.task is Task.RANK:
        return Answers(model, step.task, name)
    from gr_trt.onnx_runtime.session import Runtime, Session

    graph = Ensemble.read(folder / ARTIFACT).graph(Role.TOP_K, step.task)
    if graph is None:
        raise PlanError(f"{folder}: has no graph that finds items; export the model again")
    session = Session(folder / ARTIFACT, graph, Runtime.on("cpu", "auto", step.threads or 1))
    return Answers(model, step.task, name, session)


def platform_engine(registry: Registry | None = None) -> Engine:
    found = (registry or PluginHost.discover().registry).engines
    engine: Engine = found[ENGINE].resolve()()
    return engine
