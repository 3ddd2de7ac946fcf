"""The load, made by a process of its own: one JSON job a line in, one JSON result a line out.

Requests are encoded once and answers are not decoded, so that the client costs little and the same
for every server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
import numpy as np
from server_load.arrivals import closed_loop, open_loop, percentiles, poisson

from gr_core.types import History, RecommendRequest
from gr_serve_grpc.convert import message_from_request
from gr_serve_grpc.server import loop_factory

METHOD = "/gr.v1.RecommenderService/Recommend"
SIGNALS = ("watch_duration", "watch_percentage", "is_liked", "is_shared")
DISTINCT = 64
"""Different requests, sent in turn."""


def requests(rows: int, items: Sequence[int]) -> list[bytes]:
    generator = np.random.default_rng(7)
    return [
        message_from_request(
            RecommendRequest(
                History(
                    generator.choice(np.array(items, np.int64), rows),
                    1_700_000_000_000 + np.cumsum(generator.integers(1, 60_000, rows)),
                    {name: generator.random(rows, np.float32) for name in SIGNALS},
                )
                if rows
                else History(),
                user_id=f"user-{i}",
            )
        ).SerializeToString()
        for i in range(DISTINCT)
    ]


async def run(job: dict[str, Any]) -> dict[str, Any]:
    bodies = requests(job["rows"], job["items"])
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(METHOD)
        latencies: list[float] = []
        failures: list[str] = []
        sent = 0

        async def ask(number: int, since: float) -> None:
            nonlocal sent
            sent += 1
            try:
                await call(bodies[number % DISTINCT], timeout=30)
            except grpc.aio.AioRpcError as error:
                failures.append(error.code().name)
            else:
                latencies.append(time.perf_counter() - since)

        await closed_loop(ask, job["concurrency"] or 4, job["warm_up_s"])
        latencies.clear()
        if job["concurrency"]:
            seconds = await closed_loop(ask, job["concurrency"], job["seconds"])
        else:
            seconds = await open_loop(ask, poisson(job["rate"], job["seconds"], seed=11))
    return {
        "requests_per_s": len(latencies) / seconds,
        **percentiles(latencies, (50, 99)),
        "failures": len(failures),
        "sent": sent,
    }


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await run(json.loads(line))), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
