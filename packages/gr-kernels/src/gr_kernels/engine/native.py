"""The engine ``native``: plans a batch, runs the stack, scores, keeps the K and V.

Shapes: T tokens of a batch, D model width, R rows that answers are read from.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_core.contracts import (
    Artifact,
    BlockCache,
    BlockLease,
    BlockSpace,
    CacheKind,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
)
from gr_core.errors import PlanError, Unavailable
from gr_core.samples import for_task, sample_requests
from gr_core.stack import Stack, StackEnds, StackModel, TokenSequence
from gr_core.types import FloatArray, IntArray, Task
from gr_kernels.engine.batch import BatchPlan, plan_batch
from gr_kernels.engine.ends import ends_of, placed
from gr_kernels.engine.options import NativeOptions
from gr_kernels.engine.preparation import costs, prepare
from gr_kernels.engine.scratch import Scratch
from gr_kernels.ops.hstu_stack import HSTUStack, make_stack
from gr_kernels.ops.hstu_stack.cuda import CudaStack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS
from gr_kernels.retrieval import ItemIndex, make_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layers:
    """The stack of one or several tasks, what is at its ends, and where its K and V live."""

    runner: HSTUStack
    ends: StackEnds
    space: BlockSpace | None
    scratch: Scratch
    stream: torch.cuda.Stream | None
    max_tokens: int
    """Tokens that are computed at once."""

    def acquire(self, sequence: TokenSequence, reusable: int, owner: str) -> BlockLease:
        """Cached blocks if there is a cache that has room, else memory of the engine's own."""
        if self.space is not None and sequence.history:
            lease = self.space.acquire(sequence.salt, sequence.content, reusable, owner)
            if lease is not None:
                return lease
        return self.scratch.lease(sequence.history)

    def compute(self, batch: Sequence[EncodedRequest], plan: BatchPlan) -> Sequence[Tensor]:
        """Answers of the model's outputs, on the device."""
        arrivals = None if self.stream is None else plan.arrivals()
        if arrivals is not None:
            arrivals.start()
        x_TD = self.ends.embed(batch, plan.sequences, plan.starts)
        for run in plan.runs(self.max_tokens):
            rows_TD = x_TD[run[0].start : run[-1].stop]
            self.runner.run(rows_TD, [piece.segment for piece in run], arrivals)
        return self.ends.outputs(batch[0].task, batch, _answer_rows(x_TD, plan))

    def current(self) -> AbstractContextManager[object]:
        """On a GPU, launches go to the layers' own stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def settle(self) -> None:
        """Waits until nothing launched uses the blocks any more."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        if self.space is not None:
            self.space.close()
        self.runner.close()


class NativeEngine:
    """Runs any `gr_core.stack.StackModel`; its options are those of `NativeOptions`."""

    def __init__(self) -> None:
        self._model: StackModel | None = None
        self._layers: dict[Task, _Layers] = {}
        self._index: ItemIndex | None = None
        self._graphs: tuple[Sequence[int], int] = ((), 0)
        self._broken = ""
        """Why nothing can be computed any more."""

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        own = NativeOptions.of(options.extra)
        if not isinstance(model, StackModel):
            raise PlanError(f"engine native: {type(model).__name__} does not open its stack")
        stacks = {task: model.stack(task) for task in tasks}
        threads = options.threads or 1
        # What is left to torch is small; its threads would wait in a loop beside the stack's.
        torch.set_num_threads(1)
        made: dict[int, _Layers] = {}  # tasks may share a stack
        try:
            for task, stack in stacks.items():
                if id(stack) not in made:
                    made[id(stack)] = _load_layers(model, tasks, stack, options, own, threads)
                self._layers[task] = made[id(stack)]
            if Task.RETRIEVE in tasks:
                self._index = make_index(
                    model.item_table(), own.index, threads, options.device, kernels=own.kernels
                )
            if torch.device(options.device).type == "cuda":
                # What was copied there is read on other streams.
                torch.cuda.synchronize(options.device)
        except BaseException:
            self.close()
            raise
        self._model = model
        self._graphs = (own.graph_tokens, options.max_batch_size)

    def warm_up(self) -> None:
        """Runs each task with histories from none to long, as the model itself encodes them.

        On a GPU also records the graphs, and measures when K and V are worth copying.
        """
        assert self._model is not None
        for task, layers in self._layers.items():
            if isinstance(layers.runner, CudaStack) and not layers.runner.prepared:
                tokens, segments = self._graphs
                with layers.current():
                    prepare(self._model, task, layers.runner, layers.space, tokens, segments)
        for request in sample_requests(self._model, 3):
            for task in self._layers:
                self.infer([self._model.encode(for_task(request, task), task).request])

    @torch.inference_mode()
    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        model = self._model
        if model is None:
            raise Unavailable("engine native is closed")
        task = batch[0].task
        layers = self._layers[task]
        with layers.current():
            plan = plan_batch(
                [model.sequence(request) for request in batch],
                lambda i, sequence, reusable: layers.acquire(sequence, reusable, batch[i].user_id),
            )
            try:
                answers = layers.compute(batch, plan)
                # On the host, hence computed, and so is what is in the blocks.
                found = self._found(batch, answers)
                plan.commit()
            except torch.AcceleratorError as error:
                # After that, CUDA fails whatever this process asks of it.
                self._broken = str(error).partition("\n")[0]
                raise
            finally:
                try:
                    layers.settle()
                finally:
                    plan.release()
        return [
            InferenceResult(scores, indices, lease.reused)
            for (scores, indices), lease in zip(found, plan.leases, strict=True)
        ]

    def _found(
        self, batch: Sequence[EncodedRequest], answers: Sequence[Tensor]
    ) -> Sequence[tuple[FloatArray, IntArray | None]]:
        """Scores of each request, and of which items where it has to find them."""
        if batch[0].task is not Task.RETRIEVE:
            return [(scores.numpy(), None) for scores in _on_host(answers)]
        assert self._index is not None
        ks = [request.k for request in batch]
        scores_BK, indices_BK = self._index.search(torch.stack(list(answers)), max(ks))
        return [(scores_BK[i, :k], indices_BK[i, :k]) for i, k in enumerate(ks)]

    def health(self) -> Health:
        if self._model is None:
            return Health(False, "engine native is not loaded")
        if self._broken:
            return Health(False, f"the GPU failed, restart the server: {self._broken}")
        return Health(True)

    def close(self) -> None:
        self._model = None
        for layers in {id(layers): layers for layers in self._layers.values()}.values():
            layers.close()
        self._layers = {}
        self._index = None


def _on_host(answers: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same on the CPU, with one copy."""
    if all(answer.device.type == "cpu" for answer in answers):
        return answers
    flat = torch.cat([answer.flatten() for answer in answers]).cpu()
    parts = torch.split(flat, [answer.numel() for answer in answers])
    return [part.view(answer.shape) for part, answer in zip(parts, answers, strict=True)]


def _answer_rows(x_TD: Tensor, plan: BatchPlan) -> Tensor:
    rows_R = plan.answer_rows()
    if len(plan.sequences) == 1 and rows_R[0] >= 0:
        return x_TD[rows_R[0] : rows_R[-1] + 1]
    if not len(x_TD):
        return x_TD.new_zeros(len(rows_R), x_TD.shape[1])
    rows_RD = x_TD.index_select(0, placed(np.maximum(rows_R, 0), x_TD.device))
    absent = np.flatnonzero(rows_R < 0)
    if len(absent):
        rows_RD.index_fill_(0, placed(absent, x_TD.device), 0.0)
    return rows_RD


def _load_layers(
    model: StackModel,
    tasks: Sequence[Task],
    stack: Stack,
    options: EngineOptions,
    own: NativeOptions,
    threads: int,
) -> _Layers:
    device = torch.device(options.device)
    runner = make_stack(
        stack,
        options.dtype,
        threads=threads,
        isa=own.isa,
        device=options.device,
        kernels=own.kernels,
    )
    space = None
    # Caches that know no devices are not asked for any.
    on_device: dict[str, Any] = {}
    if device.type != "cpu":
        on_device = {"device": options.device, "layers": len(stack.layers)}
    cache = options.caches.get(CacheKind.USER_KV)
    if isinstance(cache, BlockCache):
        token_cost, pair_cost = costs(stack)
        space = cache.space(
            _namespace(model, runner, options.dtype),
            block_tokens=BLOCK_TOKENS,
            block_bytes=runner.block_bytes,
            token_cost=token_cost,
            pair_cost=pair_cost,
            **on_device,
        )
    logger.info(
        "%s/%s: engine native on %s, %d threads, K/V cache: %s",
        model.bundle.name,
        model.bundle.version,
        runner.name,
        threads,
        "none" if space is None else f"{model.prefix_stability.reusable} histories",
    )
    fitting = own.workspace(options.device) // _token_bytes(stack)
    return _Layers(
        runner=runner,
        ends=ends_of(model, device, tasks),
        space=space,
        scratch=Scratch(BLOCK_TOKENS, runner.block_bytes, options.device),
        stream=torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if device.type == "cuda"
        else None,
        max_tokens=max(1, min(options.max_batch_tokens, fitting)),
    )


def _token_bytes(stack: Stack) -> int:
    """Memory that a token needs while it is computed: its row, U, Q and a gated row, in float32."""
    width = stack.num_heads * (stack.d_qk + stack.d_v)
    return 4 * (stack.d_model + 2 * width)


def _namespace(model: Model, runner: HSTUStack, dtype: str) -> bytes:
    """What all K and V of a loaded model depend on besides the tokens."""
    digest = hashlib.blake2b(model.bundle.identity, digest_size=32)
    digest.update(f"|{runner.name}|{dtype}|{BLOCK_TOKENS}|".encode())
    if model.bundle.source is not None:
        # The weights may come from elsewhere and change without a trace in the bundle.
        digest.update(os.urandom(32))
    return digest.digest()
