"""When requests are sent, and what their latencies come to.

Closed loop: each of N callers asks again as soon as it is answered. Open loop: requests arrive
whether or not others are answered, and latency counts from the time at which a request was due, so
that waiting callers do not hide a stall.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import numpy as np

Ask = Callable[[int, float], Awaitable[None]]
"""Sends request number i, which was due at the given `time.perf_counter`, and awaits its answer."""

LEAD_S = 0.05
"""Between the start of an open loop and its time 0, for its thread to be there."""


async def closed_loop(ask: Ask, concurrency: int, seconds: float) -> float:
    """Each of so many callers asks again as soon as it is answered. Returns the seconds it took."""
    started = time.perf_counter()
    end = started + seconds

    async def caller(name: int) -> None:
        number = name
        while (now := time.perf_counter()) < end:
            await ask(number, now)
            number += concurrency

    await asyncio.gather(*(caller(i) for i in range(concurrency)))
    return time.perf_counter() - started


async def each_once(ask: Ask, count: int, concurrency: int) -> None:
    """Requests 0 to ``count`` - 1, so many at a time."""
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await ask(number, time.perf_counter())

    await asyncio.gather(*(caller() for _ in range(concurrency)))


async def open_loop(ask: Ask, times_s: Iterable[float]) -> float:
    """Asks at the given times, ascending. Returns the seconds until the last was answered.

    A thread waits for them, because the timers of event loops are accurate to a millisecond only,
    and to wait actively would take a core from the server.
    """
    loop = asyncio.get_running_loop()
    unanswered: set[asyncio.Future[None]] = set()
    started = time.perf_counter() + LEAD_S

    def send(number: int, due: float) -> None:
        task = asyncio.ensure_future(ask(number, due))
        unanswered.add(task)
        task.add_done_callback(unanswered.discard)

    def pace() -> None:
        for number, offset in enumerate(times_s):
            due = started + offset
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            loop.call_soon_threadsafe(send, number, due)

    await loop.run_in_executor(None, pace)
    await asyncio.gather(*unanswered)
    return time.perf_counter() - started


def poisson(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process of so many events a second."""
    generator = random.Random(seed)
    time_s = generator.expovariate(rate)
    while time_s < seconds:
        yield time_s
        time_s += generator.expovariate(rate)


def percentiles(
    latencies_s: Sequence[float], which: Sequence[float] = (50, 90, 99, 99.9)
) -> dict[str, float]:
    """``{"p50_ms": …}``; no number of nothing."""
    if not len(latencies_s):
        return {f"p{p:g}_ms": float("nan") for p in which}
    found = np.percentile(np.asarray(latencies_s) * 1e3, list(which))
    return {f"p{p:g}_ms": float(value) for p, value in zip(which, found, strict=True)}
