"""The engine ``vllm`` on the real vLLM: its contract, exact answers, generation, a full pool."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_core import Task
from gr_core import engines as core_engines
from gr_core import parity as core_parity
from gr_core.contracts import EncodedRequest, InferenceResult, Model
from gr_core.devices import Device, Machine
from gr_core.engines import RunningEngine
from gr_core.generation import GenerativeModel
from gr_core.planner import Plan, plan
from gr_core.repository import Bundle
from gr_core.testing import EngineSuite
from gr_core.testing import engines as core_suite
from gr_core.testing.suite import installed
from gr_hstu import testing

from .engines import (
    MAX_CANDIDATES,
    NEEDED,
    OPTIONS,
    TASKS,
    Pool,
    all_gone,
    check,
    check_struck,
    children,
    encoded,
    outcomes,
    pool,
    reference,
    some_requests,
)
from .in_process import LONGEST

pytest.importorskip("vllm", reason=NEEDED)

__all__ = ["pool"]
BLOCK = 32
CASES = [(kind, task) for kind, tasks in TASKS.items() for task in tasks]


# ── The contract of engines ───────────────────────────────────────────────────────────────────

_IS_SHOWN = "starts another vLLM; shown with research, and the same for all models"


class _Suite(EngineSuite):
    """Its cases share the engine of the pool: to start one takes seconds."""

    engine = "vllm"
    device = "cpu"
    dtype = "float32"
    options: ClassVar[Mapping[str, Any]] = OPTIONS
    artifacts = "vllm"
    kind: ClassVar[str]

    @pytest.fixture
    def bundle(self, pool: Pool) -> Bundle:
        return pool(self.kind).model.bundle

    @pytest.fixture(autouse=True)
    def _shared(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        def running(
            chosen: Plan, model: Model, *, threads: int = 0, extra: Any = None
        ) -> AbstractContextManager[RunningEngine]:
            if chosen.engine.name != self.engine or "no_such_option" in (extra or {}):
                return core_engines.running(chosen, model, threads=threads, extra=extra)
            return _Lent(replace(pool(self.kind).running, plan=chosen))

        monkeypatch.setattr(core_suite, "running", running)
        monkeypatch.setattr(core_parity, "running", running)


class _Lent(AbstractContextManager[RunningEngine]):
    """An engine that somebody else closes."""

    def __init__(self, engine: RunningEngine) -> None:
        self._engine = engine

    def __enter__(self) -> RunningEngine:
        return self._engine

    def __exit__(self, *error: object) -> None:
        """It goes on."""


class TestResearch(_Suite):
    kind = "research"


class TestRanking(_Suite):
    kind = "ranking"
    skip: ClassVar[Mapping[str, str]] = {
        "its_life": _IS_SHOWN,
        "a_closed_engine_is_unavailable": _IS_SHOWN,
    }


class TestMtgr(_Suite):
    kind = "mtgr"
    skip: ClassVar[Mapping[str, str]] = TestRanking.skip


class TestSemanticIds(_Suite):
    kind = "sid"
    skip: ClassVar[Mapping[str, str]] = TestRanking.skip


# ── Exact answers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_mixed_lengths_at_once_cold_and_warm(kind: str, task: Task, pool: Pool) -> None:
    """Of ranking, some have more candidates than one prompt takes."""
    engine = pool(kind)
    requests = some_requests(engine.model, task)
    assert task is not Task.RANK or max(map(_candidates, requests)) > 2 * MAX_CANDIDATES
    right = reference(engine.model, requests)
    for _ in ("cold", "warm", "warm again"):
        found = engine.infer(requests)
        check(requests, found, right)
    for request, result in zip(requests, found, strict=True):
        tokens = engine.model.sequence(request).history
        # Of what has no candidates of its own, the last token's output is the answer.
        reusable = tokens if kind in ("ranking", "mtgr") else tokens - 1
        assert result.tokens_reused == max(0, reusable) // BLOCK * BLOCK
    assert any(result.tokens_reused > 2 * BLOCK for result in found)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_history_that_grows(kind: str, task: Task, pool: Pool) -> None:
    engine = pool(kind)
    user = 100 + CASES.index((kind, task))  # whom the engine does not know yet
    whole = testing.a_request(seed=user, length=120, candidates=12)
    reused = []
    tokens = 3 if kind == "sid" else 1  # of a behaviour
    for length in (40 // tokens, 41 // tokens + 1, 75 // tokens, 120 // tokens):
        grown = replace(whole, history=_first(whole.history, length))
        requests = [encoded(engine.model, task, grown)]
        found = engine.infer(requests)
        check(requests, found, reference(engine.model, requests))
        reused.append(found[0].tokens_reused)
    assert reused[0] == 0
    if engine.model.prefix_stability.reusable == "growing":
        assert all(later >= BLOCK for later in reused[1:]), reused


@pytest.mark.parametrize("kind", [kind for kind, tasks in TASKS.items() if Task.RANK in tasks])
def test_candidates_that_repeat(kind: str, pool: Pool) -> None:
    """The same item gets the same score, wherever it stands, in one prompt or in several."""
    engine = pool(kind)
    few = testing.IDS[:7]
    ask = testing.a_request(seed=3, length=50, candidates=few)
    assert ask.candidates is not None
    order = np.random.default_rng(0).integers(0, len(few), 5 * MAX_CANDIDATES)
    many = replace(ask, candidates=_chosen(ask.candidates, order))
    requests = [encoded(engine.model, Task.RANK, request) for request in (ask, many)]
    one, repeated = engine.infer(requests)
    check(requests, [one, repeated], reference(engine.model, requests))
    np.testing.assert_allclose(repeated.scores, one.scores[order], rtol=0, atol=1e-4)


def _candidates(request: EncodedRequest) -> int:
    return len(request.arrays["candidate_items"])


def _first(history: Any, count: int) -> Any:
    signals = {name: values[:count] for name, values in history.signals.items()}
    return replace(
        history,
        item_ids=history.item_ids[:count],
        timestamps_ms=history.timestamps_ms[:count],
        signals=signals,
    )


def _chosen(candidates: Any, order: Any) -> Any:
    features = {name: values[order] for name, values in candidates.features.items()}
    return replace(candidates, item_ids=candidates.item_ids[order], features=features)


# ── Generation ────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def exhaustive(model: GenerativeModel, request: EncodedRequest) -> Any:
    """Log-probability of every item (I,), in float64 from the module's for each of its prefixes."""
    module = model.module(Task.GENERATE)
    inputs = {
        spec.name: torch.from_numpy(request.arrays[spec.name])[None]
        for spec in model.inputs(Task.GENERATE)
    }
    codes_IL = torch.from_numpy(model.item_tokens()[1:].astype(np.int64))
    scores = np.zeros(len(codes_IL))
    for level, tokens in enumerate(model.levels):
        for item, codes in enumerate(codes_IL):
            log_probs = module(**inputs, prefixes=codes[None, :level])[0]
            scores[item] += float(log_probs[int(codes[level]) - tokens.start])
    return scores


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_wide_search_is_exhaustive(length: int, pool: Pool) -> None:
    """All items are found, those that share their codes among them, in the order of all scores."""
    engine = pool("sid")
    model = engine.model
    items = len(model.catalogue)
    codes = model.item_tokens()[1:]
    assert len(np.unique(codes, axis=0)) < items, "some items share their codes"
    ask = testing.a_request(seed=length, length=length)
    request = encoded(model, Task.GENERATE, ask, k=items)
    (found,) = engine.infer([request])
    right = exhaustive(model, request)
    assert found.indices is not None
    assert sorted(found.indices.tolist()) == list(range(1, items + 1))
    np.testing.assert_allclose(found.scores, right[found.indices - 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.scores, np.sort(right)[::-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 8, 13, 30])
def test_a_narrow_search_is_that_of_torch(k: int, pool: Pool) -> None:
    engine = pool("sid")
    model = engine.model
    requests = [
        encoded(model, Task.GENERATE, testing.a_request(seed=i, length=3 * i), k=k)
        for i in range(12)
    ]
    found = engine.infer(requests)
    torchs = testing.engine_of(model)
    for request, result in zip(requests, found, strict=True):
        (other,) = torchs.infer([request])
        np.testing.assert_allclose(result.scores, other.scores, rtol=0, atol=1e-4)
    check(requests, found, reference(model, requests))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    histories=st.lists(st.lists(st.sampled_from(testing.IDS), max_size=60), min_size=1, max_size=5),
    k=st.integers(1, testing.ITEMS + 5),
)
def test_never_an_item_that_is_none(histories: Sequence[Sequence[int]], k: int, pool: Pool) -> None:
    engine = pool("sid")
    model = engine.model
    requests = []
    for history in histories:
        ask = testing.a_request(seed=0, length=len(history))
        items = np.array(history, np.int64)
        ask = replace(ask, history=replace(ask.history, item_ids=items))
        requests.append(encoded(model, Task.GENERATE, ask, k=k))
    for result in engine.infer(requests):
        assert result.indices is not None
        assert len(set(result.indices.tolist())) == len(result.indices) == min(k, testing.ITEMS)
        assert result.indices.min() >= 1
        assert result.indices.max() <= testing.ITEMS
        assert np.isfinite(result.scores).all()
        assert (np.diff(result.scores) <= 0).all()


# ── Many, wrong and cancelled requests ────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_four_times_what_the_pool_holds(kind: str, task: Task, pool: Pool) -> None:
    """256 long histories, and memory for K and V of about 64: all are answered, none wrong.

    vLLM is held until all have been sent, or a quick one would never have them all at once.
    """
    engine = pool(kind)
    lengths = np.random.default_rng(1).integers(LONGEST - 20, LONGEST, 256)
    requests = [
        encoded(engine.model, task, testing.a_request(seed=1000 + i, length=int(length)))
        for i, length in enumerate(lengths)
    ]
    preempted = engine.count("num_preemptions")
    waiting = 0.0

    async def everything() -> Sequence[InferenceResult]:
        nonlocal waiting
        held = children()
        for process in held:
            process.suspend()
        try:
            tasks = [asyncio.ensure_future(engine.engine.infer(one, None)) for one in requests]
            await asyncio.sleep(2.0)
        finally:
            for process in held:
                process.resume()
        while not all(task.done() for task in tasks):
            waiting = max(waiting, engine.count("num_requests_waiting"))
            await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    found = engine.running.loop.run(everything())
    preempted = engine.count("num_preemptions") - preempted
    assert waiting > 0 or preempted > 0, f"{waiting} waited, {preempted} were preempted"
    check(requests, found, reference(engine.model, requests))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("kind", TASKS)
def test_a_poisoned_request_fails_alone(kind: str, pool: Pool) -> None:
    engine = pool(kind)
    task = TASKS[kind][-1]
    good = some_requests(engine.model, task, (40, 3, 150, 33))
    right = reference(engine.model, good)
    (long,) = some_requests(engine.model, task, (50,))
    history = "history_tokens" if kind == "sid" else "history_items"
    poisons = {
        "a large id": _poisoned(long, history, lambda ids: ids + 10_000),
        "a negative id": _poisoned(long, history, lambda ids: -ids),
        "not a number": _poisoned(long, history, lambda ids: np.full(len(ids), np.nan)),
    }
    if task is Task.RANK:
        poisons["an unknown candidate"] = _poisoned(long, "candidate_items", lambda i: i + 10_000)
    for name, poison in poisons.items():
        *others, failed = engine.running.loop.run(_together(engine, [*good, poison]))
        check(good, others, right)
        assert isinstance(failed, ValueError), f"{name}: {failed!r}"
        assert any(word in str(failed) for word in ("has the id", "no row for", "is item")), failed
    assert engine.engine.health().ok


def test_a_prompt_that_is_too_long_fails_alone(pool: Pool) -> None:
    for kind in ("research", "sid"):
        engine = pool(kind)
        task = TASKS[kind][0]
        good = some_requests(engine.model, task, (40, 150))
        (long,) = some_requests(engine.model, task, (LONGEST,))
        arrays = {
            name: np.concatenate([array, array]) if array.ndim else array * 2
            for name, array in long.arrays.items()
            if name != "request_time"
        }
        if "request_time" in long.arrays:
            arrays["request_time"] = long.arrays["request_time"]
        longer = replace(long, arrays=arrays)
        *others, failed = engine.running.loop.run(_together(engine, [*good, longer]))
        check(good, others, reference(engine.model, good))
        assert isinstance(failed, ValueError), repr(failed)
        assert "longer than the maximum model length" in str(failed)


async def _together(engine: Any, requests: Sequence[EncodedRequest]) -> Sequence[Any]:
    return await asyncio.gather(
        *(engine.engine.infer(request, None) for request in requests), return_exceptions=True
    )


def _poisoned(request: EncodedRequest, name: str, change: Any) -> EncodedRequest:
    return replace(request, arrays={**request.arrays, name: change(request.arrays[name])})


@pytest.mark.parametrize(("kind", "task"), [("research", Task.RETRIEVE), ("sid", Task.GENERATE)])
def test_what_is_cancelled_is_aborted(kind: str, task: Task, pool: Pool) -> None:
    engine = pool(kind)
    requests = some_requests(engine.model, task, [LONGEST - i % 50 for i in range(128)])
    (last,) = some_requests(engine.model, task, (77,))

    async def cancelled() -> tuple[int, float]:
        tasks = [asyncio.ensure_future(engine.engine.infer(one, None)) for one in requests]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        started = time.monotonic()
        check([last], [await engine.engine.infer(last, None)], reference(engine.model, [last]))
        return sum(isinstance(e, asyncio.CancelledError) for e in ended), time.monotonic() - started

    count, wall_s = engine.running.loop.run(cancelled())
    assert count > len(requests) // 4
    assert wall_s < 2
    end = time.monotonic() + 5
    while engine.count("num_requests_running") + engine.count("num_requests_waiting"):
        assert time.monotonic() < end, "what was cancelled still runs"
        time.sleep(0.01)


# ── Planning ──────────────────────────────────────────────────────────────────────────────────

WITH_GPU = Machine((Device("cpu", "a CPU"), Device("cuda:0", "a GPU")))


@pytest.mark.parametrize(("architecture", "task"), [("hstu", Task.RETRIEVE), ("mtgr", Task.RANK)])
def test_auto_takes_what_is_quicker_on_a_cpu(architecture: str, task: Task) -> None:
    pytest.importorskip("gr_kernels", reason="gr-kernels is not installed")
    chosen = plan(installed(), architecture, task, device="cpu")
    assert chosen.engine.name == "native", chosen.summary()
    (lost,) = [c for c in chosen.considered if c.engine.name == "vllm" and c.device == "cpu"]
    assert lost.feasible
    assert "priority 5" in lost.verdict


def test_what_is_built_for_another_device_is_explained() -> None:
    chosen = plan(installed(), "hstu", Task.RETRIEVE, on=WITH_GPU)
    lost = [c for c in chosen.considered if c.engine.name == "vllm" and c.device == "cuda"]
    assert lost
    assert all("pip install 'gr-vllm[cuda]'" in c.verdict for c in lost), lost[0].verdict


# ── The end, of an engine of the pool ─────────────────────────────────────────────────────────


def test_closing_amid_requests(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """They are answered or fail at once; no process is left, and no task."""
    engine = pool("research")
    assert engine.processes
    requests = some_requests(engine.model, Task.RETRIEVE, [LONGEST - i % 50 for i in range(128)])
    right = reference(engine.model, requests)

    async def closed() -> Sequence[Any]:
        closing: list[asyncio.Task[None]] = []

        def close() -> None:
            for _ in range(2):  # as two threads may
                closing.append(asyncio.ensure_future(asyncio.to_thread(engine.engine.close)))

        found = await outcomes(lambda one: engine.engine.infer(one, None), requests, 0.01, close)
        await asyncio.gather(*closing)
        return found

    with caplog.at_level(logging.WARNING):
        started = time.monotonic()
        check_struck(requests, engine.running.loop.run(closed()), right)
        assert time.monotonic() - started < 10
    assert all_gone(engine.processes, within_s=1)
    assert not engine.engine.health().ok
    engine.engine.close()
    assert not [record for record in caplog.records if record.name in ("asyncio", "vllm")]
