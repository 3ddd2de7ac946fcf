"""The engine ``onnxruntime``: a folder of graphs, K and V reused where there is a cache for them.

Shapes: B requests, D width of a user's representation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import (
    Artifact,
    BlockCache,
    BlockSpace,
    CacheKind,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
    TorchModel,
)
from gr_core.errors import PlanError, Unavailable
from gr_core.samples import for_task, sample_requests
from gr_core.steps import PAST_KEYS, USER, SteppedModel
from gr_core.types import FloatArray, IntArray, Task
from gr_trt.ensemble import Ensemble, Role
from gr_trt.execution.loading import kv_space, needed, open_folder, results
from gr_trt.execution.pages import Pages
from gr_trt.execution.passes import Pass, SinglePass, Stepped, Workspace
from gr_trt.onnx_runtime.options import OnnxRuntimeOptions
from gr_trt.onnx_runtime.session import NUMPY_DTYPES, Runtime, Session
from gr_trt.options import own_options

logger = logging.getLogger(__name__)


class OnnxRuntimeEngine:
    """Runs a folder of graphs; its options are those of `OnnxRuntimeOptions`."""

    def __init__(self) -> None:
        self._model: TorchModel | None = None
        self._passes: dict[Task, Pass] = {}
        self._top_k: Session | None = None

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        own = own_options(OnnxRuntimeOptions, options.extra, "engine onnxruntime")
        if not isinstance(model, TorchModel):
            raise PlanError(f"engine onnxruntime: {type(model).__name__} offers no torch module")
        ensemble = open_folder(artifact, model, options.dtype)
        runtime = Runtime.on(options.device, own.provider, options.threads)
        try:
            for task in tasks:
                self._passes[task] = _load_pass(
                    artifact, ensemble, model, task, runtime, options, own
                )
            if Task.RETRIEVE in tasks:
                top_k = needed(artifact, ensemble, Role.TOP_K, Task.RETRIEVE)
                self._top_k = Session(artifact.path, top_k, runtime)
        except BaseException:
            self.close()
            raise
        self._model = model

    def warm_up(self) -> None:
        """Runs each task with histories from none to long, as the model itself encodes them."""
        assert self._model is not None
        for request in sample_requests(self._model, 3):
            for task in self._passes:
                self.infer([self._model.encode(for_task(request, task), task).request])

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._model is None:
            raise Unavailable("engine onnxruntime is closed")
        return results(batch, self._passes[batch[0].task].answers(batch), self._search)

    def _search(self, users_BD: npt.NDArray[Any], k: int) -> tuple[FloatArray, IntArray]:
        assert self._top_k is not None
        best = self._top_k.run({USER: users_BD, "k": np.array(k)})
        return best["scores"], best["indices"]

    def health(self) -> Health:
        if self._model is None:
            return Health(False, "engine onnxruntime is not loaded")
        return Health(True)

    def close(self) -> None:
        self._model = None
        for one in self._passes.values():
            one.close()
        self._passes = {}
        self._top_k = None


def _load_pass(
    artifact: Artifact,
    ensemble: Ensemble,
    model: TorchModel,
    task: Task,
    runtime: Runtime,
    options: EngineOptions,
    own: OnnxRuntimeOptions,
) -> Pass:
    """In steps where the folder has them: the same graph serves known and new histories."""
    decode = ensemble.graph(Role.DECODE, task)
    name = f"{model.bundle.name}/{model.bundle.version}"
    if decode is None or not isinstance(model, SteppedModel):
        logger.info("%s: engine onnxruntime, %s in a single pass", name, task.value)
        graph = needed(artifact, ensemble, Role.SINGLE_PASS, task)
        session = Session(artifact.path, graph, runtime)
        return SinglePass(session, graph, Workspace(64, 8, own.workspace_bytes))
    past_keys = next(tensor for tensor in decode.inputs if tensor.name == PAST_KEYS)
    pages = Pages.of(decode, NUMPY_DTYPES[past_keys.dtype])
    space: BlockSpace | None = None
    cache = options.caches.get(CacheKind.USER_KV)
    if own.reuse and isinstance(cache, BlockCache):
        made_by = ("onnxruntime", *map(str, runtime.providers), ensemble.dtype)
        space = kv_space(cache, model, task, pages, *made_by)
    logger.info(
        "%s: engine onnxruntime, %s in steps, K/V cache: %s",
        name,
        task.value,
        "none" if space is None else f"{model.prefix_stability.reusable} histories",
    )
    _, heads, columns = pages.keys
    limits = Workspace(heads * columns, heads, own.workspace_bytes)
    session = Session(artifact.path, decode, runtime)
    return Stepped(model, session, decode, pages, space, limits)
