"""Clients of gr.v1, synchronous and asyncio: typed, with deadlines, retries, TLS and tokens.

    with Client("127.0.0.1:50051") as client:
        answer = client.recommend(history=[Behaviour(42, 1_700_000_000_000)], k=5)

Errors are those of `gr_core.errors` where these fit, else `CallError`. A request that a server
cannot take, because it is full or stopping, is tried again before its deadline, when the server
says if it does. With ``handles=HistoryHandles()`` only what is new of histories is sent.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gr_core.errors import DeadlineExceeded, GrError, Overloaded, Unavailable
from gr_core.pipeline import ServedModel
from gr_core.types import (
    Behaviour,
    Candidates,
    Features,
    History,
    ItemId,
    Recommendation,
    RecommendRequest,
    Task,
    item_id_array,
)
from gr_serve_grpc._gen.gr.v1 import cache_service_pb2 as cache_pb
from gr_serve_grpc._gen.gr.v1 import cache_service_pb2_grpc as cache_grpc
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2_grpc as pb_grpc
from gr_serve_grpc.auth import read_file
from gr_serve_grpc.convert import (
    message_from_request,
    models_from_message,
    recommendation_from_message,
)
from gr_serve_grpc.handles import HistoryHandles, calls_for_the_whole
from gr_serve_grpc.status import CallError, error_of_call
from gr_serve_grpc.streams import (
    Outgoing,
    StreamAnswer,
    Unanswered,
    asynchronous,
    outgoing_messages,
)

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "HistoryHandles",
    "RequestFields",
    "Retries",
    "StreamAnswer",
    "Tls",
]

DEFAULT_TARGET = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for an encrypted channel; what is not given is the system's or none."""

    ca: Path | None = None
    """Authorities that the server's certificate must come from."""
    certificate: Path | None = None
    """The client's own certificate, for servers that require one (mutual TLS)."""
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        def read(path: Path | None, name: str) -> bytes | None:
            return None if path is None else read_file(path, name)

        return grpc.ssl_channel_credentials(
            read(self.ca, "ca"), read(self.key, "key"), read(self.certificate, "certificate")
        )


@dataclass(frozen=True, slots=True)
class Retries:
    """When a request is tried again: after waits that double, with jitter, and as servers ask."""

    attempts: int = 5
    """How often in all; 1 means no retries."""
    initial_s: float = 0.05
    max_s: float = 2.0

    def wait(self, attempt: int, error: GrError, remaining_s: float) -> float | None:
        """Seconds to wait after the failed ``attempt`` (from 1); None if it was the last."""
        if attempt >= self.attempts or not isinstance(error, Overloaded | Unavailable):
            return None
        backoff: float = min(self.max_s, self.initial_s * 2 ** (attempt - 1))
        wait = backoff * random.uniform(0.5, 1.0)
        if isinstance(error, Overloaded):
            wait += error.retry_after_s
        return wait if wait < remaining_s else None


class RequestFields(TypedDict, total=False):
    """Fields of a `RecommendRequest`, with rows or lists in place of columns where handy."""

    history: History | Sequence[Behaviour]
    candidates: Candidates | Sequence[ItemId] | None
    k: int
    model: str
    version: str
    task: Task | None
    user_id: str
    user_features: Features
    context_features: Features
    request_time_ms: int | None
    include_seen: bool
    exclude_item_ids: Sequence[ItemId]
    head_weights: Mapping[str, float]
    request_id: str
    history_handle: bytes
    deadline: float | None


def as_request(request: RecommendRequest | None, given: RequestFields) -> RecommendRequest:
    """A request from another one, or none, and some fields."""
    changes: dict[str, Any] = dict(given)
    known = {field.name for field in fields(RecommendRequest)}
    if unknown := changes.keys() - known:
        raise TypeError(f"{sorted(unknown)[0]!r} is not a field of a request: {sorted(known)}")
    history = changes.get("history", History())
    if not isinstance(history, History):
        changes["history"] = History.of(history)
    candidates = changes.get("candidates")
    if candidates is not None and not isinstance(candidates, Candidates):
        changes["candidates"] = Candidates(item_id_array(list(candidates)))
    if "exclude_item_ids" in changes:
        changes["exclude_item_ids"] = item_id_array(list(changes["exclude_item_ids"]))
    if request is not None:
        return replace(request, **changes)
    changes.setdefault("history", History())
    return RecommendRequest(**changes)


class _Common:
    """What both clients share: all but waiting."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 10.0,
        retries: Retries | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        handles: HistoryHandles | None = None,
    ) -> None:
        """Connects when first used. ``timeout_s`` is for a call with all its retries.

        With ``handles``, histories are sent in full only where the server does not know them.
        """
        self.target = target
        self._timeout_s = timeout_s
        self._retries = retries or Retries()
        self._handles = handles
        self._credentials = None if tls is None else tls.credentials()
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._connect()

    def _connect(self) -> None:
        raise NotImplementedError

    _options = (
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A server that is gone without a word ends streams, which have no deadline.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),
    )

    def _deadline(self, timeout_s: float | None, request: RecommendRequest | None = None) -> float:
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        if request is not None and request.deadline is not None:
            deadline = min(deadline, request.deadline)
        return deadline

    def _remaining(self, deadline: float) -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was sent")
        return remaining

    def _wait_or_raise(self, failure: grpc.RpcError, attempt: int, deadline: float) -> float:
        error = error_of_call(failure)
        wait = self._retries.wait(attempt, error, deadline - time.monotonic())
        if wait is None:
            raise error from failure
        return wait

    def _shortened(self, request: RecommendRequest) -> RecommendRequest:
        return request if self._handles is None else self._handles.shortened(request)

    def _learned(self, request: RecommendRequest, message: Any) -> Recommendation:
        answer = recommendation_from_message(message)
        if self._handles is not None:
            self._handles.learn(request, answer.history_handle)
        return answer


class Client(_Common):
    """A synchronous client. Thread-safe."""

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.target, self._options)
        else:
            self._channel = grpc.secure_channel(self.target, self._credentials, self._options)
        self._recommender = pb_grpc.RecommenderServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = cache_grpc.CacheServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def recommend(
        self,
        request: RecommendRequest | None = None,
        *,
        timeout_s: float | None = None,
        **given: Unpack[RequestFields],
    ) -> Recommendation:
        """Recommends items; the request's fields may be given as arguments."""
        request = as_request(request, given)
        deadline = self._deadline(timeout_s, request)
        sent, method = self._shortened(request), self._recommender.Recommend
        try:
            message = self._call(method, message_from_request(sent), deadline)
        except GrError as error:
            if sent is request or not calls_for_the_whole(error):
                raise
            message = self._call(method, message_from_request(request), deadline)
        return self._learned(request, message)

    def recommend_stream(
        self, requests: Iterable[RecommendRequest], *, timeout_s: float | None = None
    ) -> Iterator[StreamAnswer]:
        """Answers many requests over one stream, in the order in which they are finished.

        ``timeout_s`` is for each request. ``requests`` is read on another thread, as far ahead as
        the server allows. If the stream ends early, what was sent and not answered is yielded with
        the error, which is then raised.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        unanswered = Unanswered(timeout_s, self._handles)
        outgoing = None if self._handles is None else Outgoing(requests, unanswered)
        call = self._recommender.RecommendStream(
            map(unanswered.message, requests) if outgoing is None else outgoing,
            metadata=self._metadata,
        )
        answer = unanswered.answer if outgoing is None else outgoing.answer
        try:
            for message in call:
                if (finished := answer(message)) is not None:
                    yield finished
        except grpc.RpcError as failure:
            error = error_of_call(failure)
            yield from unanswered.fail(error)
            raise error from failure
        finally:
            if outgoing is not None:
                outgoing.close()
            call.cancel()

    def list_models(self, *, timeout_s: float | None = None) -> Sequence[ServedModel]:
        """The models that requests may name, the default one first."""
        deadline = self._deadline(timeout_s)
        answer = self._call(self._recommender.ListModels, pb.ListModelsRequest(), deadline)
        return models_from_message(answer.models)

    def get_model(self, name: str = "", *, timeout_s: float | None = None) -> ServedModel:
        """One model, by default the default one. Raises `NotFound`."""
        deadline = self._deadline(timeout_s)
        answer = self._call(self._recommender.GetModel, pb.GetModelRequest(name=name), deadline)
        return models_from_message([answer.model])[0]

    def drop_user(self, user_id: str, *, timeout_s: float | None = None) -> int:
        """Drops what the server holds of a user and returns the number of entries."""
        deadline = self._deadline(timeout_s)
        message = cache_pb.DropUserStateRequest(user_id=user_id)
        dropped: int = self._call(self._cache.DropUserState, message, deadline).dropped_entries
        return dropped

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns when the server says that it serves. Raises `DeadlineExceeded`."""
        deadline = time.monotonic() + timeout_s
        check = health_pb2_grpc.HealthStub(self._channel).Check
        while True:
            try:
                answer = check(
                    health_pb2.HealthCheckRequest(),
                    timeout=self._remaining(deadline),
                    wait_for_ready=True,
                )
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError as failure:
                error = error_of_call(failure)
                if not isinstance(error, Unavailable):
                    raise error from failure
            time.sleep(0.05)

    def _call(self, method: Any, message: Any, deadline: float) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return method(message, timeout=self._remaining(deadline), metadata=self._metadata)
            except grpc.RpcError as failure:
                wait = self._wait_or_raise(failure, attempt, deadline)
            time.sleep(wait)


class AsyncClient(_Common):
    """An asyncio client. To be made, used and closed on one event loop."""

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self.target, self._options)
        else:
            self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        self._recommender = pb_grpc.RecommenderServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = cache_grpc.CacheServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def recommend(
        self,
        request: RecommendRequest | None = None,
        *,
        timeout_s: float | None = None,
        **given: Unpack[RequestFields],
    ) -> Recommendation:
        """Recommends items; the request's fields may be given as arguments."""
        request = as_request(request, given)
        deadline = self._deadline(timeout_s, request)
        sent, method = self._shortened(request), self._recommender.Recommend
        try:
            message = await self._call(method, message_from_request(sent), deadline)
        except GrError as error:
            if sent is request or not calls_for_the_whole(error):
                raise
            message = await self._call(method, message_from_request(request), deadline)
        return self._learned(request, message)

    async def recommend_stream(
        self,
        requests: Iterable[RecommendRequest] | AsyncIterable[RecommendRequest],
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[StreamAnswer]:
        """Answers many requests over one stream, in the order in which they are finished.

        ``timeout_s`` is for each request. ``requests`` is read as far ahead as the server allows.
        If the stream ends early, what was sent and not answered is yielded with the error, which
        is then raised.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        unanswered = Unanswered(timeout_s, self._handles)
        answered = asyncio.Event()
        messages = outgoing_messages(asynchronous(requests), unanswered, answered)
        call = self._recommender.RecommendStream(messages, metadata=self._metadata)
        try:
            async for message in call:
                answer = unanswered.answer(message)
                answered.set()
                if answer is not None:
                    yield answer
        except grpc.RpcError as failure:
            error = error_of_call(failure)
            for answer in unanswered.fail(error):
                yield answer
            raise error from failure
        finally:
            call.cancel()

    async def list_models(self, *, timeout_s: float | None = None) -> Sequence[ServedModel]:
        """The models that requests may name, the default one first."""
        deadline = self._deadline(timeout_s)
        answer = await self._call(self._recommender.ListModels, pb.ListModelsRequest(), deadline)
        return models_from_message(answer.models)

    async def get_model(self, name: str = "", *, timeout_s: float | None = None) -> ServedModel:
        """One model, by default the default one. Raises `NotFound`."""
        deadline = self._deadline(timeout_s)
        message = pb.GetModelRequest(name=name)
        answer = await self._call(self._recommender.GetModel, message, deadline)
        return models_from_message([answer.model])[0]

    async def drop_user(self, user_id: str, *, timeout_s: float | None = None) -> int:
        """Drops what the server holds of a user and returns the number of entries."""
        deadline = self._deadline(timeout_s)
        message = cache_pb.DropUserStateRequest(user_id=user_id)
        answer = await self._call(self._cache.DropUserState, message, deadline)
        dropped: int = answer.dropped_entries
        return dropped

    async def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns when the server says that it serves. Raises `DeadlineExceeded`."""
        deadline = time.monotonic() + timeout_s
        check = health_pb2_grpc.HealthStub(self._channel).Check
        while True:
            try:
                answer = await check(
                    health_pb2.HealthCheckRequest(),
                    timeout=self._remaining(deadline),
                    wait_for_ready=True,
                )
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError as failure:
                error = error_of_call(failure)
                if not isinstance(error, Unavailable):
                    raise error from failure
            await asyncio.sleep(0.05)

    async def _call(self, method: Any, message: Any, deadline: float) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await method(
                    message, timeout=self._remaining(deadline), metadata=self._metadata
                )
            except grpc.RpcError as failure:
                wait = self._wait_or_raise(failure, attempt, deadline)
            await asyncio.sleep(wait)
