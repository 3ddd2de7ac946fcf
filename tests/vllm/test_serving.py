"""`gr serve` with the strategy ``vllm``: three models, a killed vLLM, metrics, and the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gr_core import RecommendRequest, Task
from gr_core.errors import GrError, Unavailable
from gr_hstu import testing
from gr_serve_grpc.client import Client, Retries

from .engines import NEEDED, all_gone, children, encoded, kind_of, psutil
from .in_process import Model, write_model

pytest.importorskip("vllm", reason=NEEDED)

K = 10
TASKS = {"research": Task.RETRIEVE, "ranking": Task.RANK, "sid": Task.GENERATE}
OPTIONS = "options = { kv_cache_bytes = 16777216, max_candidates = 16 }"
CONFIGURATION = """
[repository]
path = "models"

[[pipelines]]
name = "items"
retrieve = "research"
rank = "ranking"
generate = "sid"
default = true

[server.grpc]
health_interval_s = 0.1

[observers.prometheus]
port = {port}
""" + "".join(
    f'[[models]]\nname = "{name}"\nstrategy = "vllm"\nthreads = 1\n{OPTIONS}\n' for name in TASKS
)


@dataclass(frozen=True, slots=True)
class Server:
    address: str
    metrics: str
    process: subprocess.Popen[str]
    models: Mapping[str, Model]
    log: Path

    @property
    def cores(self) -> list[Any]:
        """vLLM's, of all models."""
        found = [p for p in children(self.process.pid) if p.ppid() == self.process.pid]
        return sorted(found, key=lambda process: process.pid)


@contextmanager
def serving(folder: Path, environment: Mapping[str, str], *options: str) -> Iterator[Any]:
    """A server's process and address; killed at the end if it still runs."""
    # The settings of vLLM are those of the platform, not those of these tests.
    clean = {name: value for name, value in environment.items() if not name.startswith("VLLM_")}
    command = ["gr", "serve", "--config", "gr.toml", "--port", "0", *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
    try:
        assert process.stdout is not None
        announcement = process.stdout.readline()
        assert announcement.startswith("serving on "), (folder / "log").read_text()
        yield process, announcement.removeprefix("serving on ").strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(
    environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    models = {name: write_model(folder / "models", name) for name in TASKS}
    port = 30_000 + os.getpid() % 20_000
    (folder / "gr.toml").write_text(CONFIGURATION.replace("{port}", str(port)))
    with serving(folder, environment) as (process, address):
        with Client(address) as client:
            client.wait_until_ready(timeout_s=200)
        yield Server(address, f"http://127.0.0.1:{port}/metrics", process, models, folder / "log")


def asked(task: Task, seed: int) -> RecommendRequest:
    request = testing.a_request(seed=seed, length=90, candidates=40)
    return replace(
        request,
        task=task,
        candidates=request.candidates if task is Task.RANK else None,
        k=40 if task is Task.RANK else K,
        include_seen=True,
    )


def expected(model: Model, request: RecommendRequest) -> dict[Any, float]:
    """Scores by item, as the reference gives them."""
    task = TASKS[kind_of(model)]
    encoding = model.encode(request, task)
    (result,) = testing.engine_of(model).infer([encoded(model, task, request, K)])
    scores, _ = model.decode(task, result, {})
    indices = encoding.candidate_indices if result.indices is None else result.indices
    return dict(zip(model.catalogue.ids_of(indices).tolist(), scores.tolist(), strict=True))


def check_answers(client: Client, server: Server, seed: int) -> None:
    for name, task in TASKS.items():
        request = asked(task, seed)
        answer = client.recommend(request)
        (stage,) = answer.stages
        assert (stage.engine, stage.task, stage.model) == ("vllm", task, name)
        right = expected(server.models[name], request)
        found = {item.item_id: item.score for item in answer.items}
        assert found.keys() == right.keys()
        scale = max(abs(score) for score in right.values())
        for item, score in found.items():
            assert score == pytest.approx(right[item], abs=1e-4 * scale), (name, item)


def test_answers_are_those_of_the_reference(server: Server) -> None:
    with Client(server.address, timeout_s=30) as client:
        for seed in range(3):
            check_answers(client, server, seed)
        # Both stages; the second time the history's state is found.
        request = replace(asked(Task.RETRIEVE, 7), task=None, include_seen=False)
        for reused in (False, True):
            answer = client.recommend(request)
            assert [stage.engine for stage in answer.stages] == ["vllm", "vllm"]
            assert [stage.tokens_reused > 0 for stage in answer.stages] == [reused, reused]


def test_metrics_of_vllm_join_the_platforms(server: Server) -> None:
    page = urllib.request.urlopen(server.metrics, timeout=10).read().decode()
    for name in TASKS:
        engine = f'{{engine="{name}/1/vllm"}}'
        counts = re.findall(rf"^(vllm:\w+){re.escape(engine)} (\S+)$", page, re.MULTILINE)
        values = {name: float(value) for name, value in counts}
        assert values["vllm:prompt_tokens_total"] > 0
        assert values["vllm:prefix_cache_queries_total"] > 0
        assert values["vllm:num_preemptions_total"] == 0
        assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= values.keys()


class Load(threading.Thread):
    """Asks one after another until it is told to stop; what came of it by name."""

    def __init__(self, server: Server, task: Task) -> None:
        super().__init__(daemon=True)
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._server, self._task = server, task
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        seed = 0
        with Client(self._server.address, timeout_s=30, retries=Retries(attempts=1)) as client:
            while not self._over.is_set():
                started = time.monotonic()
                seed += 1
                try:
                    client.recommend(asked(self._task, seed))
                    self.outcomes["answered"] += 1
                except Unavailable:
                    self.outcomes["unavailable"] += 1
                    time.sleep(0.05)
                except GrError as error:
                    self.outcomes[repr(error)] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def end(self) -> None:
        self._over.set()
        self.join()


def is_ready(client: Client) -> bool:
    try:
        client.wait_until_ready(timeout_s=0.3)
    except GrError:
        return False
    return True


def until(true: Any, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)


def test_a_killed_vllm_is_noticed_and_replaced(server: Server) -> None:
    load = [Load(server, task) for task in TASKS.values() for _ in range(3)]
    time.sleep(0.5)
    cores = server.cores
    assert len(cores) == len(TASKS)
    with Client(server.address, timeout_s=30) as client:
        cores[0].kill()
        until(lambda: not is_ready(client), within_s=5)
        client.wait_until_ready(timeout_s=200)
        for one in load:
            one.end()
        outcomes = sum((one.outcomes for one in load), Counter())
        assert set(outcomes) == {"answered", "unavailable"}, outcomes
        # Those of one model; the others went on.
        assert sum(one.outcomes["unavailable"] > 0 for one in load) == 3
        assert max(one.slowest_s for one in load) < 10
        check_answers(client, server, seed=50)
    assert len(server.cores) == len(TASKS)


def test_it_drains_and_leaves_nothing(server: Server) -> None:
    processes = children(server.process.pid)
    assert len(processes) >= len(TASKS)
    load = [Load(server, task) for task in TASKS.values() for _ in range(2)]
    time.sleep(0.5)
    os.killpg(server.process.pid, signal.SIGTERM)  # as `timeout` and shells do
    assert server.process.wait(timeout=60) == 0
    for one in load:
        one.end()
        assert set(one.outcomes) <= {"answered", "unavailable"}, one.outcomes
    assert all_gone(sorted(processes, key=lambda p: p.pid), within_s=1)
    stopping = server.log.read_text().partition("stopping: SIGTERM")[2]
    assert stopping
    assert "died" not in stopping, "vLLM did not live until the server had drained"


def test_nothing_outlives_a_killed_server(environment: Mapping[str, str], tmp_path: Path) -> None:
    write_model(tmp_path / "models", "research")
    model = f'[[models]]\nname = "research"\nstrategy = "vllm"\n{OPTIONS}\n'
    (tmp_path / "gr.toml").write_text(f'[repository]\npath = "models"\n{model}')
    with serving(tmp_path, environment) as (process, address):
        with Client(address) as client:
            client.wait_until_ready(timeout_s=200)
        processes = psutil.Process(process.pid).children(recursive=True)
        assert processes
        process.kill()
        process.wait()
        assert all_gone(processes, within_s=10)
