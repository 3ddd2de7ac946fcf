"""Errors of the platform as gRPC statuses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from gr_core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GrError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    UnknownHistory,
    Violation,
)

Code = grpc.StatusCode
DETAILS_KEY = "grpc-status-details-bin"

CODES: Mapping[type[Exception], grpc.StatusCode] = {
    InvalidRequest: Code.INVALID_ARGUMENT,
    NotFound: Code.NOT_FOUND,
    FailedPrecondition: Code.FAILED_PRECONDITION,
    UnknownHistory: Code.FAILED_PRECONDITION,
    Overloaded: Code.RESOURCE_EXHAUSTED,
    DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    Unavailable: Code.UNAVAILABLE,
}
"""Every other exception is INTERNAL, and its text stays in the log."""

DOMAIN = "gr.v1"
HISTORY_HANDLE_UNKNOWN = "HISTORY_HANDLE_UNKNOWN"
"""Domain and reason of the ErrorInfo that tells `UnknownHistory` from its kin."""

MAX_MESSAGE = 512
MAX_DETAILS = 2560
"""Characters of a status's message and bytes of its violations. The message is sent twice, the
details in base64, and all of it must fit into HTTP/2 headers of 8 KiB."""


class CallError(GrError):
    """A call failed with a code that has no class of its own."""

    def __init__(self, code: grpc.StatusCode, message: str, request_id: str = "") -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.request_id = request_id


def code_of(error: Exception) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return Code.INTERNAL


def status_of(error: Exception, request_id: str) -> Status:
    """What the caller is told of an error, with the details of the google.rpc error model."""
    code = code_of(error)
    if code is Code.INTERNAL:
        message = f"internal error, see the server's log for request {request_id}"
    else:
        message = str(error)
    status = Status(code=code.value[0], message=_shortened(message))
    if isinstance(error, InvalidRequest):
        _attach(status, _bad_request(error))
    elif isinstance(error, Overloaded):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        _attach(status, details_pb.RetryInfo(retry_delay=delay))
    elif isinstance(error, UnknownHistory):
        _attach(status, details_pb.ErrorInfo(reason=HISTORY_HANDLE_UNKNOWN, domain=DOMAIN))
    _attach(status, details_pb.RequestInfo(request_id=request_id))
    return status


def _bad_request(error: InvalidRequest) -> details_pb.BadRequest:
    bad = details_pb.BadRequest()
    for i, violation in enumerate(error.violations):
        bad.field_violations.add(
            field=_shortened(violation.field), description=_shortened(violation.message)
        )
        if bad.ByteSize() > MAX_DETAILS:
            del bad.field_violations[-1]
            more = len(error.violations) - i
            bad.field_violations.add(field="request", description=f"and {more} more violations")
            break
    return bad


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def _attach(status: Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def error_of(status: Status) -> GrError:
    """The error that a status tells of."""
    code = next(c for c in Code if c.value[0] == status.code)
    bad, retry, info = details_pb.BadRequest(), details_pb.RetryInfo(), details_pb.RequestInfo()
    reason = details_pb.ErrorInfo()
    for detail in status.details:
        for kind in (bad, retry, info, reason):
            detail.Unpack(kind)
    if code is Code.INVALID_ARGUMENT:
        violations = [Violation(v.field, v.description) for v in bad.field_violations]
        return InvalidRequest(violations or [Violation("request", status.message)])
    if code is Code.NOT_FOUND:
        return NotFound(status.message)
    if code is Code.FAILED_PRECONDITION:
        if (reason.domain, reason.reason) == (DOMAIN, HISTORY_HANDLE_UNKNOWN):
            return UnknownHistory(status.message)
        return FailedPrecondition(status.message)
    if code is Code.RESOURCE_EXHAUSTED and retry.HasField("retry_delay"):
        return Overloaded(status.message, retry.retry_delay.ToNanoseconds() / 1e9)
    if code is Code.DEADLINE_EXCEEDED:
        return DeadlineExceeded(status.message)
    # A call that is cancelled though its caller did not cancel it was waiting at a server that
    # shut down, before any method saw it.
    if code in (Code.UNAVAILABLE, Code.CANCELLED):
        return Unavailable(status.message)
    return CallError(code, status.message, info.request_id)


def error_of_call(call: grpc.RpcError) -> GrError:
    """The error that a failed call tells of; without details where it has none."""
    code = call.code()
    status = None
    metadata: Any = call.trailing_metadata() or ()
    for key, value in metadata:
        if key == DETAILS_KEY:
            status = Status.FromString(value)
    if status is None or status.code != code.value[0]:
        status = Status(code=code.value[0], message=call.details() or "")
    return error_of(status)
