"""Observers: all are told, and none can harm."""

from __future__ import annotations

import logging

import pytest

from gr_core import Task
from gr_core.contracts import CacheStatistics
from gr_core.observers import (
    BatchEvent,
    CacheEvent,
    DropEvent,
    Event,
    LoadEvent,
    Observer,
    Observers,
    RequestEvent,
)

EVENTS: list[Event] = [
    RequestEvent("r", "m", "ok", 0.1),
    BatchEvent("m", "1", "e", Task.RANK, 1, 2, 2, 0.1, 0),
    DropEvent("m", "e", "full"),
    LoadEvent("m", "1", "ready"),
    CacheEvent("results", CacheStatistics()),
]


class Everything(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Event]] = []

    def on_request(self, event: RequestEvent) -> None:
        self.seen.append(("request", event))

    def on_batch(self, event: BatchEvent) -> None:
        self.seen.append(("batch", event))

    def on_drop(self, event: DropEvent) -> None:
        self.seen.append(("drop", event))

    def on_load(self, event: LoadEvent) -> None:
        self.seen.append(("load", event))

    def on_cache(self, event: CacheEvent) -> None:
        self.seen.append(("cache", event))


class Broken(Observer):
    def on_request(self, event: RequestEvent) -> None:
        raise RuntimeError("the disk of the log is full")

    on_batch = on_drop = on_load = on_cache = on_request  # type: ignore[assignment]


def test_each_event_reaches_its_method() -> None:
    observer = Everything()
    observers = Observers([observer])
    for event in EVENTS:
        observers.notify(event)
    assert [event for _, event in observer.seen] == EVENTS
    assert [name for name, _ in observer.seen] == ["request", "batch", "drop", "load", "cache"]


def test_a_broken_observer_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    before, after = Everything(), Everything()
    observers = Observers([before, Broken(), after])
    with caplog.at_level(logging.ERROR):
        for event in EVENTS:
            observers.notify(event)
    assert len(before.seen) == len(after.seen) == len(EVENTS)
    assert [r.getMessage() for r in caplog.records] == [
        f"observer Broken failed in on_{name}"
        for name in ("request", "batch", "drop", "load", "cache")
    ]
    assert all(r.exc_info for r in caplog.records), "with its traceback"


def test_an_observer_that_wants_nothing_is_told_without_harm() -> None:
    for event in EVENTS:
        Observers([Observer()]).notify(event)


def test_observers_are_a_sequence() -> None:
    one, two = Observer(), Observer()
    observers = Observers([one, two])
    assert list(observers) == [one, two]
    assert len(observers) == 2
    assert observers[1] is two
