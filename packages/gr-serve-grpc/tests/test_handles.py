"""History handles over the wire: what is sent is short, what is answered is the whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import serving_toy
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from gr_core import Behaviour, History, Recommendation, RecommendRequest
from gr_core.errors import GrError, InvalidRequest, Overloaded, UnknownHistory
from gr_core.histories import HANDLE_BYTES, HistoryStore, Owner, content_digest
from gr_core.repository import ModelRepository
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2_grpc as pb_grpc
from gr_serve_grpc.client import AsyncClient, Client, HistoryHandles, Retries
from gr_serve_grpc.convert import message_from_request
from gr_serve_grpc.metrics import prometheus_observer
from gr_serve_grpc.service import RecommenderMethods
from gr_serve_grpc.status import error_of_call

PAGE = Path(__file__).parents[3] / "docs" / "grpc.md"
NOW = 1_700_000_000_000
SIGNALS = ("is_liked", "is_shared", "watch_duration", "watch_percentage")


def history(items: Sequence[int], signals: Sequence[str] = ()) -> History:
    ids = np.array(items, np.int64)
    columns = {name: np.linspace(0, 1, len(ids), dtype=np.float32) for name in signals}
    return History(ids, NOW + np.arange(len(ids), dtype=np.int64), columns)


def asked(items: Sequence[int], user: str = "ada", **fields) -> RecommendRequest:
    return RecommendRequest(history(items), user_id=user, **{"k": 3, **fields})


def best(answer: Recommendation) -> list[int | str]:
    return [item.item_id for item in answer.items]


def unseen(items: Sequence[int]) -> list[int]:
    """What the toy recommends after a history."""
    return [i for i in range(1, 51) if i not in items][:3]


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[pb.RecommendRequest]:
    """Every request that the server reads, as it was sent."""
    seen: list[pb.RecommendRequest] = []
    read = RecommenderMethods._request

    def spy(self, message, call, request_id):
        seen.append(message)
        return read(self, message, call, request_id)

    monkeypatch.setattr(RecommenderMethods, "_request", spy)
    return seen


def lengths(arrived: list[pb.RecommendRequest]) -> list[tuple[int, bool]]:
    """How many behaviours each request brought, and whether a handle; forgets them."""
    found = [(len(m.history.columns.timestamps_ms.values), bool(m.history_handle)) for m in arrived]
    arrived.clear()
    return found


# ── One request ───────────────────────────────────────────────────────────────────────────────


async def test_only_what_is_new_is_sent(serve, arrived):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        for end in (3, 5, 5, 9):
            items = list(range(1, end + 1))
            answer = await client.recommend(asked(items))
            assert best(answer) == unseen(items)
            assert answer.stages[0].tokens == end
        assert lengths(arrived) == [(3, False), (2, True), (0, True), (4, True)]


async def test_a_synchronous_client_does_the_same(serve, arrived):
    def ask(address: str) -> None:
        with Client(address, handles=HistoryHandles()) as client:
            for end in (3, 5, 9):
                rows = [Behaviour(i, NOW + i, {"is_liked": 1.0}) for i in range(1, end + 1)]
                answer = client.recommend(history=rows, user_id="ada", k=3)
                assert best(answer) == unseen(range(1, end + 1))
            client.drop_user("ada")
            assert best(client.recommend(history=rows, user_id="ada", k=3)) == unseen(range(1, 10))

    async with serve() as running:
        await asyncio.to_thread(ask, running.address)
        assert lengths(arrived) == [(3, False), (2, True), (4, True), (0, True), (9, False)]


async def test_without_handles_all_is_sent(serve, arrived):
    async with serve() as running, AsyncClient(running.address) as client:
        for _ in range(2):
            assert (await client.recommend(asked([1, 2]))).history_handle
        assert lengths(arrived) == [(2, False), (2, False)]


async def test_whoever_has_no_name_sends_all(serve, arrived):
    handles = HistoryHandles()
    async with serve() as running, AsyncClient(running.address, handles=handles) as client:
        for _ in range(2):
            assert (await client.recommend(asked([1, 2], user=""))).history_handle == b""
        assert lengths(arrived) == [(2, False), (2, False)]
    assert len(handles) == 0


@pytest.mark.parametrize(
    "changed",
    [
        [2, 3, 4, 5],  # the oldest is gone
        [1, 3, 2, 4, 5],
        [1, 2, 9, 4, 5],
        [1, 2],
        [],
    ],
)
async def test_a_changed_history_is_sent_whole(serve, arrived, changed: list[int]):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        await client.recommend(asked([1, 2, 3]))
        assert best(await client.recommend(asked(changed))) == unseen(changed)
        assert best(await client.recommend(asked([*changed, 7]))) == unseen([*changed, 7])
        assert lengths(arrived) == [(3, False), (len(changed), False), (1, True)]


async def test_a_changed_signal_or_time_counts(serve, arrived):
    first = replace(asked([]), history=history([1, 2, 3], ["is_liked"]))
    signals = {"is_liked": np.array([0, 0.5, 0.25], np.float32)}
    late = first.history.timestamps_ms + 1
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        for changes in ({}, {"signals": signals}, {"timestamps_ms": late}, {"timestamps_ms": late}):
            await client.recommend(replace(first, history=replace(first.history, **changes)))
        assert lengths(arrived) == [(3, False), (3, False), (3, False), (0, True)]


async def test_each_user_and_model_has_its_own(serve, arrived):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        for user in ("ada", "bob"):
            for model in ("", "texts"):
                await client.recommend(asked([1, 2], user=user, model=model))
        assert lengths(arrived) == [(2, False)] * 4
        for user in ("ada", "bob"):
            for model in ("", "texts"):
                await client.recommend(asked([1, 2, 3], user=user, model=model))
        assert lengths(arrived) == [(1, True)] * 4


# ── The server has forgotten ──────────────────────────────────────────────────────────────────


async def test_an_evicted_history_is_sent_again_once(serve, arrived):
    async with (
        serve(histories_bytes=20_000) as running,
        AsyncClient(running.address, handles=HistoryHandles()) as client,
    ):
        await client.recommend(asked([1, 2]))
        for i in range(20):
            await client.recommend(asked([1], user=f"user {i}"))
        arrived.clear()
        assert best(await client.recommend(asked([1, 2, 3]))) == unseen([1, 2, 3])
        assert best(await client.recommend(asked([1, 2, 3, 4]))) == unseen([1, 2, 3, 4])
        assert lengths(arrived) == [(1, True), (3, False), (1, True)]


async def test_a_server_that_was_restarted_gets_the_whole(serve, arrived):
    handles = HistoryHandles()
    async with serve() as running:
        port = int(running.address.rpartition(":")[2])
        client = AsyncClient(running.address, handles=handles)
        await client.recommend(asked([1, 2]))
    async with client, serve(port=port):
        arrived.clear()
        assert best(await client.recommend(asked([1, 2, 3]))) == unseen([1, 2, 3])
        assert lengths(arrived) == [(1, True), (3, False)]


async def test_a_new_version_gets_the_whole(serve, arrived, tmp_path: Path):
    for version in ("1", "2"):
        serving_toy.write_models(tmp_path, version)
    repository = ModelRepository(tmp_path)
    repository.activate("numbers", "1")
    async with (
        serve(folder=tmp_path) as running,
        AsyncClient(running.address, handles=HistoryHandles()) as client,
    ):
        await client.recommend(asked([1, 2]))
        repository.activate("numbers", "2")
        await running.pipeline._rollout.follow()
        answer = await client.recommend(asked([1, 2, 3]))
        assert answer.stages[0].version == "2"
        assert best(answer) == unseen([1, 2, 3])
        assert lengths(arrived) == [(2, False), (1, True), (3, False)]


async def test_a_server_that_keeps_nothing_is_not_asked_twice(serve, arrived):
    async with (
        serve(histories_bytes=0) as running,
        AsyncClient(running.address, handles=HistoryHandles()) as client,
    ):
        for _ in range(2):
            assert (await client.recommend(asked([1, 2]))).history_handle == b""
        assert lengths(arrived) == [(2, False), (2, False)]


async def test_dropping_a_user_drops_what_is_stored(serve, arrived):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        for user in ("ada", "bob"):
            await client.recommend(asked([1, 2], user=user))
        assert await client.drop_user("ada") == 1
        assert await client.drop_user("ada") == 0
        arrived.clear()
        for user in ("ada", "bob"):
            assert best(await client.recommend(asked([1, 2, 3], user=user))) == unseen([1, 2, 3])
        assert lengths(arrived) == [(1, True), (3, False), (1, True)]


async def test_other_errors_are_not_answered_with_the_whole(serve, arrived, control):
    async with (
        serve(max_queue=1) as running,
        AsyncClient(running.address, handles=HistoryHandles(), retries=Retries(1)) as client,
    ):
        await client.recommend(asked([1, 2]))
        with pytest.raises(InvalidRequest, match="k: 0"):
            await client.recommend(asked([1, 2, 3], k=0))
        assert lengths(arrived) == [(2, False), (1, True)]
        control.gate.clear()
        waiting = [asyncio.create_task(client.recommend(asked([1], user="wait")))]
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        waiting.append(asyncio.create_task(client.recommend(asked([2], user="wait"))))
        while not sum(running.pipeline.queue_depths().values()):
            await asyncio.sleep(0.01)
        arrived.clear()
        with pytest.raises(Overloaded):
            await client.recommend(asked([1, 2, 3]))
        assert lengths(arrived) == [(1, True)]
        control.gate.set()
        await asyncio.gather(*waiting)
        # The handle is still good.
        assert best(await client.recommend(asked([1, 2, 3]))) == unseen([1, 2, 3])
        assert lengths(arrived) == [(1, True)]


async def test_violations_name_the_rows_of_the_caller(serve):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        await client.recommend(asked([1, 2]))
        wrong = asked([1, 2, 3, 4])
        wrong.history.timestamps_ms[3] = -1
        with pytest.raises(InvalidRequest, match=r"history.timestamps_ms\[3\]: -1"):
            await client.recommend(wrong)


async def test_threads_may_share_a_client_and_its_memory(serve):
    """Every thread has histories of its own of the same users, and the store holds but a few."""

    def ask(client: Client, seed: int) -> None:
        random = np.random.default_rng(seed)
        past: dict[str, list[int]] = {}
        for _ in range(40):
            user = f"user {random.integers(4)}"
            items = past.setdefault(user, [])
            items += random.integers(1, 30, random.integers(0, 3)).tolist()
            if random.random() < 0.2:
                del items[:1]
            assert best(client.recommend(asked(items, user=user))) == unseen(items)

    async with serve(histories_bytes=8_000) as running:
        with Client(running.address, handles=HistoryHandles(capacity=3)) as client:
            await asyncio.gather(*(asyncio.to_thread(ask, client, seed) for seed in range(6)))
        told = running.pipeline.cache_statistics()["histories"]
        assert min(told.hits, told.misses, told.evictions) > 0
        assert told.bytes <= 8_000


async def test_many_requests_may_extend_one_history_at_once(serve):
    async with serve() as running, AsyncClient(running.address) as client:
        handle = (await client.recommend(asked([1, 2]))).history_handle
        more = [asked([i], history_handle=handle) for i in range(3, 23)]
        answers = await asyncio.gather(*(client.recommend(request) for request in more))
        for i, answer in enumerate(answers, 3):
            assert best(answer) == unseen([1, 2, i])
        assert len({answer.history_handle for answer in answers}) == 20


# ── Handles by hand ───────────────────────────────────────────────────────────────────────────


async def test_a_handle_may_be_sent_by_hand(serve, arrived):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        first = await client.recommend(asked([1, 2]))
        second = await client.recommend(
            history=[Behaviour(3, NOW)], user_id="ada", k=3, history_handle=first.history_handle
        )
        assert best(second) == unseen([1, 2, 3])
        third = await client.recommend(
            user_id="ada", k=3, history_handle=second.history_handle, candidates=[4, 5]
        )
        assert best(third) == [5, 4]
        assert third.stages[0].tokens == 3
        assert lengths(arrived) == [(2, False), (1, True), (0, True)]
        # What the client remembers has no part in it, nor is changed by it.
        twice = await client.recommend(asked([1, 2, 3], history_handle=first.history_handle))
        assert twice.stages[0].tokens == 5
        assert best(await client.recommend(asked([1, 2, 3, 9]))) == unseen([1, 2, 3, 9])
        assert lengths(arrived) == [(3, True), (2, True)]


@given(bit=st.integers(0, 24 * 8 - 1), cut=st.integers(0, 23))
def test_what_is_known_of_a_handle_that_was_tampered_with(bit: int, cut: int):
    """Nothing: it is as unknown as any other. (Over the wire: below.)"""
    store, owner = HistoryStore(2**20), Owner.of("ada", [("m", "1")])
    handle = store.keep(store.extended(owner, history([1])), None, 0)
    assert len(handle) == 24
    flipped = (int.from_bytes(handle) ^ 1 << bit).to_bytes(24)
    for wrong in (flipped, handle[:cut]):
        with pytest.raises(UnknownHistory):
            store.find(wrong, owner)


async def test_why_a_handle_is_unknown_is_not_told(serve, arrived):
    async with serve() as running, AsyncClient(running.address) as client:
        good = (await client.recommend(asked([1, 2]))).history_handle
        forged = bytes([good[0] ^ 1, *good[1:]])
        told = set()
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = pb_grpc.RecommenderServiceStub(channel)
            for user, model, handle in (
                ("ada", "", forged),
                ("ada", "", good[:-1]),
                ("ada", "", good + b"\0"),
                ("ada", "", b"\xff" * 5000),
                ("ada", "texts", good),
                ("bob", "", good),
                ("", "", good),
            ):
                message = pb.RecommendRequest(
                    user_id=user, model=model, history_handle=handle, request_id="same"
                )
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Recommend(message, timeout=5)
                status = rpc_status.from_call(refused.value)
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                info = error_details_pb2.ErrorInfo()
                assert any(detail.Unpack(info) for detail in status.details)
                assert (info.domain, info.reason) == ("gr.v1", "HISTORY_HANDLE_UNKNOWN")
                assert isinstance(error_of_call(refused.value), UnknownHistory)
                told.add(status.SerializeToString())
        assert len(told) == 1
        with pytest.raises(UnknownHistory, match="send the whole history"):
            await client.recommend(asked([3], history_handle=forged))
        assert len(arrived) == 9, "who sends a handle by hand has no whole to be sent instead"
        assert best(await client.recommend(asked([3], history_handle=good))) == unseen([1, 2, 3])


async def test_rows_may_follow_columns(serve):
    async with serve() as running, AsyncClient(running.address) as client:
        first = await client.recommend(asked([1, 2]))
        async with grpc.aio.insecure_channel(running.address) as channel:
            message = pb.RecommendRequest(
                user_id="ada", history_handle=first.history_handle, request_id="r"
            )
            message.history.rows.behaviours.add(timestamp_ms=NOW).item_id.integer = 3
            answer = await pb_grpc.RecommenderServiceStub(channel).Recommend(message, timeout=5)
        assert [item.item_id.integer for item in answer.items[:3]] == unseen([1, 2, 3])


# ── Streams ───────────────────────────────────────────────────────────────────────────────────


def conversation() -> Iterator[RecommendRequest]:
    """Requests of a stream, and what they must be answered."""
    users = [f"user {i}" for i in range(30)]
    for round_ in range(1, 5):
        for user in users:
            yield asked(range(1, 2 * round_ + 1), user=user, request_id=f"{user}/{round_}")


def right(request_id: str) -> list[int]:
    return unseen(range(1, 2 * int(request_id.rpartition("/")[2]) + 1))


@pytest.mark.parametrize("capacity", [2**20, 20_000])
async def test_streams_send_only_what_is_new(serve, arrived, capacity: int):
    """With the smaller store most histories are gone when their users return."""
    async with (
        serve(histories_bytes=capacity, max_stream_in_flight=4) as running,
        AsyncClient(running.address, handles=HistoryHandles()) as client,
    ):
        requests = list(conversation())
        answers = {a.request_id: a.result() async for a in client.recommend_stream(requests)}
        assert {id_: best(a) for id_, a in answers.items()} == {
            r.request_id: right(r.request_id) for r in requests
        }
        short = sum(handle for _, handle in lengths(arrived))
        told = running.pipeline.cache_statistics()["histories"]
        assert told.hits + told.misses == short > 0
        assert told.misses > 0 if capacity == 20_000 else told.misses == 0


@pytest.mark.parametrize("capacity", [2**20, 20_000])
async def test_synchronous_streams_do_the_same(serve, arrived, capacity: int):
    def ask(address: str) -> dict[str, list[int | str]]:
        with Client(address, handles=HistoryHandles()) as client:
            answers = client.recommend_stream(conversation())
            return {answer.request_id: best(answer.result()) for answer in answers}

    async with serve(histories_bytes=capacity, max_stream_in_flight=4) as running:
        answers = await asyncio.to_thread(ask, running.address)
        assert len(answers) == 120
        assert all(items == right(id_) for id_, items in answers.items())
        short = sum(handle for _, handle in lengths(arrived))
        told = running.pipeline.cache_statistics()["histories"]
        assert told.hits + told.misses == short > 0
        assert told.misses > 0 if capacity == 20_000 else told.misses == 0
    assert not [t for t in threading.enumerate() if t.name == "gr-grpc-requests"]


async def test_a_stream_may_wait_for_each_answer(serve, arrived):
    """The next request comes only when the one before, which had to be sent again, is answered."""
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        answered = asyncio.Queue()

        async def requests():
            for end in range(1, 6):
                yield asked(range(1, end + 1), request_id=str(end))
                await answered.get()
                running.pipeline.drop_user("ada")

        async for answer in client.recommend_stream(requests(), timeout_s=10):
            assert best(answer.result()) == unseen(range(1, int(answer.request_id) + 1))
            answered.put_nowait(None)
        assert lengths(arrived) == [
            (1, False), (1, True), (2, False), (1, True), (3, False), (1, True), (4, False),
            (1, True), (5, False),
        ]  # fmt: skip


async def test_a_synchronous_stream_may_wait_for_each_answer(serve, arrived):
    async with serve() as running:
        loop = asyncio.get_running_loop()

        async def forget() -> None:
            running.pipeline.drop_user("ada")

        def ask(address: str) -> None:
            answered = threading.Semaphore(0)

            def requests() -> Iterator[RecommendRequest]:
                for end in range(1, 4):
                    yield asked(range(1, end + 1), request_id=str(end))
                    assert answered.acquire(timeout=10)
                    asyncio.run_coroutine_threadsafe(forget(), loop).result(10)

            with Client(address, handles=HistoryHandles()) as client:
                for answer in client.recommend_stream(requests(), timeout_s=10):
                    assert best(answer.result()) == unseen(range(1, int(answer.request_id) + 1))
                    answered.release()

        await asyncio.to_thread(ask, running.address)
        assert lengths(arrived) == [(1, False), (1, True), (2, False), (1, True), (3, False)]


async def test_a_streams_other_errors_are_passed_on(serve, arrived):
    async with serve() as running, AsyncClient(running.address, handles=HistoryHandles()) as client:
        await client.recommend(asked([1]))
        arrived.clear()
        good = asked([1, 2], request_id="good")
        requests = [replace(good, k=0, request_id="bad"), good]
        requests.append(asked([2], request_id="by hand", history_handle=b"?"))
        answers = {a.request_id: a async for a in client.recommend_stream(requests)}
        assert isinstance(answers["bad"].error, InvalidRequest)
        assert isinstance(answers["by hand"].error, UnknownHistory)
        assert best(answers["good"].result()) == unseen([1, 2])
        assert len(arrived) == 3


async def test_a_stream_that_is_left_leaves_no_thread(serve):
    def ask(address: str) -> None:
        gone = threading.Event()

        def requests() -> Iterator[RecommendRequest]:
            yield asked([1], request_id="1")
            assert gone.wait(10)

        with Client(address, handles=HistoryHandles()) as client:
            stream = client.recommend_stream(requests())
            assert next(stream).result().items
            stream.close()
        gone.set()
        for thread in threading.enumerate():
            if thread.name == "gr-grpc-requests":
                thread.join(10)
                assert not thread.is_alive()

    async with serve() as running:
        await asyncio.to_thread(ask, running.address)


async def test_requests_that_cannot_be_made_end_the_stream(serve):
    def ask(address: str) -> None:
        def requests() -> Iterator[RecommendRequest]:
            yield asked([1], request_id="1")
            raise RuntimeError("no more")

        with (
            Client(address, handles=HistoryHandles()) as client,
            pytest.raises(GrError),
        ):
            list(client.recommend_stream(requests(), timeout_s=10))

    async with serve() as running:
        await asyncio.wait_for(asyncio.to_thread(ask, running.address), 20)


# ── What the client remembers ─────────────────────────────────────────────────────────────────


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "cut", "edit", "shrink"]),
            st.lists(st.integers(1, 9), max_size=4),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_what_the_server_joins_is_what_the_caller_gave(steps):
    """Whatever is done to a history: handle and rest are the whole, or the whole is sent."""
    store, owner = HistoryStore(2**20), Owner.of("ada", [("m", "1")])
    handles = HistoryHandles()
    rows: list[Behaviour] = []
    for step, (action, items, liked) in enumerate(steps):
        if action == "cut":
            rows = rows[1:]
        elif action == "edit" and rows:
            rows[len(rows) // 2] = Behaviour(0, step)
        elif action == "shrink":
            rows = rows[:-1]
        rows += [Behaviour(i, NOW + step, {"is_liked": 1.0} if liked else {}) for i in items]
        request = RecommendRequest(History.of(rows), user_id="ada")
        sent = handles.shortened(request)
        known = store.find(sent.history_handle, owner) if sent.history_handle else None
        joined = store.extended(owner, sent.history, known)
        assert content_digest(joined.history) == content_digest(request.history)
        assert (sent is request) == (not sent.history_handle)
        handles.learn(request, store.keep(joined, known, store.drops))


def test_memory_of_the_client_is_bounded():
    handles = HistoryHandles(capacity=10)
    for i in range(100):
        handles.learn(asked([1], user=f"user {i}"), b"h")
    assert len(handles) == 10
    assert handles.shortened(asked([1, 2], user="user 99")).history_handle == b"h"
    assert handles.shortened(asked([1, 2], user="user 0")).history_handle == b""
    for i in range(90, 100):  # the first of them was used last
        handles.shortened(asked([1, 2], user=f"user {189 - i}"))
    handles.learn(asked([1], user="one more"), b"h")
    assert handles.shortened(asked([1, 2], user="user 90")).history_handle == b"h"
    assert handles.shortened(asked([1, 2], user="user 99")).history_handle == b""
    with pytest.raises(ValueError, match="capacity: 0"):
        HistoryHandles(0)


# ── Beside it ─────────────────────────────────────────────────────────────────────────────────


def test_a_returning_users_request_is_short():
    """The figures that docs/grpc.md gives."""
    whole = RecommendRequest(history(range(528), SIGNALS), user_id="user-1234567", k=10)
    columns = {name: column[:512] for name, column in whole.history.signals.items()}
    known = replace(whole, history=replace(history(range(512)), signals=columns))
    handles = HistoryHandles()
    handles.learn(known, bytes(HANDLE_BYTES))
    short = handles.shortened(whole)
    assert len(short.history) == 16
    assert message_from_request(whole).ByteSize() == 17_026
    assert message_from_request(short).ByteSize() == 654
    if PAGE.exists():  # it belongs to the repository, not to the package
        text = PAGE.read_text(encoding="utf-8")
        assert "17,026 bytes" in text
        assert "654 bytes" in text


async def test_metrics_count_histories(serve):
    observer = prometheus_observer({"port": 0})
    try:
        async with (
            serve(observers=[observer]) as running,
            AsyncClient(running.address, handles=HistoryHandles()) as client,
        ):
            for items in ([1], [1, 2]):
                await client.recommend(asked(items))
            with pytest.raises(UnknownHistory):
                await client.recommend(asked([1], history_handle=b"?"))
            page = (await asyncio.to_thread(generate_latest, observer.registry)).decode()
    finally:
        observer.close()
    for line in ("hits_total{%s} 1.0", "misses_total{%s} 1.0", "entries{%s} 2.0"):
        assert "gr_cache_" + line % 'cache="histories"' in page
    assert 'gr_requests_total{model="numbers",outcome="UnknownHistory"} 1.0' in page
