"""The micro-batcher: a bounded queue before an engine, emptied by one worker thread.

While the engine is idle a request is computed at once, alone. While it is busy requests gather,
and the next batch is the oldest of them with those nearest to it in length, so that nobody starves
and little is padded. What is late or cancelled is dropped before it is computed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gr_core.contracts import EncodedRequest, Engine, InferenceResult
from gr_core.errors import DeadlineExceeded, GrError, Overloaded, Unavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchingOptions:
    """Bounds of a batch and of the queue before it."""

    max_batch_size: int = 32
    max_batch_tokens: int = 65536
    """Batch size times its longest request; one request alone may exceed it."""
    max_queue: int = 512
    """Requests that may wait; one more is refused."""
    length_ratio: float = 2.0
    """The longest of a batch has at most this many times the tokens of the shortest."""


@dataclass(frozen=True, slots=True)
class Batched:
    """A result with how it was computed; seconds."""

    result: InferenceResult
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What the worker tells after each batch."""

    batch: Sequence[EncodedRequest]
    compute_s: float
    queue_depth: int


@dataclass(slots=True)
class _Pending:
    request: EncodedRequest
    deadline: float | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Batched]
    queued_at: float = field(default_factory=time.monotonic)


_Outcome = Batched | BaseException


class MicroBatcher:
    """Runs an `Engine` on a thread of its own. `infer` belongs to event loops, the rest to anyone.

    ``on_batch`` is told of each batch and ``on_drop`` of each dropped request (``deadline``,
    ``cancelled`` or ``full``), on whichever thread that happens.
    """

    def __init__(
        self,
        engine: Engine,
        options: BatchingOptions,
        *,
        name: str = "engine",
        on_batch: Callable[[BatchReport], None] = lambda report: None,
        on_drop: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._engine = engine
        self._options = options
        self._name = name
        self._on_batch = on_batch
        self._on_drop = on_drop
        self._queue: list[_Pending] = []
        self._wakeup = threading.Condition()
        self._waking: set[asyncio.AbstractEventLoop] = set()
        self._closing = False
        self._seconds_per_request = 0.01
        self._thread = threading.Thread(target=self._run, name=f"gr-{name}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def infer(self, request: EncodedRequest, deadline: float | None = None) -> Batched:
        """Queues a request and awaits its result.

        ``deadline`` is in `time.monotonic()` seconds. Raises `Overloaded` at once when the queue is
        full, `DeadlineExceeded` for a late request, `Unavailable` when closing, and whatever the
        engine raised for this very request.
        """
        loop = asyncio.get_running_loop()
        pending = _Pending(request, deadline, loop, loop.create_future())
        dead: list[_Pending] = []
        with self._wakeup:
            if self._closing:
                raise Unavailable(f"{self._name} is closing")
            if len(self._queue) >= self._options.max_queue:
                dead = self._take_dead(time.monotonic())
            waiting = len(self._queue)
            if waiting < self._options.max_queue:
                self._queue.append(pending)
        self._drop(dead)
        if waiting >= self._options.max_queue:
            self._on_drop("full")
            raise Overloaded(
                f"the queue of {self._name} is full ({waiting} requests)",
                retry_after_s=min(max(waiting * self._seconds_per_request, 0.01), 30.0),
            )
        if loop not in self._waking:
            self._waking.add(loop)
            loop.call_soon(self._wake, loop)
        return await pending.future

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wakes the worker once for all requests that came in one turn of an event loop.

        Waking it for each of them costs more than a small model, for it competes for the
        interpreter with the loop that is about to queue the next one.
        """
        self._waking.discard(loop)
        with self._wakeup:
            self._wakeup.notify()

    def close(self) -> None:
        """Finishes what is queued, then stops the thread. May be called twice."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _take_dead(self, now: float) -> list[_Pending]:
        """Removes what is late or cancelled from the queue."""
        dead = [
            p
            for p in self._queue
            if p.future.cancelled() or (p.deadline is not None and p.deadline <= now)
        ]
        if dead:
            gone = set(map(id, dead))
            self._queue = [p for p in self._queue if id(p) not in gone]
        return dead

    def _drop(self, dead: Sequence[_Pending]) -> None:
        late = f"the deadline passed in the queue of {self._name}"
        for pending in dead:
            self._on_drop("cancelled" if pending.future.cancelled() else "deadline")
        _deliver(dead, [DeadlineExceeded(late) for _ in dead])

    # The worker thread.

    def _run(self) -> None:
        while True:
            with self._wakeup:
                while not self._queue and not self._closing:
                    self._wakeup.wait()
                if not self._queue:
                    return
                dead = self._take_dead(time.monotonic())
                batch = self._take_batch()
            self._drop(dead)
            if batch:
                self._compute(batch)

    def _take_batch(self) -> list[_Pending]:
        """Removes the next batch from the queue."""
        if not self._queue:
            return []
        batch = select_batch([p.request for p in self._queue], self._options)
        chosen = set(batch)
        taken = [self._queue[i] for i in batch]
        self._queue = [p for i, p in enumerate(self._queue) if i not in chosen]
        return taken

    def _compute(self, batch: list[_Pending]) -> None:
        started = time.monotonic()
        outcomes: list[_Outcome]
        try:
            results = self._infer([p.request for p in batch])
        except Exception as error:
            if len(batch) == 1:
                outcomes = [error]
            else:
                self._log_failure(error, len(batch))
                outcomes = [self._alone(p, started) for p in batch]
        else:
            compute_s = time.monotonic() - started
            self._seconds_per_request += 0.1 * (compute_s / len(batch) - self._seconds_per_request)
            outcomes = [
                Batched(result, started - p.queued_at, compute_s, len(batch))
                for p, result in zip(batch, results, strict=True)
            ]
        _deliver(batch, outcomes)
        self._on_batch(
            BatchReport([p.request for p in batch], time.monotonic() - started, len(self._queue))
        )

    def _infer(self, requests: list[EncodedRequest]) -> Sequence[InferenceResult]:
        try:
            results = self._engine.infer(requests)
        except Exception:
            raise
        except BaseException as error:  # a library's SystemExit must not end this thread
            raise RuntimeError(f"{self._name} raised {type(error).__name__}: {error}") from error
        if len(results) != len(requests):
            raise RuntimeError(f"{self._name}: {len(results)} results for {len(requests)} requests")
        return results

    def _alone(self, pending: _Pending, started: float) -> _Outcome:
        """Computes one request of a failed batch by itself, so that only the poisoned one fails."""
        alone = time.monotonic()
        try:
            (result,) = self._infer([pending.request])
        except Exception as error:
            return error
        return Batched(result, started - pending.queued_at, time.monotonic() - alone, 1)

    def _log_failure(self, error: Exception, size: int) -> None:
        if isinstance(error, GrError):
            logger.warning("%s: a batch of %d failed (%s), one by one now", self._name, size, error)
        else:
            logger.exception("%s: a batch of %d failed, one by one now", self._name, size)


def select_batch(requests: Sequence[EncodedRequest], options: BatchingOptions) -> list[int]:
    """Indices of the next batch among queued requests, oldest first.

    The oldest is always in it. Of those of its task, the nearest in tokens join it while the batch
    keeps its size, the ratio of its longest to its shortest, and its padded tokens.
    """
    first = requests[0]
    low = high = max(first.tokens, 1)
    batch = [0]
    others = [i for i in range(1, len(requests)) if requests[i].task == first.task]
    others.sort(key=lambda i: abs(requests[i].tokens - first.tokens))
    for i in others:
        if len(batch) >= options.max_batch_size:
            break
        tokens = max(requests[i].tokens, 1)
        new_low, new_high = min(low, tokens), max(high, tokens)
        if new_high > options.length_ratio * new_low:
            continue
        if new_high * (len(batch) + 1) > options.max_batch_tokens:
            continue
        low, high = new_low, new_high
        batch.append(i)
    return sorted(batch)


def _deliver(batch: Sequence[_Pending], outcomes: Sequence[_Outcome]) -> None:
    """Hands outcomes to their event loops, waking each loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Pending, _Outcome]]] = {}
    for pending, outcome in zip(batch, outcomes, strict=True):
        by_loop.setdefault(pending.loop, []).append((pending, outcome))
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, group)
        except RuntimeError:
            logger.debug("an event loop closed before its results came")


def _resolve(group: Sequence[tuple[_Pending, _Outcome]]) -> None:
    for pending, outcome in group:
        if pending.future.done():
            continue
        if isinstance(outcome, BaseException):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)
