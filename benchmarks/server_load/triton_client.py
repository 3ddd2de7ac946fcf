"""The load on Triton and on `gr serve`, by a process of its own: one JSON job a line in, one out.

Both get the same requests, encoded once, over channels of the same kind; while time is taken,
answers are not decoded. The job ``check`` asks for everything once and does decode the answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc.aio
from server_load.arrivals import closed_loop, percentiles
from tritonclient.grpc import service_pb2

from gr_core.plugins.host import PluginHost
from gr_core.repository import ModelRepository
from gr_core.samples import for_task, sample_requests
from gr_core.types import RecommendRequest, Task
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc.convert import message_from_request, recommendation_from_message
from gr_serve_grpc.server import loop_factory
from gr_trt.triton.requests import request_text

METHODS = {
    "triton": "/inference.GRPCInferenceService/ModelInfer",
    "gr": "/gr.v1.RecommenderService/Recommend",
}
DISTINCT = 64
"""Different requests, sent in turn."""

Items = list[tuple[Any, float]]
Checked = tuple[Items, str]
"""Items with their scores, and the engine that computed them."""


def requests(models: str, name: str, task: str) -> Sequence[RecommendRequest]:
    """Users of the bundle, none of whom is known by name, so that nothing is kept of them."""
    bundle = ModelRepository(models).bundle(name)
    model = PluginHost.discover().registry.models[bundle.architecture].resolve()(bundle)
    return [
        replace(for_task(request, Task(task)), model=name, user_id="", request_id=str(i))
        for i, request in enumerate(sample_requests(model, DISTINCT))
    ]


def bodies(protocol: str, job: dict[str, Any]) -> list[bytes]:
    asked = requests(job["models"], job["model"], job["task"])
    if protocol == "gr":
        return [message_from_request(request).SerializeToString() for request in asked]
    tensor = service_pb2.ModelInferRequest.InferInputTensor
    encoded = []
    for text in map(request_text, asked):
        message = service_pb2.ModelInferRequest(
            model_name=f"{job['model']}-{job['task']}",
            inputs=[tensor(name="request", datatype="BYTES", shape=[1, 1])],
            raw_input_contents=[len(text).to_bytes(4, "little") + text],
        )
        encoded.append(message.SerializeToString())
    return encoded


def checked(protocol: str, answer: bytes) -> Checked:
    if protocol == "gr":
        found = recommendation_from_message(pb.RecommendResponse.FromString(answer))
        return [(item.item_id, item.score) for item in found.items], found.stages[0].engine
    output = service_pb2.ModelInferResponse.FromString(answer).raw_output_contents[0]
    said = json.loads(output[4:])
    items = [(item["item_id"], item["score"]) for item in said["items"]]
    return items, said["stages"][0]["engine"]


async def run(job: dict[str, Any], kept: dict[Any, list[bytes]]) -> dict[str, Any]:
    protocol = job["protocol"]
    key = (protocol, job["model"], job["task"])
    if key not in kept:
        kept[key] = bodies(protocol, job)
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(METHODS[protocol])
        if job.get("check"):
            found = [checked(protocol, await call(body, timeout=60)) for body in kept[key]]
            return {"items": [items for items, _ in found], "engine": found[0][1]}
        return await load(job, call, kept[key])


async def load(job: dict[str, Any], call: Callable[..., Any], sent: list[bytes]) -> dict[str, Any]:
    latencies: list[float] = []
    failures: list[str] = []
    asked = 0

    async def ask(number: int, since: float) -> None:
        nonlocal asked
        asked += 1
        try:
            await call(sent[number % DISTINCT], timeout=30)
        except grpc.aio.AioRpcError as error:
            failures.append(error.code().name)
        else:
            latencies.append(time.perf_counter() - since)

    await closed_loop(ask, job["concurrency"], job["warm_up_s"])
    latencies.clear()
    seconds = await closed_loop(ask, job["concurrency"], job["seconds"])
    return {
        "requests_per_s": len(latencies) / seconds,
        **percentiles(latencies, (50, 99)),
        "failures": len(failures),
        "sent": asked,
    }


async def main() -> None:
    loop = asyncio.get_running_loop()
    kept: dict[Any, list[bytes]] = {}
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await run(json.loads(line), kept)), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
