"""The engine ``onnxruntime``: a folder of graphs, K and V reused where there is a cache for them.

Shapes: B requests, D width of a user's representation.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence

import numpy as np

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
from gr_core.errors import BundleError, PlanError, Unavailable
from gr_core.samples import for_task, sample_requests
from gr_core.steps import PAST_KEYS, USER, SteppedModel
from gr_core.types import Task
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.execution.pages import BLOCK_TOKENS, Pages
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
        ensemble = Ensemble.read(artifact.path)
        _check(artifact, ensemble, model, options)
        runtime = Runtime.on(options.device, own.provider, options.threads)
        try:
            for task in tasks:
                self._passes[task] = _load_pass(
                    artifact, ensemble, model, task, runtime, options, own
                )
            if Task.RETRIEVE in tasks:
                top_k = _graph(artifact, ensemble, Role.TOP_K, Task.RETRIEVE)
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
        task = batch[0].task
        answers = self._passes[task].answers(batch)
        if task is not Task.RETRIEVE:
            return [InferenceResult(a.output, tokens_reused=a.reused) for a in answers]
        assert self._top_k is not None
        users_BD = np.stack([answer.output for answer in answers])
        best = self._top_k.run({USER: users_BD, "k": np.array(max(r.k for r in batch))})
        return [
            InferenceResult(
                best["scores"][row, : request.k], best["indices"][row, : request.k], answer.reused
            )
            for row, (request, answer) in enumerate(zip(batch, answers, strict=True))
        ]

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


def _check(artifact: Artifact, ensemble: Ensemble, model: Model, options: EngineOptions) -> None:
    """The graphs must have been made of this very bundle, in the precision that is asked for."""
    if ensemble.identity != model.bundle.identity.hex():
        raise BundleError(
            f"{artifact.path}: made of {ensemble.model}/{ensemble.version} with other files than "
            f"{model.bundle.name}/{model.bundle.version} has now; export the model again"
        )
    if ensemble.dtype != options.dtype:
        raise BundleError(
            f"{artifact.path}: made in {ensemble.dtype}, asked for {options.dtype}; "
            f"export the model again with --precision {options.dtype}"
        )


def _graph(artifact: Artifact, ensemble: Ensemble, role: Role, task: Task) -> Graph:
    if (graph := ensemble.graph(role, task)) is not None:
        return graph
    raise BundleError(
        f"{artifact.path}: has no graph {role.value} for {task.value}, only "
        f"{', '.join(g.name for g in ensemble.graphs)}; export the model again"
    )


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
    graph = decode or _graph(artifact, ensemble, Role.SINGLE_PASS, task)
    session = Session(artifact.path, graph, runtime)
    name = f"{model.bundle.name}/{model.bundle.version}"
    if decode is None or not isinstance(model, SteppedModel):
        logger.info("%s: engine onnxruntime, %s in a single pass", name, task.value)
        return SinglePass(session, graph, Workspace(64, 8, own.workspace_bytes))
    past_keys = next(tensor for tensor in graph.inputs if tensor.name == PAST_KEYS)
    pages = Pages.of(graph, NUMPY_DTYPES[past_keys.dtype])
    _, heads, columns = pages.keys
    space: BlockSpace | None = None
    cache = options.caches.get(CacheKind.USER_KV)
    if own.reuse and isinstance(cache, BlockCache):
        width = heads * (columns + pages.values[2])
        stack = model.stack(task)
        space = cache.space(
            _namespace(model, artifact, ensemble, runtime),
            block_tokens=BLOCK_TOKENS,
            block_bytes=pages.block_bytes,
            # Multiplications of one layer: projections, and scores with their values.
            token_cost=2.0 * width * stack.d_model + stack.layers[0].output_weight.numel(),
            pair_cost=float(width),
        )
    logger.info(
        "%s: engine onnxruntime, %s in steps, K/V cache: %s",
        name,
        task.value,
        "none" if space is None else f"{model.prefix_stability.reusable} histories",
    )
    limits = Workspace(heads * columns, heads, own.workspace_bytes)
    return Stepped(model, session, graph, pages, space, limits)


def _namespace(model: Model, artifact: Artifact, ensemble: Ensemble, runtime: Runtime) -> bytes:
    """What all K and V of a loaded model depend on besides the tokens."""
    digest = hashlib.blake2b(model.bundle.identity, digest_size=32)
    digest.update(f"|onnxruntime|{runtime.providers}|{ensemble.dtype}|{BLOCK_TOKENS}|".encode())
    if ensemble.dtype == "int8" or model.bundle.source is not None:
        # Calibration, or weights from elsewhere, may change without a trace in the bundle.
        digest.update(os.urandom(32))
    return digest.digest()
