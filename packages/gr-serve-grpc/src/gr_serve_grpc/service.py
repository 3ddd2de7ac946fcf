"""The methods of gr.v1, on raw bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from gr_core.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable, Violation
from gr_core.pipeline import Pipeline
from gr_core.types import RecommendRequest
from gr_serve_grpc._gen.gr.v1 import cache_service_pb2 as cache_pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc.calls import Call, Calls, RequestIds
from gr_serve_grpc.convert import (
    message_from_model,
    message_from_recommendation,
    request_from_message,
)
from gr_serve_grpc.settings import GrpcSettings

AnyMessage = TypeVar("AnyMessage", bound=Message)

INLINE_BYTES = 64 * 1024
"""Larger requests are read on a thread, so that they do not hold up the event loop."""


def parsed(kind: type[AnyMessage], data: bytes, limit: int = INLINE_BYTES) -> AnyMessage:
    """Raises `InvalidRequest` for bytes that are too many or not such a message."""
    if len(data) > limit:
        raise InvalidRequest([Violation("request", f"{len(data)} bytes, expected at most {limit}")])
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        problem = f"{len(data)} bytes that are not an encoded {name}"
        raise InvalidRequest([Violation("request", problem)]) from None


class RecommenderMethods:
    """RecommenderService."""

    def __init__(self, pipeline: Pipeline, settings: GrpcSettings, calls: Calls) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._calls = calls
        self._limits = pipeline.limits
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="gr-grpc-read")
        self._draining = asyncio.Event()
        self._streams: set[asyncio.Task[Any]] = set()

    def drain(self) -> None:
        """Streams read no more requests, answer those that they have, and end."""
        self._draining.set()
        for stream in self._streams:
            stream.cancel()

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    # ── Recommend ────────────────────────────────────────────────────────────────────────────

    async def recommend(self, data: bytes, call: Call) -> bytes:
        request = await self._read(self._parse, data, call)
        answer = await self._pipeline.recommend(request)
        return message_from_recommendation(answer).SerializeToString()

    async def _read(
        self, parse: Callable[[bytes, Call], RecommendRequest], data: bytes, call: Call
    ) -> RecommendRequest:
        if len(data) <= INLINE_BYTES:
            return parse(data, call)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, parse, data, call)

    def _parse(self, data: bytes, call: Call) -> RecommendRequest:
        message = parsed(pb.RecommendRequest, data, self._settings.max_receive_bytes)
        return self._request(message, call, self._calls.ids.choose(message.request_id, call))

    def _request(
        self, message: pb.RecommendRequest, call: Call, request_id: str
    ) -> RecommendRequest:
        if (problem := RequestIds.problem(request_id)) is not None:
            raise InvalidRequest([Violation("request_id", problem)])
        call.request_id = request_id
        return request_from_message(
            message,
            self._limits,
            request_id=request_id,
            deadline=call.deadline,
            arrived_ms=time.time_ns() // 1_000_000,
        )

    # ── RecommendStream ──────────────────────────────────────────────────────────────────────

    async def recommend_stream(self, call: Call) -> None:
        slots = asyncio.Semaphore(self._settings.max_stream_in_flight)
        writing = asyncio.Lock()
        unanswered: set[str] = set()

        async def answer(data: bytes) -> None:
            this = Call(call.context, call.method, call.deadline, time.perf_counter())
            response = await self._answer_streamed(data, this, unanswered)
            async with writing:
                await call.context.write(response.SerializeToString())
            slots.release()

        async with asyncio.TaskGroup() as tasks:
            while (data := await self._next(call, slots)) is not None:
                tasks.create_task(answer(data))
        if self._draining.is_set():
            raise Unavailable("the server is shutting down; send what is unanswered to another one")

    async def _next(self, call: Call, slots: asyncio.Semaphore) -> bytes | None:
        """The next message of a stream, once there is room for it; None at the end or at drain."""
        if self._draining.is_set():
            return None
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            await slots.acquire()
            data = await call.context.read()
        except asyncio.CancelledError:
            # Cancelled by `drain`, and not by the client as well.
            if self._draining.is_set() and task.uncancel() == 0:
                return None
            raise
        finally:
            self._streams.discard(task)
        return data if isinstance(data, bytes) else None

    async def _answer_streamed(
        self, data: bytes, call: Call, unanswered: set[str]
    ) -> pb.RecommendStreamResponse:
        mine: set[str] = set()
        try:
            with self._calls.admission:
                request = await self._read(self._parse_streamed, data, call)
                if request.request_id in unanswered:
                    problem = "belongs to an unanswered request of this stream"
                    raise InvalidRequest([Violation("request_id", problem)])
                mine.add(request.request_id)
                unanswered |= mine
                # The transport cancels unary calls at their deadline; these are cancelled here.
                async with asyncio.timeout(call.deadline - time.monotonic()):
                    answer = await self._pipeline.recommend(request)
            self._calls.admission.took(time.perf_counter() - call.started)
            response = message_from_recommendation(answer)
            return pb.RecommendStreamResponse(request_id=call.request_id, response=response)
        except Exception as error:
            if isinstance(error, TimeoutError) and time.monotonic() >= call.deadline:
                error = DeadlineExceeded("the deadline passed")
            _, status = self._calls.failure(error, call)
            return pb.RecommendStreamResponse(request_id=call.request_id, error=status)
        finally:
            unanswered -= mine

    def _parse_streamed(self, data: bytes, call: Call) -> RecommendRequest:
        message = parsed(pb.RecommendStreamRequest, data, self._settings.max_receive_bytes)
        timeout_s = self._settings.default_timeout_s
        if message.HasField("timeout"):
            timeout_s = message.timeout.ToNanoseconds() / 1e9
        call.deadline = min(call.deadline, time.monotonic() + timeout_s)
        if not message.request.request_id:
            raise InvalidRequest([Violation("request_id", "empty, expected an id")])
        return self._request(message.request, call, message.request.request_id)

    # ── Models ───────────────────────────────────────────────────────────────────────────────

    async def list_models(self, data: bytes, call: Call) -> bytes:
        parsed(pb.ListModelsRequest, data)
        models = sorted(self._pipeline.models(), key=lambda model: not model.default)
        return pb.ListModelsResponse(
            models=[message_from_model(model) for model in models]
        ).SerializeToString()

    async def get_model(self, data: bytes, call: Call) -> bytes:
        name = parsed(pb.GetModelRequest, data).name
        models = self._pipeline.models()
        for model in models:
            if model.name == name or (model.default and not name):
                return pb.GetModelResponse(model=message_from_model(model)).SerializeToString()
        known = ", ".join(model.name for model in models)
        raise NotFound(f"name: {name!r} is not served; there are: {known}")


class CacheMethods:
    """CacheService."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def drop_user_state(self, data: bytes, call: Call) -> bytes:
        user_id = parsed(cache_pb.DropUserStateRequest, data).user_id
        if not user_id:
            raise InvalidRequest([Violation("user_id", "empty, expected the id of a user")])
        dropped = self._pipeline.drop_user(user_id)
        return cache_pb.DropUserStateResponse(dropped_entries=dropped).SerializeToString()
