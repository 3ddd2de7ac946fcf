"""What happens around every call, in one order.

1. Authentication, before the request is read; all services but health need a token, if any does.
2. Metrics: started, handled by code, seconds.
3. Errors: each becomes a status with details, and only errors meant for callers show their text.
4. Admission: no more requests in work than allowed.
5. The method itself, which reads the request, its id and its deadline.

This is not a stack of `grpc.aio` interceptors because each of those costs every call about as much
as all of this together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from grpc_status import rpc_status

from gr_core.errors import Overloaded
from gr_serve_grpc.auth import Tokens
from gr_serve_grpc.metrics import CallMetrics, PrometheusObserver
from gr_serve_grpc.settings import GrpcSettings
from gr_serve_grpc.status import code_of, status_of

logger = logging.getLogger(__name__)

Context: TypeAlias = Any
"""A `grpc.aio.ServicerContext` of raw bytes."""
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Handlers: TypeAlias = "grpc.GenericRpcHandler[Any, Any]"
Code = grpc.StatusCode

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID = 128


@dataclass(slots=True)
class Call:
    """One request in work."""

    context: Context
    method: str
    deadline: float
    """`time.monotonic()` seconds."""
    started: float
    """`time.perf_counter()` seconds."""
    request_id: str = ""


Unary: TypeAlias = Callable[[bytes, Call], Coroutine[Any, Any, bytes]]
Stream: TypeAlias = Callable[[Call], Coroutine[Any, Any, None]]
T = TypeVar("T")


class RequestIds:
    """Ids for requests that come without one: unique among processes, cheap, and in order."""

    def __init__(self) -> None:
        self._prefix = os.urandom(8).hex()
        self._numbers = itertools.count(1)

    def make(self) -> str:
        return f"{self._prefix}-{next(self._numbers):x}"

    def choose(self, given: str, call: Call) -> str:
        """The id of the message, else of the metadata, else a new one."""
        if given:
            return given
        for key, value in call.context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY and isinstance(value, str) and value:
                return value
        return self.make()

    @staticmethod
    def problem(request_id: str) -> str | None:
        """What is wrong with an id, which logs and answers repeat."""
        if len(request_id) > MAX_REQUEST_ID:
            return f"{len(request_id)} characters, expected at most {MAX_REQUEST_ID}"
        if not (request_id.isascii() and request_id.isprintable()):
            return f"{request_id!r}, expected printable ASCII characters"
        return None


class Admission:
    """``with admission:`` counts a request in work. Raises `Overloaded` if there are too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_work = 0
        self._usual_s = 0.05

    def __enter__(self) -> None:
        if self._in_work >= self._limit:
            raise Overloaded(
                f"{self._in_work} requests are in work, which is the limit", self._usual_s
            )
        self._in_work += 1

    def __exit__(self, *_: object) -> None:
        self._in_work -= 1

    def took(self, seconds: float) -> None:
        """Learns how long requests take, which is when the refused ones should come back."""
        self._usual_s += 0.05 * (seconds - self._usual_s)


class Calls:
    """Wraps methods and remembers what is in work."""

    def __init__(self, settings: GrpcSettings, metrics: PrometheusObserver | None) -> None:
        self.ids = RequestIds()
        self._settings = settings
        self._metrics = metrics
        self.admission = Admission(settings.max_concurrent_requests)
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is open."""
        await self._idle.wait()

    def unary(self, service: str, method: str, handle: Unary) -> Handler:
        """A handler of raw bytes for a unary method."""
        metrics = self._call_metrics(service, method, "unary")

        async def admitted(data: bytes, this: Call) -> bytes:
            with self.admission:
                answer = await handle(data, this)
            self.admission.took(time.perf_counter() - this.started)
            return answer

        async def call(data: bytes, context: Context) -> bytes:
            this = self._enter(context, method, metrics, self._settings.default_timeout_s)
            return await self._around(this, metrics, admitted(data, this))

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, service: str, method: str, handle: Stream) -> Handler:
        """A handler of raw bytes for a bidirectional method, which admits each of its requests."""
        metrics = self._call_metrics(service, method, "bidi_stream")

        async def call(_: Any, context: Context) -> None:
            this = self._enter(context, method, metrics, math.inf)
            await self._around(this, metrics, handle(this))

        return grpc.stream_stream_rpc_method_handler(call)

    async def _around(
        self, call: Call, metrics: CallMetrics | None, work: Coroutine[Any, Any, T]
    ) -> T:
        code = Code.CANCELLED
        try:
            result = await work
            code = Code.OK
            return result
        except Exception as error:
            code, status = self.failure(error, call)
        except asyncio.CancelledError:
            if time.monotonic() >= call.deadline:
                code = Code.DEADLINE_EXCEEDED
            raise
        finally:
            self._leave(call, code, metrics)
        await call.context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError

    def _call_metrics(self, service: str, method: str, kind: str) -> CallMetrics | None:
        if self._metrics is None:
            return None
        return CallMetrics(self._metrics, service, method, kind)

    def _enter(
        self, context: Context, method: str, metrics: CallMetrics | None, timeout_s: float
    ) -> Call:
        """``timeout_s`` is for calls that come without a deadline."""
        if metrics is not None:
            metrics.started()
        self._open += 1
        if self._open == 1:
            self._idle.clear()
        remaining = context.time_remaining()
        if remaining is None:
            remaining = timeout_s
        return Call(context, method, time.monotonic() + remaining, time.perf_counter())

    def _leave(self, call: Call, code: grpc.StatusCode, metrics: CallMetrics | None) -> None:
        seconds = time.perf_counter() - call.started
        if metrics is not None:
            metrics.handled(code, seconds)
        self._open -= 1
        if not self._open:
            self._idle.set()
        if self._settings.access_log:
            logger.info(
                "%s %s %s %.1f ms", call.method, code.name, call.request_id, seconds * 1e3,
                extra={
                    "method": call.method, "code": code.name, "request_id": call.request_id,
                    "seconds": seconds,
                },
            )  # fmt: skip

    def failure(self, error: Exception, call: Call) -> tuple[grpc.StatusCode, Status]:
        """Code and status of a request that failed. Logs what is nobody's mistake but ours."""
        request_id = call.request_id or self.ids.make()
        code = code_of(error)
        if code is Code.INTERNAL:
            logger.error(
                "%s failed, request %s", call.method, request_id,
                exc_info=error,
                extra={"method": call.method, "code": code.name, "request_id": request_id},
            )  # fmt: skip
        return code, status_of(error, request_id)


class Gate(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Finds the handlers of calls; refuses calls without an accepted token before reading them."""

    def __init__(
        self,
        handlers: Iterable[Handlers],
        tokens: Tokens | None,
        metrics: PrometheusObserver | None,
    ) -> None:
        self._handlers = tuple(handlers)
        self._tokens = tokens
        self._metrics = metrics
        # Whatever kind of method was called: this ends the call before it reads.
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    def service(self, handler_call_details: Any) -> Handler | None:
        tokens = self._tokens
        if tokens is not None and not tokens.accept(handler_call_details.invocation_metadata):
            return self._refusal
        for handler in self._handlers:
            if (found := handler.service(handler_call_details)) is not None:
                return found
        return None

    async def _refuse(self, _: Any, context: Context) -> None:
        if self._metrics is not None:
            self._metrics.unauthenticated.inc()
        await context.abort(
            Code.UNAUTHENTICATED,
            "expected metadata 'authorization: Bearer TOKEN' with a valid token",
        )


class Collected:
    """Takes the place of a server where generated code registers handlers, and keeps them."""

    def __init__(self) -> None:
        self.handlers: list[Handlers] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[Handlers]) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, *_: Any) -> None:
        """The same methods again, which newer generated code registers by name."""
