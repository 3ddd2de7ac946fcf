"""What goes wrong with vLLM's processes: noticed at once, never hung, restarted, cleaned up."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gr_core import Task
from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.engines import running
from gr_core.errors import DeadlineExceeded, PlanError, Unavailable
from gr_core.testing.suite import installed

from .engines import (
    NEEDED,
    OPTIONS,
    PAGE_BYTES,
    all_gone,
    check,
    check_struck,
    children,
    core_of,
    outcomes,
    planned,
    reference,
    some_requests,
    started,
)
from .in_process import LONGEST, Model, write_model

pytest.importorskip("vllm", reason=NEEDED)

LEAST_BYTES = (-(-(LONGEST + 1) // 32) + 1) * PAGE_BYTES
"""K and V of one of the longest prompts: only a few of them are computed at a time."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "gr-cache" / "faults"
    monkeypatch.setenv("GR_CACHE_DIR", str(folder))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return write_model(tmp_path, "research")


@pytest.fixture
def deployed(model: Model) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def deploy(**options: Any) -> Deployment:
        spec = ModelSpec("research", strategy="vllm", device="cpu", threads=1, options=options)
        made.append(Deployment.load(model.bundle, spec, Environment(installed())))
        return made[-1]

    yield deploy
    for deployment in made:
        deployment.close()


def until(true: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)


def many(model: Model, count: int = 128) -> list[EncodedRequest]:
    return some_requests(model, Task.RETRIEVE, [LONGEST - i % 50 for i in range(count)])


def in_flight(
    deployment: Deployment, requests: Sequence[EncodedRequest], strike: Callable[[], Any]
) -> Sequence[Any]:
    async def ask() -> Sequence[Any]:
        async def one(request: EncodedRequest) -> InferenceResult:
            return (await deployment.infer(Task.RETRIEVE, request, None)).result

        return await outcomes(one, requests, 0.01, strike)

    return asyncio.run(ask())


def answers_rightly(deployment: Deployment, model: Model) -> None:
    requests = many(model, 3)

    async def ask() -> list[InferenceResult]:
        return [(await deployment.infer(Task.RETRIEVE, one, None)).result for one in requests]

    check(requests, asyncio.run(ask()), reference(model, requests))


def test_a_killed_core_is_replaced(
    deployed: Callable[..., Deployment], model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    before = children()
    deployment = deployed(kv_cache_bytes=LEAST_BYTES)
    processes = sorted(children() - before, key=lambda process: process.pid)
    requests = many(model)
    right = reference(model, requests)
    assert deployment.health().ok

    # A deadline ends the request, and nothing else.
    async def late() -> list[Any]:
        soon = time.monotonic() + 0.02
        asked = [deployment.infer(Task.RETRIEVE, one, soon) for one in requests]
        return await asyncio.gather(*asked, return_exceptions=True)

    exceeded = [e for e in asyncio.run(late()) if isinstance(e, Exception)]
    assert exceeded
    assert all(isinstance(e, DeadlineExceeded) for e in exceeded), exceeded
    answers_rightly(deployment, model)

    # Killed amid requests: they can be tried again, at once.
    core = core_of(processes)
    struck = time.monotonic()
    check_struck(requests, in_flight(deployment, requests, core.kill), right)
    assert time.monotonic() - struck < 5
    assert not deployment.health().ok
    assert "died" in deployment.health().reason
    refused = in_flight(deployment, requests[:3], lambda: None)
    assert all(isinstance(e, Unavailable) for e in refused), refused
    until(lambda: deployment.health().ok, within_s=200)
    answers_rightly(deployment, model)
    assert all_gone(processes, within_s=1)
    (again,) = children() - before

    # Killed once more, and closed as it starts again.
    again.kill()
    until(lambda: "started again" in deployment.health().reason, within_s=5)
    deployment.close()
    assert "closed" in deployment.health().reason
    assert not children() - before
    deployment.close()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_killed_worker_of_two(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Ranks of their own processes; without a restart the engine stays down."""
    extra = {**OPTIONS, "tensor_parallel_size": 2, "restart": False}
    requests = many(model)
    right = reference(model, requests)
    with started(model, extra) as engine:
        assert len(engine.processes) == 3
        # Ctrl-C, which a terminal sends to all processes, is for the server, which drains first.
        for process in engine.processes:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        check(requests, engine.infer(requests), right)
        core = core_of(engine.processes)
        worker = next(process for process in engine.processes if process.ppid() == core.pid)
        found = engine.running.loop.run(
            outcomes(lambda one: engine.engine.infer(one, None), requests, 0.01, worker.kill)
        )
        check_struck(requests, found, right)
        until(lambda: not engine.engine.health().ok, within_s=5)
        until(lambda: "option restart is false" in engine.engine.health().reason, within_s=15)
        with pytest.raises(Unavailable, match="died"):
            engine.infer(requests[:1])
        assert all_gone(engine.processes)
        assert not engine.engine.health().ok
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3; expected a divisor"),
        ({"max_model_len": 30}, "max_model_len is 30; expected at least"),
        ({"kv_cache_bytes": LEAST_BYTES - 1}, f"kv_cache_bytes is .* at least {LEAST_BYTES}"),
        ({"max_num_seq": 1}, "no option 'max_num_seq'; there are: .*max_num_seqs"),
        # Nobody can know this before vLLM asks for it.
        (
            {"kv_cache_bytes": 1 << 50},
            "did not start on research: Available memory .* Decrease kv_cache_bytes",
        ),
    ],
)
def test_options_that_cannot_be_had(extra: Mapping[str, Any], message: str, model: Model) -> None:
    before = children(), threading.active_count()
    with (
        pytest.raises(PlanError, match=message),
        running(planned(model, Task.RETRIEVE), model, threads=1, extra=extra),
    ):
        pass
    assert not children() - before[0]
    until(lambda: threading.active_count() <= before[1], within_s=5)
