"""The load of returning users, made by a process of its own: a JSON job in, a JSON result out.

A job names one of the `WAYS` in which users ask:

- ``whole``: each visit brings the whole history.
- ``handle``: each visit brings the handle of the answer before it, and only what is new. Where the
  server knows the handle no more, or the answer before is not there yet, the whole history is sent;
  both attempts count into the latency.
- ``new``: every request is the first one of another user, with the whole history.

Messages are made before time is taken, as their columns are what a client would hold. A request's
latency begins when it is due and ends when its answer is parsed; in between the client puts the
handle into the message, encodes it, sends it, and parses the answer. Before time is taken every
returning user has been there once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from server_load.arrivals import each_once, open_loop, percentiles, poisson
from server_load.processes import cpu_seconds
from server_load.users import User, Visits

from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2_grpc as pb_grpc
from gr_serve_grpc.convert import message_from_request
from gr_serve_grpc.server import loop_factory

WAYS = ("whole", "handle", "new")
CALLERS = 4
"""That ask at once before time is taken."""
WARM_UP = 20
"""Requests before time is taken where users do not return."""


@dataclass
class Visitor:
    """A user with what the client knows between visits."""

    user: User
    handle: bytes = b""
    is_waiting: bool = False
    """For an answer."""
    visits: int = 0
    """Made so far; used where users come in no order that is known before."""


@dataclass
class Tally:
    """What came back."""

    latencies: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    resent: int = 0
    """Whole histories sent because a handle was not known, or not there yet."""
    tokens: int = 0
    reused: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    stages: int = 0
    batched: int = 0
    """Sum over the stages of the sizes of their batches."""

    def add(self, answer: pb.RecommendResponse, seconds: float) -> None:
        self.latencies.append(seconds)
        for stage in answer.stages:
            self.tokens += stage.tokens
            self.reused += stage.tokens_reused
            self.queue_s += stage.queue_seconds
            self.compute_s += stage.compute_seconds / max(1, stage.batch_size)
            self.stages += 1
            self.batched += stage.batch_size

    def summary(self, seconds: float) -> dict[str, Any]:
        answered = len(self.latencies)
        each = max(1, answered)
        return {
            "requests_per_s": answered / seconds,
            **percentiles(self.latencies),
            "sent": self.sent,
            "answered": answered,
            "failures": dict(self.failures),
            "resent": self.resent,
            "reused": self.reused / max(1, self.tokens),
            "queue_ms": 1e3 * self.queue_s / each,
            "compute_ms": 1e3 * self.compute_s / each,
            "batch": self.batched / max(1, self.stages),
        }


class Asker:
    """Sends the requests of visitors over one channel."""

    def __init__(self, channel: grpc.aio.Channel, way: str, timeout_s: float) -> None:
        self._recommend = pb_grpc.RecommenderServiceStub(channel).Recommend  # type: ignore[no-untyped-call]
        self._by_handle = way == "handle"
        self._timeout_s = timeout_s
        self.tally = Tally()

    def message(self, visitor: Visitor, visit: int) -> pb.RecommendRequest:
        short = self._by_handle and visit > 0
        return message_from_request(visitor.user.request(visit, handle=b"" if short else None))

    async def ask(
        self, visitor: Visitor, visit: int, message: pb.RecommendRequest, due: float
    ) -> None:
        tally = self.tally
        tally.sent += 1
        short = self._by_handle and visit > 0
        if short:
            if visitor.is_waiting or not visitor.handle:
                tally.resent += 1
                short, message = False, self._whole(visitor, visit)
            else:
                message.history_handle = visitor.handle
        visitor.is_waiting = True
        try:
            try:
                answer = await self._recommend(message, timeout=self._timeout_s)
            except grpc.aio.AioRpcError as error:
                if not short or error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise
                tally.resent += 1
                message = self._whole(visitor, visit)
                answer = await self._recommend(message, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            tally.failures[error.code().name] += 1
            visitor.handle = b""
        else:
            tally.add(answer, time.perf_counter() - due)
            visitor.handle = answer.history_handle
        finally:
            visitor.is_waiting = False

    @staticmethod
    def _whole(visitor: Visitor, visit: int) -> pb.RecommendRequest:
        return message_from_request(visitor.user.request(visit))


Call = tuple[Visitor, int, pb.RecommendRequest]


def visits_of(job: dict[str, Any]) -> Visits:
    return Visits(**job["work"])


def planned(job: dict[str, Any], count: int) -> tuple[list[Visitor], list[tuple[Visitor, int]]]:
    """Who comes when: users return in turns, so that each has had its answer in between."""
    work = visits_of(job)
    returns = work.returns if job["way"] != "new" else 1
    visitors = [
        Visitor(User(work, i, job["seed"], model=job["model"]))
        for i in range(max(1, math.ceil(count / returns)))
    ]
    first = 0 if job["way"] == "new" else 1
    order = [(visitor, first + visit) for visit in range(returns) for visitor in visitors]
    return visitors, order[:count]


async def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Poisson arrivals at a rate; see `returning_users` for what is in a job."""
    times = list(poisson(job["rate"], job["seconds"], job["seed"]))
    visitors, order = planned(job, len(times))
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        await channel.channel_ready()
        asker = Asker(channel, job["way"], job["timeout_s"])
        await prepare(asker, visitors, job)
        calls: list[Call] = [(v, visit, asker.message(v, visit)) for v, visit in order]

        async def ask(number: int, due: float) -> None:
            await asker.ask(*calls[number], due)

        async with Measured(job["pid"]) as used:
            seconds = await open_loop(ask, times)
        if asker.tally.sent != len(times):
            raise RuntimeError(f"{asker.tally.sent} requests sent of {len(times)}")
        return asker.tally.summary(max(seconds, job["seconds"])) | used.summary(len(times))


async def prepare(asker: Asker, visitors: Sequence[Visitor], job: dict[str, Any]) -> None:
    """The first visit of all who return; else a few requests of others."""
    if job["way"] == "new":
        work = visits_of(job)
        visitors = [
            Visitor(User(work, i, job["seed"] + 1, model=job["model"])) for i in range(WARM_UP)
        ]
    elif not job["first_visits"]:
        visitors = visitors[:WARM_UP]

    async def first(number: int, due: float) -> None:
        visitor = visitors[number]
        await asker.ask(visitor, 0, asker.message(visitor, 0), due)

    await each_once(first, len(visitors), CALLERS)
    if asker.tally.failures:
        raise RuntimeError(f"first visits failed: {dict(asker.tally.failures)}")
    asker.tally = Tally()


class Measured:
    """Processor time of the server and of this process while it lasts.

    What was made before is taken out of garbage collection, so that it does not stall the client.
    """

    def __init__(self, server: int) -> None:
        self._server = server

    async def __aenter__(self) -> Measured:
        gc.collect()
        gc.freeze()
        self._began = (time.perf_counter(), cpu_seconds(self._server), time.process_time())
        return self

    async def __aexit__(self, *_: object) -> None:
        ended = (time.perf_counter(), cpu_seconds(self._server), time.process_time())
        self._used = [b - a for a, b in zip(self._began, ended, strict=True)]
        gc.unfreeze()

    def summary(self, requests: int) -> dict[str, float]:
        seconds, server, client = self._used
        return {
            "server_cpu_ms": 1e3 * server / requests,
            "client_cpu_ms": 1e3 * client / requests,
            "server_cores": server / seconds,
            "client_cores": client / seconds,
        }


async def soak(job: dict[str, Any]) -> dict[str, Any]:
    """A constant rate of users who come, return some times, and leave to others.

    Messages are made as they are needed. Half of the users send handles, half whole histories.
    """
    work, turns = visits_of(job), random.Random(job["seed"])
    numbers = iter(range(1 << 62))

    def newcomer() -> Visitor:
        return Visitor(User(work, next(numbers), job["seed"], model=job["model"]))

    visitors = [newcomer() for _ in range(job["active"])]
    for i, visitor in enumerate(visitors):
        visitor.visits = i % (work.returns + 1)  # so that not all leave at once
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        await channel.channel_ready()
        askers = [Asker(channel, way, job["timeout_s"]) for way in ("handle", "whole")]
        askers[1].tally = tally = askers[0].tally

        async def ask(number: int, due: float) -> None:
            place = turns.randrange(len(visitors))
            for _ in visitors:
                if not visitors[place].is_waiting:
                    break
                place = (place + 1) % len(visitors)
            visitor = visitors[place]
            if visitor.visits > work.returns:
                visitors[place] = visitor = newcomer()
            asker, visit = askers[place % 2], visitor.visits
            visitor.visits += 1
            await asker.ask(visitor, visit, asker.message(visitor, visit), due)

        async with Measured(job["pid"]) as used:
            seconds = await open_loop(ask, poisson(job["rate"], job["seconds"], job["seed"]))
        return {
            **tally.summary(max(seconds, job["seconds"])),
            **used.summary(tally.sent),
            "users": next(numbers),
        }


async def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers themselves, for comparison: item ids and head scores of each visit."""
    work = visits_of(job)
    found: list[dict[str, Any]] = []
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        await channel.channel_ready()
        recommend = pb_grpc.RecommenderServiceStub(channel).Recommend  # type: ignore[no-untyped-call]
        for number, visit in every_visit(job):
            visitor = Visitor(User(work, number, job["seed"], model=job["model"]))
            message = message_from_request(visitor.user.request(visit))
            message.k = max(work.candidates, message.k)
            answer = await recommend(message, timeout=job["timeout_s"])
            found.append(
                {
                    "items": [item.item_id.integer for item in answer.items],
                    "scores": [list(item.head_scores) for item in answer.items],
                    "reused": sum(stage.tokens_reused for stage in answer.stages),
                }
            )
    return {"answers": found}


def every_visit(job: dict[str, Any]) -> Iterator[tuple[int, int]]:
    for number in range(job["users"]):
        for visit in range(visits_of(job).returns + 1):
            yield number, visit


JOBS = {"measure": measure, "soak": soak, "answers": answers}


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        job = json.loads(line)
        print(json.dumps(await JOBS[job["kind"]](job)), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
