"""Whatever comes in: one answer that names every wrong field, and the server lives."""

from __future__ import annotations

import asyncio
import os
import struct
import time

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from gr_core import Behaviour, Candidates, History
from gr_core.errors import InvalidRequest, NotFound
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc.client import AsyncClient

NOW = 1_700_000_000_000
RECOMMEND = "/gr.v1.RecommenderService/Recommend"


@pytest.fixture
async def server(serve):
    """The address of a server that must still answer when the test is over."""
    async with serve() as running, AsyncClient(running.address) as client:
        await client.wait_until_ready()
        yield running.address
        assert len((await client.recommend(k=2)).items) == 2


async def send(address: str, data: bytes, method: str = RECOMMEND, **options) -> bytes:
    channel_options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, channel_options) as channel:
        return await channel.unary_unary(method)(data, timeout=10, **options)


async def rejected(address: str, message: pb.RecommendRequest) -> dict[str, str]:
    """The violations that a request is answered with, by field."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(address, message.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return violations(caught.value)


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    (details,) = [v for k, v in error.trailing_metadata() if k == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    bad, info = error_details_pb2.BadRequest(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(bad)
    assert status.details[1].Unpack(info)
    assert info.request_id
    return {violation.field: violation.description for violation in bad.field_violations}


def columns(n: int, **signals: list[float]) -> pb.RecommendRequest:
    message = pb.RecommendRequest()
    message.history.columns.item_ids.integers.values.extend(range(1, n + 1))
    message.history.columns.timestamps_ms.values.extend([NOW] * n)
    for name, values in signals.items():
        message.history.columns.signals[name].values.extend(values)
    return message


async def test_all_violations_are_named_at_once(server: str):
    message = columns(3, watch_percentage=[0.5, float("nan"), 1.0], is_liked=[1.0])
    message.history.columns.timestamps_ms.values[0] = -5
    message.history.columns.timestamps_ms.values[2] = NOW * 1000
    message.k = 0
    message.task = 17
    message.candidates.SetInParent()
    message.head_weights["up"] = float("inf")
    message.user_features["age"].number = float("nan")
    message.context_features["page"].SetInParent()
    message.request_time_ms = -1
    assert set(await rejected(server, message)) == {
        "candidates.item_ids",
        "context_features['page']",
        "head_weights['up']",
        "history.signals['is_liked']",
        "history.signals['watch_percentage'][1]",
        "history.timestamps_ms[0]",
        "history.timestamps_ms[2]",
        "k",
        "request_time_ms",
        "task",
        "user_features['age']",
    }


async def test_rows_are_named_like_columns(server: str):
    message = pb.RecommendRequest()
    rows = message.history.rows.behaviours
    rows.add(timestamp_ms=NOW, signals={"watch_percentage": float("nan")}).item_id.integer = 1
    rows.add(timestamp_ms=-1).item_id.text = "two"
    rows.add(timestamp_ms=NOW, signals={"watch_percentage": float("inf")}).item_id.text = "three"
    rows.add(timestamp_ms=NOW)
    assert set(await rejected(server, message)) == {
        "history.item_ids[0]",
        "history.item_ids[3]",
        "history.signals['watch_percentage'][0]",
        "history.signals['watch_percentage'][2]",
        "history.timestamps_ms[1]",
    }


@pytest.mark.parametrize("k", [0, -1, 10**9, -(2**31)])
async def test_k_must_be_within_bounds(server: str, k: int):
    found = await rejected(server, pb.RecommendRequest(k=k))
    assert found == {"k": f"{k}, expected 1 to 1000"}


async def test_a_hundred_thousand_behaviours(serve):
    n = 100_000
    history = History(np.arange(n) % 50 + 1, np.full(n, NOW), {"s": np.zeros(n, np.float32)})
    async with serve() as running, AsyncClient(running.address) as client:
        with pytest.raises(InvalidRequest, match="100000 behaviours, expected at most 1000"):
            await client.recommend(history=history)
        rows = pb.RecommendRequest()
        for i in range(n):
            rows.history.rows.behaviours.add(timestamp_ms=NOW).item_id.integer = i
        found = await rejected(running.address, rows)
        assert found == {"history": "100000 behaviours, expected at most 1000"}
        assert (await client.recommend(history=[Behaviour(1, NOW)])).items


async def test_sparse_signals_do_not_fill_the_memory(server: str):
    """A message of 20 kB that would become columns of 1000 rows for each of 1000 names."""
    message = pb.RecommendRequest()
    for i in range(1000):
        row = message.history.rows.behaviours.add(timestamp_ms=NOW, signals={f"s{i}": 1.0})
        row.item_id.integer = i
    found = await rejected(server, message)
    assert found == {"history.signals": "more than 256 names, expected fewer for 1000 rows"}


async def test_duplicate_and_unknown_items(server: str):
    message = pb.RecommendRequest()
    message.candidates.item_ids.integers.values.extend([3, 4, 3])
    assert set(await rejected(server, message)) == {"candidates.item_ids[2]"}
    async with AsyncClient(server) as client:
        answer = await client.recommend(candidates=[-1, 2**62], history=[Behaviour(-7, NOW)])
        assert not answer.items
        assert list(answer.unscored_item_ids) == [-1, 2**62]
        assert answer.unknown_items == 1


async def test_text_ids_for_a_catalogue_of_integers_are_unknown(server: str):
    async with AsyncClient(server) as client:
        answer = await client.recommend(candidates=["3", "x"])
        assert len(answer.items) + len(answer.unscored_item_ids) == 2


async def test_columns_of_unequal_length(server: str):
    message = columns(3)
    message.history.columns.timestamps_ms.values.append(NOW)
    message.candidates.item_ids.integers.values.extend([1, 2])
    message.candidates.features["price"].values.extend([1.0])
    found = await rejected(server, message)
    assert set(found) == {"history.timestamps_ms", "candidates.features['price']"}
    assert "4 times for 3 item ids" in found["history.timestamps_ms"]


async def test_missing_rows_must_be_rows(server: str):
    message = columns(2, s=[1.0, 2.0])
    message.history.columns.signals["s"].missing.append(2)
    found = await rejected(server, message)
    assert found == {"history.signals['s'].missing": "2, expected indices less than 2"}


async def test_request_ids_cannot_forge_log_lines(server: str):
    for request_id in ("a\nb", "é", "x" * 129):
        assert set(await rejected(server, pb.RecommendRequest(request_id=request_id))) == {
            "request_id"
        }


async def test_many_violations_fit_into_the_headers(server: str):
    message = columns(1)
    for i in range(200):
        message.history.columns.signals[f"{i}" + "long name " * 60].values.append(float("nan"))
    found = await rejected(server, message)
    assert "more violations" in found["request"]
    assert len(found) > 1


async def test_a_wrong_name_of_any_length_fits_into_the_headers(server: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(server, pb.RecommendRequest(model="ü" * 100_000).SerializeToString())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    async with AsyncClient(server) as client:
        with pytest.raises(NotFound):
            await client.get_model("ü" * 10_000)


async def test_bytes_that_are_no_message(server: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(server, b"\xff" * 100)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = violations(caught.value)
    assert found == {"request": "100 bytes that are not an encoded gr.v1.RecommendRequest"}


@pytest.mark.parametrize("method", ["/gr.v1.RecommenderService/Other", "/x.Y/Z"])
async def test_methods_that_are_not_there(server: str, method: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(server, b"", method)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_of_20_mb(server: str):
    message = pb.RecommendRequest()
    message.user_features["x"].text = "x" * 20_000_000
    found = await rejected(server, message)
    assert found["request"].endswith("expected at most 16777216")


async def test_a_message_beyond_what_the_transport_takes(server: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(server, b"\x00" * 50_000_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(2000),
        # A preface, then a frame that claims 16 MB.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0xFFFFFF)[1:] + b"\x00" * 6,
        b"",
    ],
    ids=["random", "http1", "random-http2", "huge-frame", "nothing"],
)
async def test_random_bytes_on_the_port(server: str, data: bytes):
    host, port = server.rsplit(":", 1)
    for _ in range(5):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()


async def test_a_client_that_vanishes(serve, control):
    """Its requests are dropped from the queue before they are computed."""
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address) as other:
        vanishing = AsyncClient(running.address)
        held = asyncio.create_task(vanishing.recommend(user_id="wait"))
        assert await asyncio.to_thread(control.entered.acquire, timeout=10)
        waiting = [asyncio.create_task(vanishing.recommend()) for _ in range(3)]
        await asyncio.sleep(0.2)
        await vanishing.close()
        await asyncio.wait([held, *waiting], timeout=5)
        await asyncio.sleep(0.2)
        control.gate.set()
        assert (await other.recommend(k=1)).items
        assert control.answered == 2  # the one in the engine, and the one just now


async def test_a_deadline_that_passes(serve, control):
    control.gate.clear()
    async with serve() as running, AsyncClient(running.address) as client:
        started = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)deadline") as caught:
            await client.recommend(user_id="wait", timeout_s=0.3)
        assert type(caught.value).__name__ == "DeadlineExceeded"
        assert time.monotonic() - started < 3
        control.gate.set()
        assert (await client.recommend(k=1)).items


async def test_candidates_with_cross_features(server: str):
    features = {"price": np.array([1.0, np.nan], np.float32)}
    async with AsyncClient(server) as client:
        answer = await client.recommend(candidates=Candidates(np.array([1, 2]), features))
        assert [item.item_id for item in answer.items] == [2, 1]
