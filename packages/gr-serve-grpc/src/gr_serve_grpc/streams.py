"""The client's side of RecommendStream: what is sent, what is unanswered, what goes once more."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gr_core.errors import GrError
from gr_core.types import Recommendation, RecommendRequest
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc.convert import message_from_request, recommendation_from_message
from gr_serve_grpc.handles import HistoryHandles, calls_for_the_whole
from gr_serve_grpc.status import error_of


@dataclass(frozen=True, slots=True)
class StreamAnswer:
    """What became of one of many requests."""

    request_id: str
    recommendation: Recommendation | None = None
    error: GrError | None = None

    def result(self) -> Recommendation:
        """The recommendation. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        assert self.recommendation is not None
        return self.recommendation


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request of a stream that is not yet answered."""

    request: RecommendRequest
    """With its whole history, unless the caller gave a handle."""
    sent: RecommendRequest
    deadline: float

    @property
    def is_short(self) -> bool:
        return self.sent is not self.request


class Unanswered:
    """The requests of a stream that were sent and not yet answered."""

    def __init__(self, timeout_s: float, handles: HistoryHandles | None) -> None:
        self._timeout_s = timeout_s
        self.handles = handles
        self._requests: dict[str, _Sent] = {}
        self.again: deque[pb.RecommendStreamRequest] = deque()
        """What must be sent once more, whole."""

    def message(self, request: RecommendRequest) -> pb.RecommendStreamRequest:
        if not request.request_id:
            request = replace(request, request_id=uuid.uuid4().hex)
        deadline = time.monotonic() + self._timeout_s
        if request.deadline is not None:
            deadline = min(deadline, request.deadline)
        sent = request if self.handles is None else self.handles.shortened(request)
        return self._send(_Sent(request, sent, deadline))

    def _send(self, this: _Sent) -> pb.RecommendStreamRequest:
        self._requests[this.request.request_id] = this
        message = pb.RecommendStreamRequest(request=message_from_request(this.sent))
        message.timeout.FromNanoseconds(int(max(this.deadline - time.monotonic(), 0) * 1e9))
        return message

    def answer(self, message: pb.RecommendStreamResponse) -> StreamAnswer | None:
        """None where the request is sent ``again``."""
        this = self._requests.pop(message.request_id, None)
        if message.WhichOneof("result") == "error":
            error = error_of(message.error)
            if this is not None and this.is_short and calls_for_the_whole(error):
                self.again.append(self._send(replace(this, sent=this.request)))
                return None
            return StreamAnswer(message.request_id, error=error)
        recommendation = recommendation_from_message(message.response)
        if this is not None and self.handles is not None:
            self.handles.learn(this.request, recommendation.history_handle)
        return StreamAnswer(message.request_id, recommendation)

    def may_send_again(self) -> bool:
        return bool(self.again) or any(this.is_short for this in list(self._requests.values()))

    def fail(self, error: GrError) -> Iterator[StreamAnswer]:
        for request_id in list(self._requests):
            yield StreamAnswer(request_id, error=error)
        self._requests.clear()


class Outgoing:
    """The messages of a synchronous stream: of its requests, and of those that go once more.

    The requests are read on a thread, because the next one may be long in coming, or wait for the
    answer to one that must be sent again. It is read when a message is asked for, not before.
    """

    def __init__(self, requests: Iterable[RecommendRequest], unanswered: Unanswered) -> None:
        self._requests = iter(requests)
        self._unanswered = unanswered
        self._changed = threading.Condition()
        self._wanted = self._ended = self._closed = False
        self._next: pb.RecommendStreamRequest | None = None
        self._failure: BaseException | None = None
        threading.Thread(target=self._read, name="gr-grpc-requests", daemon=True).start()

    def __iter__(self) -> Iterator[pb.RecommendStreamRequest]:
        return self

    def __next__(self) -> pb.RecommendStreamRequest:
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(self._has_something_to_say)
            if self._closed:
                raise StopIteration
            if self._unanswered.again:
                return self._unanswered.again.popleft()
            if self._next is not None:
                message, self._next, self._wanted = self._next, None, False
                return message
            if self._failure is not None:
                raise self._failure
            raise StopIteration

    def _has_something_to_say(self) -> bool:
        if self._closed or self._unanswered.again or self._next is not None:
            return True
        return self._ended and not self._unanswered.may_send_again()

    def answer(self, message: pb.RecommendStreamResponse) -> StreamAnswer | None:
        with self._changed:
            answer = self._unanswered.answer(message)
            self._changed.notify_all()
            return answer

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        failure: BaseException | None = None
        try:
            while self._is_wanted():
                message = self._unanswered.message(next(self._requests))
                with self._changed:
                    self._next = message
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            failure = error
        with self._changed:
            self._ended, self._failure = True, failure
            self._changed.notify_all()

    def _is_wanted(self) -> bool:
        """Waits until a message is wanted; False if none will be any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._wanted and self._next is None))
            return not self._closed


async def asynchronous(
    requests: Iterable[RecommendRequest] | AsyncIterable[RecommendRequest],
) -> AsyncIterator[RecommendRequest]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request


async def outgoing_messages(
    requests: AsyncIterator[RecommendRequest], unanswered: Unanswered, answered: asyncio.Event
) -> AsyncIterator[pb.RecommendStreamRequest]:
    """The messages of a stream: of its requests, and of those that go once more.

    The next request may be long in coming, or wait for the answer to one that must be sent again.
    """
    if unanswered.handles is None:
        async for each in requests:
            yield unanswered.message(each)
        return
    reading: asyncio.Future[RecommendRequest | None] | None = None
    ended = False
    try:
        while not ended or unanswered.may_send_again():
            if unanswered.again:
                yield unanswered.again.popleft()
                continue
            if reading is None and not ended:
                reading = asyncio.ensure_future(anext(requests, None))
            answered.clear()
            waiting = asyncio.ensure_future(answered.wait())
            try:
                awaited: set[asyncio.Future[Any]] = {waiting}
                if reading is not None:
                    awaited.add(reading)
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                if request is None:
                    ended = True
                else:
                    yield unanswered.message(request)
    finally:
        if reading is not None:
            reading.cancel()
