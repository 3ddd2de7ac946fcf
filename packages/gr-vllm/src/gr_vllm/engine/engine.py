"""The engine ``vllm``: loads a model directory into vLLM and asks it.

vLLM batches, caches and schedules; this only translates, and watches that it lives.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gr_core.contracts import (
    Artifact,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Measurement,
    Model,
)
from gr_core.errors import DeadlineExceeded, PlanError, Unavailable
from gr_core.samples import for_task, sample_requests
from gr_core.stack import StackModel
from gr_core.types import Task
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.engine.answers import Answers, answers
from gr_vllm.engine.options import Sizes, VllmOptions
from gr_vllm.engine.process import VllmProcess
from gr_vllm.engine.start import start
from gr_vllm.export.options import ExportSettings
from gr_vllm.prompts import Prompts

if TYPE_CHECKING:
    from gr_vllm.engine.measurements import Counts

logger = logging.getLogger(__name__)

EXPORT_OPTIONS = frozenset(field.name for field in fields(ExportSettings))
"""A chain's exporter and engine get the same options; each refuses only what neither knows."""


class VllmEngine:
    """Implements `gr_core.contracts.AsyncEngine`; its options are those of `VllmOptions`."""

    def __init__(self) -> None:
        self._process: VllmProcess | None = None
        self._answers: Answers | None = None
        self._model: StackModel | None = None
        self._tasks: Sequence[Task] = ()
        self._counts: Counts | None = None

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        own = VllmOptions.of(options.extra, foreign=EXPORT_OPTIONS)
        if not isinstance(model, StackModel):
            raise PlanError(f"engine vllm: {type(model).__name__} does not open its stack")
        checkpoint = Checkpoint.read(artifact.path)
        sizes = Sizes.of(own, checkpoint, options.device)
        from gr_vllm.engine.measurements import Counts

        name = f"engine vllm of {checkpoint.name}/{checkpoint.version}"
        counts = Counts()

        def make() -> Any:
            counts.start()
            return start(
                artifact.path,
                checkpoint,
                own,
                sizes,
                options.device,
                options.threads,
                [lambda *_: counts],
            )

        prompts = Prompts(checkpoint, model)
        self._answers = answers(checkpoint.role, model, prompts, sizes.max_candidates)
        self._process = VllmProcess(name, make, restart=own.restart)
        self._counts = counts
        self._model = model
        self._tasks = tasks
        logger.info("%s: %s, prompts of %s, %s", name, checkpoint.role, checkpoint.tokens, sizes)

    def warm_up(self) -> None:
        """Runs each task with histories from none to long, as the model itself encodes them."""
        assert self._model is not None
        for request in sample_requests(self._model, 3):
            for task in self._tasks:
                encoded = self._model.encode(for_task(request, task), task).request
                self._submit(encoded).result()

    def _submit(self, request: EncodedRequest) -> concurrent.futures.Future[InferenceResult]:
        process, translate = self._process, self._answers
        if process is None or translate is None:
            raise Unavailable(self.health().reason or "engine vllm is closed")
        return process.submit(lambda llm: translate.answer(llm, request))

    async def infer(self, request: EncodedRequest, deadline: float | None) -> InferenceResult:
        """The platform cancels what is late, and vLLM aborts what is cancelled.

        Raises `ValueError` for arrays that no request of this model has, and `Unavailable` while
        vLLM is down.
        """
        if deadline is not None and deadline <= time.monotonic():
            raise DeadlineExceeded("engine vllm: the deadline passed before vLLM was asked")
        return await asyncio.wrap_future(self._submit(request))

    def measurements(self) -> Sequence[Measurement]:
        """Counts go on where they were when vLLM is started again."""
        return [] if self._counts is None else self._counts.measurements()

    def health(self) -> Health:
        if self._process is None:
            return Health(False, "engine vllm is not loaded")
        return self._process.health()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._answers = None
        self._model = None
