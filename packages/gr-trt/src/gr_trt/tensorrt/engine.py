"""The engine ``tensorrt``: a folder of plans on a GPU.

Shapes: B requests, D width of a user's representation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from gr_core.contracts import (
    Artifact,
    BlockCache,
    CacheKind,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
    TorchModel,
)
from gr_core.errors import FailedPrecondition, PlanError, Unavailable
from gr_core.samples import for_task, sample_requests
from gr_core.steps import PAST_KEYS, SteppedModel
from gr_core.types import Task
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.execution.loading import kv_space, needed, open_folder, results
from gr_trt.execution.pages import Pages
from gr_trt.execution.passes import Pass, Stepped
from gr_trt.onnx_runtime.session import NUMPY_DTYPES
from gr_trt.options import own_options
from gr_trt.tensorrt.options import TensorRTOptions
from gr_trt.tensorrt.passes import PlanSession, ProfileLimits, SinglePass
from gr_trt.tensorrt.runner import OpenGraph, Runner, open_plan
from gr_trt.tensorrt.top_k import TopK

logger = logging.getLogger(__name__)

_REPEATED = 3
"""Runs of a shape until its CUDA graph is recorded and replayed."""


class TensorRTEngine:
    """Implements `gr_core.contracts.Engine`; its options are those of `TensorRTOptions`.

    ``open_graph`` is what runs the graphs: another runtime that takes batches in profiles can
    stand in for TensorRT.
    """

    def __init__(self, open_graph: OpenGraph = open_plan) -> None:
        self._open = open_graph
        self._model: Model | None = None
        self._passes: dict[Task, Pass] = {}
        self._top_k: TopK | None = None

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        own = own_options(TensorRTOptions, options.extra, "engine tensorrt")
        ensemble = open_folder(artifact, model, options.dtype)
        try:
            for task in tasks:
                self._passes[task] = self._load_pass(artifact, ensemble, model, task, options, own)
            if Task.RETRIEVE in tasks:
                self._top_k = _top_k(model, options.device)
        except BaseException:
            self.close()
            raise
        self._model = model

    def warm_up(self) -> None:
        """Runs each task alone and in a batch, until the launches are recorded.

        A sample that is too large for the profiles is told of and left out.
        """
        model = self._model
        assert model is not None
        samples = sample_requests(model, 8)
        for task in self._passes:
            requests = [model.encode(for_task(request, task), task).request for request in samples]
            for batch in ([requests[0]], [requests[1]], [requests[-1]], requests):
                try:
                    for _ in range(_REPEATED):
                        self.infer(batch)
                except FailedPrecondition as error:
                    logger.warning("a sample of the model cannot be run: %s", error)

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._model is None:
            raise Unavailable("engine tensorrt is closed")
        search = None if self._top_k is None else self._top_k.search
        return results(batch, self._passes[batch[0].task].answers(batch), search)

    def health(self) -> Health:
        if self._model is None:
            return Health(False, "engine tensorrt is not loaded")
        return Health(True)

    def close(self) -> None:
        self._model = None
        for one in self._passes.values():
            one.close()
        self._passes = {}
        self._top_k = None

    def _load_pass(
        self,
        artifact: Artifact,
        ensemble: Ensemble,
        model: Model,
        task: Task,
        options: EngineOptions,
        own: TensorRTOptions,
    ) -> Pass:
        """In steps where there is a cache for K and V, since these pass through host memory."""
        cache = options.caches.get(CacheKind.USER_KV)
        decode = ensemble.graph(Role.DECODE, task)
        name = f"{model.bundle.name}/{model.bundle.version}"
        if (
            decode is not None
            and isinstance(model, SteppedModel)
            and isinstance(cache, BlockCache)
            and model.prefix_stability.reusable != "none"
        ):
            logger.info("%s: engine tensorrt, %s in steps on cached K and V", name, task.value)
            runner = self._open(artifact.path, decode, options, own)
            return _Steps(_stepped(model, ensemble, decode, task, cache, runner), runner)
        graph = needed(artifact, ensemble, Role.SINGLE_PASS, task)
        logger.info("%s: engine tensorrt, %s in a single pass", name, task.value)
        runner = self._open(artifact.path, graph, options, own)
        # A decode step is defined for any candidates: those of a request may be computed apart.
        return SinglePass(runner, graph, independent=isinstance(model, SteppedModel))


class _Steps:
    """`Stepped`, and the plan that it runs."""

    def __init__(self, stepped: Stepped, runner: Runner) -> None:
        self.answers = stepped.answers
        self._stepped = stepped
        self._runner = runner

    def close(self) -> None:
        self._stepped.close()
        self._runner.close()


def _top_k(model: Model, device: str) -> TopK:
    if not isinstance(model, TorchModel):
        raise PlanError(f"engine tensorrt: {type(model).__name__} offers no table of items")
    return TopK(model.item_table(), device)


def _stepped(
    model: SteppedModel,
    ensemble: Ensemble,
    graph: Graph,
    task: Task,
    cache: BlockCache,
    runner: Runner,
) -> Stepped:
    past_keys = next(tensor for tensor in graph.inputs if tensor.name == PAST_KEYS)
    # numpy has no bfloat16; every one of its numbers is a float32.
    pages = Pages.of(graph, NUMPY_DTYPES.get(past_keys.dtype, np.float32))
    built = ensemble.notes.get("tensorrt", {})
    space = kv_space(cache, model, task, pages, "tensorrt", built.get("version"), ensemble.dtype)
    _, heads, columns = pages.keys
    session = PlanSession(runner, graph)
    limits = ProfileLimits(runner.profiles, heads * columns)
    return Stepped(model, session, graph, pages, space, limits)
