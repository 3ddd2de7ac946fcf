"""What TensorRT says while it works: its messages in the log, errors kept, progress, Ctrl-C."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

from gr_trt.tensorrt.library import Library

logger = logging.getLogger(__name__)

_KEPT = 20
_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+),", re.MULTILINE)
_QUIET = (
    # It looks for a GPU after every mistake, to say which one it was made on.
    "catchCudaError",
    # Inputs of int64 are what the models have.
    "has Int64 binding",
)


def make_log(library: Library) -> Any:
    """A logger for TensorRT (`ILogger`); ``errors`` are its last ones, ``facts`` what it counted.

    ``layers`` are those of the plan, kind and name, after everything was fused: what the engine
    inspector would say, which takes a GPU.

    Its messages of information are this log's of debugging: there are hundreds.
    """
    trt = library.module

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.facts: dict[str, int] = {}
            self.layers: tuple[str, ...] = ()

        def log(self, severity: Any, message: str) -> None:
            if any(words in message for words in _QUIET):
                logger.debug("%s: %s", library.name, message)
                return
            if severity <= trt.ILogger.ERROR:
                self.errors = [*self.errors[-_KEPT + 1 :], message]
                logger.debug("%s: error: %s", library.name, message)
            elif severity == trt.ILogger.WARNING:
                logger.info("%s: %s", library.name, message)
            else:
                logger.debug("%s: %s", library.name, message)
                self._count(message)

        def _count(self, message: str) -> None:
            if found := _LAYER.findall(message):
                self.layers = tuple(f"{kind} {name}" for name, kind in found)
            for fact, words in (
                ("activation_bytes", "Total Activation Memory: "),
                ("weight_bytes", "Total Weights Memory: "),
            ):
                if message.startswith(words):
                    amount = int(message.removeprefix(words).split()[0])
                    self.facts[fact] = max(amount, self.facts.get(fact, 0))

        def last_error(self) -> str:
            """In one line, for people; the last ones only repeat that it failed."""
            return " ".join(self.errors[0].split()) if self.errors else "it does not say why"

    return Log()


def make_monitor(library: Library, title: str) -> Any:
    """A monitor of a build (`IProgressMonitor`) that logs its phases and can be stopped."""
    trt = library.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._stop = threading.Event()
            self._began: dict[str, float] = {}
            self._steps: dict[str, int] = {}

        def stop(self) -> None:
            self._stop.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._began[phase_name] = time.monotonic()
            self._steps[phase_name] = num_steps
            logger.debug("%s: %s, %d steps", title, phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            logger.debug("%s: %s, %d of %d", title, phase_name, step + 1, self._steps[phase_name])
            return not self._stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            seconds = time.monotonic() - self._began[phase_name]
            level = logging.INFO if seconds > 1 else logging.DEBUG
            logger.log(level, "%s: %s took %.1f s", title, phase_name, seconds)

    return Monitor()
