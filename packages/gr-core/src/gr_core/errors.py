"""Errors that cross a boundary of the platform.

A `UserError` is somebody's mistake: its text is shown as it is, without a traceback. Everything
else that is raised is a fault of ours: it keeps its traceback in the log and never leaks into an
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with one field of a request, a file or an option."""

    field: str
    """Dotted path of the field, e.g. ``history.timestamps_ms[3]``."""
    message: str
    """The value that was found, what was expected, and what to do."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class GrError(Exception):
    """Base of all errors that the platform raises on purpose."""


class UserError(GrError):
    """A mistake of the caller, to be shown as one message without a traceback."""


class InvalidRequest(UserError):
    """A request with at least one violation; all of them are collected, not only the first."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        assert violations
        self.violations = tuple(violations)
        super().__init__("; ".join(map(str, self.violations)))


class ConfigurationError(UserError):
    """A configuration file, environment variable or flag that cannot be used."""


class PluginError(UserError):
    """A plugin that cannot be used, or two that clash."""


class PlanError(UserError):
    """No pipeline can be composed as asked; the message lists the alternatives."""


class BundleError(UserError):
    """A model on disk that is incomplete, damaged or of an unknown kind."""


class NotFound(UserError):
    """A model, version or file that is not there; the message lists what is."""


class FailedPrecondition(UserError):
    """The request is well formed, but the state of the server does not allow it."""


class UnknownHistory(FailedPrecondition):
    """The server has no such history (any more); the remedy is to send it whole.

    It says the same of a handle that was evicted, made up, or given to another user or for other
    models or versions, so that nothing can be learnt from trying handles.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "history_handle: not known here for this user and these models; "
            "send the whole history without it"
        )


class Overloaded(GrError):
    """A bounded queue is full. `retry_after_s` is an estimate of when to come back, in seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(GrError):
    """The deadline of a request passed before its answer was computed."""


class Unavailable(GrError):
    """The engine or server is stopping, restarting or dead; the request may be tried again."""
