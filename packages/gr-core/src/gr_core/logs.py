"""Logging: lines of text or of JSON on standard error, and an observer that logs events."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gr_core.errors import ConfigurationError
from gr_core.observers import DropEvent, LoadEvent, Observer, RequestEvent

logger = logging.getLogger("gr_core.events")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def setup(level: str = "info", format: str = "text") -> None:
    """Sends the logs of this process to standard error as ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class LogObserver(Observer):
    """Logs every request, drop and load with its figures. Its setting ``level`` is for requests."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        level = str(settings.get("level", "info")).upper()
        if unknown := settings.keys() - {"level"}:
            raise ConfigurationError(
                f"observers.log: unknown setting {sorted(unknown)[0]!r}; expected level"
            )
        if level not in logging.getLevelNamesMapping():
            raise ConfigurationError(
                f"observers.log.level: {level!r}, expected a level such as 'info'"
            )
        self._level = logging.getLevelNamesMapping()[level]

    def on_request(self, event: RequestEvent) -> None:
        # Ids of requests are logged; what users did is not.
        logger.log(
            self._level,
            "request %s %s in %.1f ms",
            event.request_id,
            event.outcome,
            event.total_s * 1e3,
            extra={
                "request_id": event.request_id,
                "model": event.model,
                "outcome": event.outcome,
                "total_ms": round(event.total_s * 1e3, 3),
                "features_ms": round(event.features_s * 1e3, 3),
                "history_length": event.history_length,
                "candidates": event.candidates,
                "stages": {
                    stage.task.value: {
                        "engine": stage.engine,
                        "version": stage.version,
                        "queue_ms": round(stage.queue_s * 1e3, 3),
                        "compute_ms": round(stage.compute_s * 1e3, 3),
                        "batch_size": stage.batch_size,
                    }
                    for stage in event.stages
                },
            },
        )

    def on_drop(self, event: DropEvent) -> None:
        logger.warning("%s (%s) dropped a request: %s", event.model, event.engine, event.reason)

    def on_load(self, event: LoadEvent) -> None:
        log = logger.error if event.state == "refused" else logger.info
        log("%s/%s is %s. %s", event.model, event.version, event.state, event.reason)
