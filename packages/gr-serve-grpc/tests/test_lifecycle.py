"""Health, overload, shutdown, connections, reflection, metrics."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest
import serving_toy
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gr_core.errors import ConfigurationError, Overloaded, Unavailable
from gr_serve_grpc.client import AsyncClient, Retries
from gr_serve_grpc.metrics import PrometheusObserver, prometheus_observer
from gr_serve_grpc.server import HEALTH_NAMES, GrpcServer
from gr_serve_grpc.settings import PrometheusSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONCE = Retries(attempts=1)


async def health_of(channel: grpc.aio.Channel, name: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status


async def becomes(channel: grpc.aio.Channel, status: int) -> None:
    for _ in range(100):
        if await health_of(channel) == status:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"health did not become {status}")


# ── Health ───────────────────────────────────────────────────────────────────────────────────────


async def test_health_follows_the_models_and_the_shutdown(serve, control):
    control.healthy = False
    async with (
        serve(health_interval_s=0.05, drain_delay_s=0.4) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        assert await health_of(channel) == NOT_SERVING
        control.healthy = True
        await becomes(channel, SERVING)
        assert [await health_of(channel, name) for name in HEALTH_NAMES] == [SERVING] * 3
        control.healthy = False
        await becomes(channel, NOT_SERVING)
        control.healthy = True
        await becomes(channel, SERVING)
        running.stop.set()
        await becomes(channel, NOT_SERVING)
        assert not running.task.done()
        # Between the two, requests are still taken, for balancers are slow to notice.
        async with AsyncClient(running.address) as client:
            assert (await client.recommend()).items


async def test_health_is_not_serving_until_the_models_are_loaded(models: Path):
    pipeline = serving_toy.make_pipeline(models)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = GrpcServer(pipeline, {"port": 0, "health_interval_s": 0.05})
    task = asyncio.create_task(server.serve(stop, lambda a: ready.set_result(a[0])))
    async with grpc.aio.insecure_channel(await ready) as channel:
        assert await health_of(channel) == NOT_SERVING
        async with serving_toy.started(pipeline):
            await becomes(channel, SERVING)
            stop.set()
            await task


async def test_unknown_services_are_not_found(serve):
    async with serve() as running, grpc.aio.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel, "gr.v1.Nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# ── Overload ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_is_said_at_once_and_when_to_come_back(serve, control):
    control.gate.clear()
    async with serve(max_queue=1) as running, AsyncClient(running.address, retries=ONCE) as client:
        held = asyncio.create_task(client.recommend(user_id="wait"))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        queued = asyncio.create_task(client.recommend())
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded) as caught:
            await client.recommend(timeout_s=5)
        assert caught.value.retry_after_s > 0
        control.gate.set()
        assert (await held).items
        assert (await queued).items


async def test_too_many_requests_in_work(serve, control):
    control.gate.clear()
    async with (
        serve(max_concurrent_requests=2) as running,
        AsyncClient(running.address, retries=ONCE) as client,
    ):
        held = [asyncio.create_task(client.recommend(user_id="wait")) for _ in range(2)]
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="2 requests are in work") as caught:
            await client.recommend()
        assert caught.value.retry_after_s > 0
        async with grpc.aio.insecure_channel(running.address) as channel:
            assert await health_of(channel) == SERVING
        control.gate.set()
        assert all(await asyncio.gather(*held))


async def test_a_client_comes_back_when_the_server_says(serve, control):
    control.gate.clear()
    async with (
        serve(max_queue=1) as running,
        AsyncClient(running.address, retries=Retries(50)) as client,
    ):
        held = asyncio.create_task(client.recommend(user_id="wait"))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        queued = [asyncio.create_task(client.recommend(k=k)) for k in (1, 2, 3)]
        await asyncio.sleep(0.3)
        control.gate.set()
        answers = await asyncio.gather(held, *queued)
        assert [len(a.items) for a in answers] == [10, 1, 2, 3]


async def test_no_retries_beyond_the_deadline(unused_tcp_port: int):
    async with AsyncClient(f"127.0.0.1:{unused_tcp_port}", timeout_s=0.5) as client:
        started = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await client.recommend()
        assert asyncio.get_running_loop().time() - started < 1.5


# ── Shutdown ─────────────────────────────────────────────────────────────────────────────────────


async def test_accepted_requests_are_answered_and_new_ones_refused(serve, control):
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address, retries=ONCE) as client:
        held = [asyncio.create_task(client.recommend(user_id="wait")) for _ in range(5)]
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(running.finished())
        await asyncio.sleep(0.2)
        with pytest.raises(Unavailable):
            await client.recommend()
        assert not stopping.done()
        control.gate.set()
        assert all(answer.items for answer in await asyncio.gather(*held))
        await stopping


async def test_watchers_of_health_do_not_hold_up_the_shutdown(serve):
    async with serve() as running, grpc.aio.insecure_channel(running.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        started = asyncio.get_running_loop().time()
        await running.finished()
        assert asyncio.get_running_loop().time() - started < 3


async def test_requests_that_never_finish_are_cut_off(serve, control):
    control.gate.clear()
    async with serve(drain_grace_s=0.3) as running, AsyncClient(running.address) as client:
        held = asyncio.create_task(client.recommend(user_id="wait"))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        await running.finished()
        with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do
            await asyncio.wait_for(held, 5)


SCRIPT = """
import asyncio, signal, sys
from pathlib import Path
import serving_toy
from gr_serve_grpc.server import GrpcServer

async def main():
    pipeline = serving_toy.make_pipeline(Path(sys.argv[1]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    answer = pipeline.recommend

    async def slowly(request):
        print("accepted", request.request_id, flush=True)
        await asyncio.sleep(0.02)
        return await answer(request)

    pipeline.recommend = slowly
    async with serving_toy.started(pipeline):
        server = GrpcServer(pipeline, {"port": 0})
        await server.serve(stop, lambda addresses: print("ready", addresses[0], flush=True))

with asyncio.Runner(loop_factory=GrpcServer.loop_factory) as runner:
    runner.run(main())
print("stopped", flush=True)
"""


async def test_sigterm_under_load_loses_nothing_that_was_accepted(models: Path):
    """A server process, 16 clients that never stop asking, SIGTERM."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(SCRIPT), str(models),
        stdout=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert server.stdout is not None
    line = (await asyncio.wait_for(server.stdout.readline(), 30)).decode().split()
    assert line[0] == "ready"
    answered: set[str] = set()
    refused: set[str] = set()

    async def ask(name: int) -> None:
        async with AsyncClient(line[1], retries=ONCE) as client:
            for i in range(100_000):
                request_id = f"{name}-{i}"
                try:
                    await client.recommend(request_id=request_id, timeout_s=10)
                    answered.add(request_id)
                except Unavailable:
                    refused.add(request_id)
                    return

    asking = asyncio.gather(*(ask(i) for i in range(16)))
    while len(answered) < 200:
        await asyncio.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    await asyncio.wait_for(asking, 20)
    output, _ = await asyncio.wait_for(server.communicate(), 20)
    accepted = set(re.findall(r"accepted (\S+)", output.decode()))
    assert output.decode().endswith("stopped\n")
    assert server.returncode == 0
    assert accepted <= answered
    assert len(refused) == 16


# ── Settings of the port ─────────────────────────────────────────────────────────────────────────


async def test_a_port_in_use_is_an_error(serve):
    async with serve() as running:
        port = int(running.address.rsplit(":", 1)[1])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with serve(port=port):
                pass


async def test_processes_may_share_a_port(serve):
    async with serve(reuse_port=True) as running:
        port = int(running.address.rsplit(":", 1)[1])
        async with serve(port=port, reuse_port=True):
            pass


async def test_connections_grow_old_and_no_request_suffers(serve):
    async with (
        serve(max_connection_age_s=0.2) as running,
        AsyncClient(running.address, retries=ONCE) as client,
    ):
        started = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - started < 1.5:
            assert (await client.recommend(k=1)).items


# ── Reflection ───────────────────────────────────────────────────────────────────────────────────


async def described(address: str, *requests: reflection_pb2.ServerReflectionRequest):
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        return [answer async for answer in stub.ServerReflectionInfo(iter(requests), timeout=5)]


async def test_reflection_can_be_switched_off(serve):
    ask = reflection_pb2.ServerReflectionRequest
    async with serve() as running:
        services, file = await described(
            running.address,
            ask(list_services=""),
            ask(file_containing_symbol="gr.v1.RecommenderService"),
        )
        names = {service.name for service in services.list_services_response.service}
        assert {"gr.v1.RecommenderService", "gr.v1.CacheService"} < names
        assert file.file_descriptor_response.file_descriptor_proto
    async with serve(reflection=False) as running:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await described(running.address)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────


def scrape(observer: PrometheusObserver) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{observer.address}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


async def test_metrics_of_calls_stages_batches_and_queues(serve):
    observer = prometheus_observer({"port": 0})
    try:
        async with serve(observers=[observer]) as running, AsyncClient(running.address) as client:
            for _ in range(3):
                await client.recommend(candidates=[1, 2])
            for bad in ({"k": 0}, {"model": "films"}, {"user_id": "poison"}):
                with pytest.raises(Exception):  # noqa: B017, PT011 - its metric is looked at
                    await client.recommend(**bad)
            metrics = await asyncio.to_thread(scrape, observer)
            page = "\n".join(metrics)
        call = 'grpc_method="Recommend",grpc_service="gr.v1.RecommenderService",grpc_type="unary"'
        assert metrics[f"grpc_server_started_total{{{call}}}"] == 6
        for code, count in (("OK", 3), ("InvalidArgument", 1), ("NotFound", 1), ("Internal", 1)):
            label = call.replace("grpc_method", f'grpc_code="{code}",grpc_method', 1)
            assert metrics[f"grpc_server_handled_total{{{label}}}"] == count
        assert metrics[f"grpc_server_handling_seconds_count{{{call}}}"] == 6
        stage = 'engine="toy",model="numbers",task="rank",version="1"'
        assert metrics[f"gr_stage_compute_seconds_count{{{stage}}}"] == 3
        assert metrics[f"gr_tokens_reused_total{{{stage}}}"] == 3
        assert metrics[f"gr_batch_size_count{{{stage}}}"] >= 3
        assert metrics['gr_queue_depth{queue="numbers/1/toy"}'] == 0
        assert metrics['toy:items{engine="numbers/1/toy"}'] == 50
        assert metrics['toy:answers_total{engine="texts/1/toy"}'] >= 3
        assert metrics['gr_model_loads_total{model="texts",state="ready",version="1"}'] == 1
        assert "films" not in page, "labels must not come from requests"
        # Once the server is gone, so are the gauges of its pipeline.
        assert "gr_queue_depth" not in "".join(await asyncio.to_thread(scrape, observer))
    finally:
        observer.close()


def test_the_metrics_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            PrometheusObserver(PrometheusSettings(port=port)).listen()


async def test_the_access_log_has_ids_and_no_user_data(serve, caplog):
    caplog.set_level("INFO", "gr_serve_grpc")
    async with serve(access_log=True) as running, AsyncClient(running.address) as client:
        await client.recommend(user_id="alice", request_id="r-1", candidates=[987654321])
        with pytest.raises(Exception):  # noqa: B017, PT011 - its line is looked at
            await client.recommend(user_id="alice", request_id="r-2", k=0)
    lines = [r for r in caplog.records if r.name == "gr_serve_grpc.calls"]
    assert [(r.request_id, r.code) for r in lines] == [("r-1", "OK"), ("r-2", "INVALID_ARGUMENT")]
    assert all(
        "alice" not in str(vars(r)) and "987654321" not in str(vars(r)) for r in caplog.records
    )


def test_importing_the_plugin_loads_no_grpc():
    code = "import sys, gr_serve_grpc.plugin; print('grpc' in sys.modules, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
