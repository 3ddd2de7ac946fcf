from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from gr_core import History, RecommendRequest
from gr_core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2_grpc as pb_grpc
from gr_serve_grpc.client import AsyncClient, CallError


def request(request_id: str, k: int = 1, **fields) -> RecommendRequest:
    return RecommendRequest(History(), k=k, request_id=request_id, **fields)


async def test_a_poisoned_request_fails_alone(serve):
    requests = [
        request("a"),
        request("poisoned", user_id="poison"),
        request("bad", k=0),
        request("unknown", model="films"),
        request("b", 2),
    ]
    async with serve() as running, AsyncClient(running.address) as client:
        answers = {a.request_id: a async for a in client.recommend_stream(requests)}
        assert len(answers["a"].result().items) == 1
        assert len(answers["b"].result().items) == 2
        assert isinstance(answers["poisoned"].error, CallError)
        assert "secret" not in str(answers["poisoned"].error)
        assert isinstance(answers["bad"].error, InvalidRequest)
        assert answers["bad"].error.violations[0].field == "k"
        with pytest.raises(Exception, match="films"):
            answers["unknown"].result()


async def test_answers_come_as_they_finish(serve, control):
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address) as client:

        async def requests():
            yield request("slow", user_id="wait")
            await asyncio.to_thread(control.entered.acquire, timeout=10)
            yield request("quick", k=0)

        order = []
        async for answer in client.recommend_stream(requests()):
            order.append(answer.request_id)
            control.gate.set()
        assert order == ["quick", "slow"]


async def test_the_server_reads_no_more_than_it_may_have_unanswered(serve, control):
    control.gate.clear()
    async with (
        serve(max_stream_in_flight=3) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = pb_grpc.RecommenderServiceStub(channel).RecommendStream(timeout=20)

        def message(i: int) -> pb.RecommendStreamRequest:
            inner = pb.RecommendRequest(request_id=str(i), user_id="wait" if i == 0 else "")
            return pb.RecommendStreamRequest(request=inner)

        for i in range(3):
            await call.write(message(i))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        # The fourth is invalid and would be answered at once, were it read.
        await call.write(pb.RecommendStreamRequest())
        reading = asyncio.ensure_future(call.read())
        done, _ = await asyncio.wait([reading], timeout=0.3)
        assert not done
        control.gate.set()
        answers = [await reading] + [await call.read() for _ in range(3)]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert sorted(a.request_id for a in answers) == ["", "0", "1", "2"]


async def test_ids_are_required_and_unique_while_unanswered(serve, control):
    control.gate.clear()
    async with serve() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = pb_grpc.RecommenderServiceStub(channel).RecommendStream(timeout=20)
        first = pb.RecommendRequest(request_id="twin", user_id="wait")
        await call.write(pb.RecommendStreamRequest(request=first))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        await call.write(pb.RecommendStreamRequest(request=pb.RecommendRequest(request_id="twin")))
        answer = await call.read()
        assert answer.request_id == "twin"
        assert "unanswered request" in answer.error.message
        control.gate.set()
        assert (await call.read()).response.items
        # Once answered, the id is free again.
        await call.write(pb.RecommendStreamRequest(request=pb.RecommendRequest(request_id="twin")))
        assert (await call.read()).response.items
        await call.done_writing()


async def test_each_request_has_a_deadline_of_its_own(serve, control):
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address) as client:
        late = request("late", deadline=time.monotonic() + 0.2)
        answers = []
        async for answer in client.recommend_stream([request("held", user_id="wait"), late]):
            answers.append(answer)
            control.gate.set()
        assert [answer.request_id for answer in answers] == ["late", "held"]
        assert isinstance(answers[0].error, DeadlineExceeded)
        assert answers[1].result().items


async def test_a_stream_outlives_the_deadlines_of_its_requests(serve):
    async with (
        serve(default_timeout_s=0.3) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = pb_grpc.RecommenderServiceStub(channel).RecommendStream()
        for i in range(3):
            inner = pb.RecommendRequest(request_id=str(i))
            await call.write(pb.RecommendStreamRequest(request=inner))
            assert (await call.read()).response.items
            await asyncio.sleep(0.25)
        await call.done_writing()


async def test_bytes_that_are_no_message_end_no_stream(serve):
    async with serve() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = channel.stream_stream("/gr.v1.RecommenderService/RecommendStream")(timeout=20)
        await call.write(b"\xff\xff\xff")
        answer = pb.RecommendStreamResponse.FromString(await call.read())
        assert "not an encoded gr.v1.RecommendStreamRequest" in answer.error.message
        good = pb.RecommendStreamRequest(request=pb.RecommendRequest(request_id="good"))
        await call.write(good.SerializeToString())
        assert pb.RecommendStreamResponse.FromString(await call.read()).response.items
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


async def test_overload_is_said_for_each_request(serve, control):
    control.gate.clear()
    async with serve(max_queue=1) as running, AsyncClient(running.address) as client:
        requests = [request("0", user_id="wait"), *(request(str(i)) for i in range(1, 6))]
        errors = []
        async for answer in client.recommend_stream(requests):
            if answer.error is not None:
                errors.append(answer.error)
            if len(errors) == 3:
                control.gate.set()
        assert errors
        assert all(isinstance(e, Overloaded) and e.retry_after_s > 0 for e in errors)


async def test_a_stream_is_answered_and_ended_at_shutdown(serve, control):
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address) as client:

        async def requests():
            for i in range(3):
                yield request(str(i), user_id="wait" if i == 0 else "")
            await asyncio.Event().wait()  # this client never ends its stream

        stream = client.recommend_stream(requests(), timeout_s=20)
        reading = asyncio.ensure_future(anext(stream))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(running.finished())
        await asyncio.sleep(0.2)
        assert not stopping.done()
        control.gate.set()
        answered = [(await reading).result().request_id]
        answered += [(await anext(stream)).result().request_id for _ in range(2)]
        assert sorted(answered) == ["0", "1", "2"]
        with pytest.raises(Unavailable, match="shutting down"):
            await anext(stream)
        await stopping
