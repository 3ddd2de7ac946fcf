"""Events that observers are told of: requests, stages, batches, loads.

Observers must be quick and thread-safe: batches are reported from engine threads. One that raises
is logged and otherwise ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from gr_core.contracts import CacheStatistics
from gr_core.types import StageReport, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request was answered or failed."""

    request_id: str
    model: str
    outcome: str
    """``ok`` or the name of the error's class."""
    total_s: float
    features_s: float = 0.0
    history_length: int = 0
    candidates: int = 0
    stages: Sequence[StageReport] = ()


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """An engine computed a batch."""

    model: str
    version: str
    engine: str
    task: Task
    size: int
    tokens: int
    padded_tokens: int
    """Batch size times the longest request, which a padding engine computes."""
    compute_s: float
    queue_depth: int
    """Requests left waiting."""


@dataclass(frozen=True, slots=True)
class DropEvent:
    """A queued request was dropped before it was computed."""

    model: str
    engine: str
    reason: str
    """``deadline``, ``cancelled`` or ``full``."""


@dataclass(frozen=True, slots=True)
class LoadEvent:
    """A version of a model was loaded, activated, refused or unloaded."""

    model: str
    version: str
    state: str
    """``ready``, ``refused`` or ``unloaded``."""
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Statistics of a cache, as of now."""

    cache: str
    statistics: CacheStatistics


Event = RequestEvent | BatchEvent | DropEvent | LoadEvent | CacheEvent


class Observer:
    """Base class: does nothing. An observer overrides what it wants to know."""

    def on_request(self, event: RequestEvent) -> None: ...

    def on_batch(self, event: BatchEvent) -> None: ...

    def on_drop(self, event: DropEvent) -> None: ...

    def on_load(self, event: LoadEvent) -> None: ...

    def on_cache(self, event: CacheEvent) -> None: ...


_METHODS = {
    RequestEvent: "on_request",
    BatchEvent: "on_batch",
    DropEvent: "on_drop",
    LoadEvent: "on_load",
    CacheEvent: "on_cache",
}


class Observers(Sequence[Observer]):
    """A fixed set of observers, told of events together; a failing one never fails a request."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def __len__(self) -> int:
        return len(self._observers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._observers[index]

    def notify(self, event: Event) -> None:
        method = _METHODS[type(event)]
        for observer in self._observers:
            try:
                getattr(observer, method)(event)
            except Exception:
                logger.exception("observer %s failed in %s", type(observer).__name__, method)
