"""The micro-batcher: who is computed with whom, who is dropped, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import Task
from gr_core.batcher import Batched, BatchingOptions, BatchReport, MicroBatcher, select_batch
from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, Violation

from .helpers import PATIENCE_S, Lab, engine_threads, until


def encoded(tokens: int, task: Task = Task.RETRIEVE) -> EncodedRequest:
    return EncodedRequest(task, {}, tokens=tokens)


class EchoEngine:
    """Answers each request with its number of tokens."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.answer: Callable[[Sequence[EncodedRequest]], Sequence[InferenceResult]] = lambda b: [
            InferenceResult(np.array([r.tokens], np.float32)) for r in b
        ]

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        self.lab.enter(batch)
        return self.answer(batch)


class Bench:
    """A batcher with its engine, and what it reported."""

    def __init__(self, **options: float) -> None:
        self.engine = EchoEngine()
        self.lab = self.engine.lab
        self.drops: list[str] = []
        self.reports: list[BatchReport] = []
        self.batcher = MicroBatcher(
            self.engine,  # type: ignore[arg-type]
            BatchingOptions(**options),  # type: ignore[arg-type]
            name="echo",
            on_batch=self.reports.append,
            on_drop=self.drops.append,
        )

    def submit(
        self, tokens: int, deadline: float | None = None, task: Task = Task.RETRIEVE
    ) -> asyncio.Task[Batched]:
        return asyncio.ensure_future(self.batcher.infer(encoded(tokens, task), deadline))

    async def busy(self) -> asyncio.Task[Batched]:
        """Holds the engine with a request of one token; what is submitted now has to wait."""
        self.lab.hold()
        first = self.submit(1)
        await self.lab.entered()
        self.lab.batches.clear()
        return first

    async def queued(self, count: int) -> None:
        await until(lambda: self.batcher.depth == count)

    def computed(self) -> list[list[int]]:
        return [[r.tokens for r in batch] for batch in self.lab.batches]


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: float) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for one in made:
        one.lab.release()
        one.batcher.close()


# ── Selection ─────────────────────────────────────────────────────────────────────────────────

requests_st = st.lists(
    st.builds(
        encoded,
        st.one_of(st.integers(0, 40), st.integers(0, 5000)),
        st.sampled_from([Task.RETRIEVE, Task.RANK]),
    ),
    min_size=1,
    max_size=60,
)
options_st = st.builds(
    BatchingOptions,
    max_batch_size=st.integers(1, 20),
    max_batch_tokens=st.integers(1, 20_000),
    length_ratio=st.floats(1, 8),
)


@given(requests_st, options_st)
def test_a_batch_keeps_its_bounds(requests: list[EncodedRequest], options: BatchingOptions) -> None:
    batch = select_batch(requests, options)
    assert batch == sorted(set(batch))
    assert batch[0] == 0, "the oldest is always computed next"
    chosen = [requests[i] for i in batch]
    assert {r.task for r in chosen} == {requests[0].task}
    assert len(batch) <= options.max_batch_size
    tokens = [max(r.tokens, 1) for r in chosen]
    assert max(tokens) <= options.length_ratio * min(tokens)
    if len(batch) > 1:
        assert max(tokens) * len(tokens) <= options.max_batch_tokens


@given(requests_st, options_st)
def test_nobody_who_fits_is_left_behind(
    requests: list[EncodedRequest], options: BatchingOptions
) -> None:
    """Whoever of the task could still join the batch is in it."""
    batch = select_batch(requests, options)
    if len(batch) == options.max_batch_size:
        return
    tokens = [max(requests[i].tokens, 1) for i in batch]
    for i, request in enumerate(requests):
        if i in batch or request.task is not requests[0].task:
            continue
        low, high = min([request.tokens, *tokens]), max([request.tokens, *tokens])
        assert (
            high > options.length_ratio * max(low, 1)
            or high * (len(batch) + 1) > options.max_batch_tokens
        )


@given(requests_st, options_st, st.randoms(use_true_random=False))
def test_nobody_starves_while_others_keep_coming(
    requests: list[EncodedRequest], options: BatchingOptions, random
) -> None:
    """Whoever has n before them is computed within n + 1 batches, whatever comes behind."""
    queue = list(enumerate(requests))
    position = dict.fromkeys(range(len(requests)))
    computed_in: dict[int, int] = {}
    for step in range(len(requests)):
        batch = select_batch([r for _, r in queue], options)
        for i in batch:
            computed_in[queue[i][0]] = step
        queue = [entry for i, entry in enumerate(queue) if i not in batch]
        queue += [(-1, random.choice(requests)) for _ in range(random.randint(0, 3))]
        if not queue:
            break
    for number in position:
        assert computed_in[number] <= number


@given(requests_st, options_st)
def test_every_request_is_chosen_once(
    requests: list[EncodedRequest], options: BatchingOptions
) -> None:
    queue = list(range(len(requests)))
    seen: list[int] = []
    while queue:
        batch = select_batch([requests[i] for i in queue], options)
        seen += [queue[i] for i in batch]
        queue = [entry for i, entry in enumerate(queue) if i not in batch]
    assert sorted(seen) == list(range(len(requests)))


# ── Batching ──────────────────────────────────────────────────────────────────────────────────


async def test_an_idle_engine_computes_a_request_alone_and_at_once(bench) -> None:
    one = bench()
    answers = [await one.batcher.infer(encoded(n)) for n in range(20)]
    assert [a.result.scores.item() for a in answers] == list(range(20))
    assert one.lab.sizes == [1] * 20
    assert {a.batch_size for a in answers} == {1}
    assert sorted(a.queue_s for a in answers)[10] < 0.05, "nothing to wait for"


async def test_requests_gather_while_the_engine_is_busy(bench) -> None:
    one = bench()
    first = await one.busy()
    others = [one.submit(10 + n) for n in range(5)]
    await one.queued(5)
    one.lab.release()
    answers = await asyncio.gather(*others)
    assert (await first).batch_size == 1
    assert one.computed() == [[10, 11, 12, 13, 14]]
    assert [a.result.scores.item() for a in answers] == [10, 11, 12, 13, 14]
    assert {a.batch_size for a in answers} == {5}
    assert all(a.queue_s > 0 and a.compute_s >= 0 for a in answers)


async def test_a_batch_is_the_oldest_with_its_like(bench) -> None:
    one = bench(length_ratio=2.0)
    await one.busy()
    waiting = [one.submit(n) for n in (100, 1000, 120, 1100, 90, 30)]
    waiting.append(one.submit(101, task=Task.RANK))
    await one.queued(7)
    one.lab.release()
    await asyncio.gather(*waiting)
    assert one.computed() == [[100, 120, 90], [1000, 1100], [30], [101]]


async def test_each_batch_is_reported(bench) -> None:
    one = bench(max_batch_size=2)
    first = await one.busy()
    waiting = [one.submit(5) for _ in range(3)]
    await one.queued(3)
    one.lab.release()
    await asyncio.gather(first, *waiting)
    await until(lambda: len(one.reports) == 3)
    assert [len(r.batch) for r in one.reports] == [1, 2, 1]
    assert [r.queue_depth for r in one.reports] == [3, 1, 0]
    assert all(r.compute_s >= 0 for r in one.reports)
    assert one.drops == []


# ── Bounds ────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once(bench) -> None:
    one = bench(max_queue=3)
    await one.busy()
    waiting = [one.submit(5) for _ in range(3)]
    await one.queued(3)
    with pytest.raises(Overloaded, match="queue of echo is full \\(3 requests\\)") as refused:
        await one.batcher.infer(encoded(5))
    assert 0 < refused.value.retry_after_s <= 30
    assert one.drops == ["full"]
    one.lab.release()
    assert len(await asyncio.gather(*waiting)) == 3
    await one.batcher.infer(encoded(5))


async def test_retry_after_follows_what_requests_take(bench) -> None:
    """A client that is told to come back is told when there will be room."""

    async def refused(one: Bench) -> float:
        await one.busy()
        waiting = [one.submit(5) for _ in range(20)]
        await one.queued(20)
        with pytest.raises(Overloaded) as error:
            await one.batcher.infer(encoded(5))
        one.lab.release()
        await asyncio.gather(*waiting)
        return error.value.retry_after_s

    quick, slow = bench(max_queue=20), bench(max_queue=20)
    for _ in range(20):
        await quick.batcher.infer(encoded(1))
    slow.lab.break_infer = lambda batch: time.sleep(0.02)
    for _ in range(20):
        await slow.batcher.infer(encoded(1))
    slow.lab.break_infer = lambda batch: None
    assert await refused(quick) < await refused(slow)


async def test_those_who_gave_up_hold_no_place_in_a_full_queue(bench) -> None:
    one = bench(max_queue=3)
    await one.busy()
    gone = [one.submit(5) for _ in range(2)]
    deadline = time.monotonic() + 0.001
    late = one.submit(6, deadline)
    await one.queued(3)
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    await until(lambda: time.monotonic() > deadline)
    welcome = one.submit(7)
    with pytest.raises(DeadlineExceeded):
        await late
    one.lab.release()
    assert (await welcome).result.scores.item() == 7
    assert sorted(one.drops) == ["cancelled", "cancelled", "deadline"]
    assert one.computed() == [[7]]


# ── Late and cancelled ────────────────────────────────────────────────────────────────────────


async def test_late_requests_are_dropped_before_they_are_computed(bench) -> None:
    one = bench()
    await one.busy()
    deadline = time.monotonic() + 0.005
    late, patient = one.submit(5, deadline), one.submit(6, time.monotonic() + PATIENCE_S)
    await one.queued(2)
    await until(lambda: time.monotonic() > deadline)
    one.lab.release()
    with pytest.raises(DeadlineExceeded, match="in the queue of echo"):
        await late
    assert (await patient).result.scores.item() == 6
    assert one.computed() == [[6]]
    assert one.drops == ["deadline"]


async def test_a_deadline_that_has_passed_already_is_not_computed(bench) -> None:
    one = bench()
    with pytest.raises(DeadlineExceeded):
        await one.batcher.infer(encoded(5), time.monotonic() - 1)
    assert one.lab.batches == []


async def test_cancelled_requests_are_never_computed(bench) -> None:
    one = bench()
    await one.busy()
    cancelled, kept = one.submit(5), one.submit(6)
    await one.queued(2)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    one.lab.release()
    await kept
    assert one.computed() == [[6]]
    assert one.drops == ["cancelled"]


async def test_cancelling_what_is_being_computed_harms_nobody(bench) -> None:
    one = bench()
    first = await one.busy()
    other = one.submit(6)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    one.lab.release()
    assert (await other).result.scores.item() == 6


# ── Engines that fail ─────────────────────────────────────────────────────────────────────────


def poison(tokens: int) -> Callable[[Sequence[EncodedRequest]], None]:
    def check(batch: Sequence[EncodedRequest]) -> None:
        if any(r.tokens == tokens for r in batch):
            raise InvalidRequest([Violation("history", f"{tokens} is poison")])

    return check


async def test_a_poisoned_request_fails_alone(bench) -> None:
    one = bench()
    one.lab.break_infer = poison(13)
    await one.busy()
    waiting = [one.submit(n) for n in (12, 13, 14)]
    await one.queued(3)
    one.lab.release()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[1], InvalidRequest)
    assert [answers[i].result.scores.item() for i in (0, 2)] == [12, 14]
    assert {answers[i].batch_size for i in (0, 2)} == {1}
    assert one.computed() == [[12, 13, 14], [12], [13], [14]]
    assert (await one.batcher.infer(encoded(15))).result.scores.item() == 15


async def test_a_request_that_fails_by_itself_is_not_computed_twice(bench) -> None:
    one = bench()
    one.lab.break_infer = poison(13)
    with pytest.raises(InvalidRequest, match="13 is poison"):
        await one.batcher.infer(encoded(13))
    assert one.computed() == [[13]]


async def test_an_engine_that_wants_to_exit_fails_its_request_alone(bench) -> None:
    one = bench()
    right = one.engine.answer

    def leave(batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        raise SystemExit(1)

    one.engine.answer = leave
    with pytest.raises(RuntimeError, match="SystemExit"):
        await one.batcher.infer(encoded(1))
    one.engine.answer = right
    assert (await one.batcher.infer(encoded(2))).result.scores.item() == 2


async def test_an_engine_that_gives_a_wrong_number_of_results_is_found_out(bench) -> None:
    one = bench()
    right = one.engine.answer
    one.engine.answer = lambda batch: right(batch)[:1]
    await one.busy()
    waiting = [one.submit(n) for n in (12, 13)]
    await one.queued(2)
    one.lab.release()
    answers = await asyncio.gather(*waiting)
    assert [a.result.scores.item() for a in answers] == [12, 13], "never one for another"

    one.engine.answer = lambda batch: []
    with pytest.raises(RuntimeError, match="0 results for 1 requests"):
        await one.batcher.infer(encoded(1))


# ── Loops, threads, the end ───────────────────────────────────────────────────────────────────


def test_many_event_loops_share_one_engine(bench) -> None:
    one = bench(max_queue=1000)
    wrong: list[object] = []

    async def client(base: int) -> None:
        answers = await asyncio.gather(*(one.batcher.infer(encoded(base + n)) for n in range(60)))
        wrong.extend(a for n, a in enumerate(answers) if a.result.scores.item() != base + n)

    threads = [threading.Thread(target=asyncio.run, args=(client(1000 * t),)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert wrong == []
    assert sum(one.lab.sizes) == 240


def test_an_event_loop_that_ended_harms_nobody(bench) -> None:
    one = bench()

    async def vanish() -> None:
        await one.busy()
        one.submit(5)
        await one.queued(1)

    asyncio.run(vanish())  # one request in the engine, one in the queue, and the loop is closed
    one.lab.release()
    assert asyncio.run(one.batcher.infer(encoded(7))).result.scores.item() == 7


async def test_closing_finishes_the_queue(bench) -> None:
    one = bench(max_batch_size=2)
    first = await one.busy()
    waiting = [one.submit(n) for n in range(10, 15)]
    await one.queued(5)
    closing = asyncio.ensure_future(asyncio.to_thread(one.batcher.close))
    await until(lambda: one.batcher._closing)
    with pytest.raises(Unavailable, match="echo is closing"):
        await one.batcher.infer(encoded(1))
    one.lab.release()
    answers = await asyncio.gather(first, *waiting)
    assert [a.result.scores.item() for a in answers] == [1, 10, 11, 12, 13, 14]
    await closing
    assert "gr-echo" not in engine_threads()
    one.batcher.close()
    with pytest.raises(Unavailable):
        await one.batcher.infer(encoded(1))
