"""Measuring engines on this machine: closed loop, in process, the sides interleaved.

A request's way is what the pipeline does with it: features, queue, batch, engine, decoding.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from gr_core.batcher import BatchingOptions, MicroBatcher
from gr_core.contracts import AsyncEngine, Engine, InferenceResult, Model
from gr_core.engines import RunningEngine, running
from gr_core.planner import Plan
from gr_core.samples import for_task, sample_requests
from gr_core.types import RecommendRequest, Task


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured."""

    task: Task
    requests: int
    """Of each engine in each round."""
    rounds: int
    concurrency: int
    k: int = 10


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one engine: latencies in seconds over all rounds, and the median round's throughput."""

    engine: str
    name: str
    """The engine's name alone."""
    p50_s: float
    p99_s: float
    requests_per_s: float
    median_batch: float


@dataclass
class _Side:
    running: RunningEngine
    batcher: MicroBatcher | None
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)


def measure(
    plans: Sequence[Plan], model: Model, work: Work, batching: BatchingOptions
) -> Sequence[Measurement]:
    """Runs every engine in every round, in turns, so that drifts of the machine hit all alike."""
    samples = [
        for_task(request, work.task) for request in sample_requests(model, work.requests, seed=1)
    ]
    with ExitStack() as stack:
        sides = []
        for chosen in plans:
            engine = stack.enter_context(running(chosen, model))
            batcher = None
            if isinstance(engine.engine, Engine) and not chosen.engine.batches_itself:
                batcher = MicroBatcher(engine.engine, batching, name=chosen.engine.name)
                stack.callback(batcher.close)
            sides.append(_Side(engine, batcher))
        asyncio.run(_rounds(sides, model, samples, work))
    return [
        Measurement(
            engine=side.running.label,
            name=side.running.plan.engine.name,
            p50_s=float(np.percentile(side.latencies, 50)),
            p99_s=float(np.percentile(side.latencies, 99)),
            requests_per_s=statistics.median(side.rates),
            median_batch=statistics.median(side.batches),
        )
        for side in sides
    ]


async def _rounds(
    sides: Sequence[_Side], model: Model, samples: Sequence[RecommendRequest], work: Work
) -> None:
    warm_up = samples[: max(1, len(samples) // 4)]
    for side in sides:
        await _round(_Side(side.running, side.batcher), model, warm_up, work)
    for number in range(work.rounds):
        for i in range(len(sides)):
            await _round(sides[(i + number) % len(sides)], model, samples, work)


async def _round(
    side: _Side, model: Model, samples: Sequence[RecommendRequest], work: Work
) -> None:
    waiting = iter(samples)

    async def client() -> None:
        for request in waiting:
            started = time.perf_counter()
            await _answer(side, model, request, work)
            side.latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(work.concurrency)))
    side.rates.append(len(samples) / (time.perf_counter() - started))


async def _answer(side: _Side, model: Model, request: RecommendRequest, work: Work) -> None:
    encoded = model.encode(request, work.task).request
    if work.task.finds_items:
        encoded = replace(encoded, k=min(work.k, len(model.catalogue)))
    result: InferenceResult
    if side.batcher is not None:
        batched = await side.batcher.infer(encoded)
        result = batched.result
        side.batches.append(batched.batch_size)
    else:
        engine = side.running.engine
        assert isinstance(engine, AsyncEngine)
        result = await engine.infer(encoded, None)
        side.batches.append(1)
    model.decode(work.task, result, {})
