"""What vLLM's processes owe the one that started them: to end with it, and to say why they cannot.

vLLM ends its processes when it is closed, and its workers end when its core does; but nobody ends
the core of a front end that was killed. And where a core does not start, its front end is told
that it does not, and not why.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_FRONT = "GR_VLLM_FRONT"
"""Environment variable of vLLM's processes: the id of the process whose engine they are."""
_CAUSE = "GR_VLLM_CAUSE"
"""Another one: a file that the first exception goes to, as long as its folder is there."""
_LONGEST = 2000


# ── In the front end ──────────────────────────────────────────────────────────────────────────


def variables(cause: Path) -> Mapping[str, str]:
    """For processes that are about to start."""
    return {_FRONT: str(os.getpid()), _CAUSE: str(cause)}


def read(cause: Path) -> str:
    """What the first process that failed had to say; empty if none did."""
    try:
        return cause.read_text("utf-8")[:_LONGEST]
    except OSError:
        return ""


# ── In the processes ──────────────────────────────────────────────────────────────────────────


def attend() -> None:
    """In a process that a front end started, or one of its processes; elsewhere it does nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or _FRONT not in os.environ:
        return
    if os.environ[_FRONT] == str(parent.pid):
        # Signals to the server's group, as shells send them, are for the server, which drains.
        os.setpgid(0, 0)
        threading.Thread(
            target=_follow, args=(parent.sentinel,), name="gr-vllm-follow", daemon=True
        ).start()
    logging.getLogger("vllm").addHandler(_Tell(Path(os.environ[_CAUSE])))


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    # There is nobody left to tell, and nothing that has to be put in order.
    os._exit(1)


class _Tell(logging.Handler):
    """Writes the first exception that is logged; those of other processes follow from it."""

    def __init__(self, cause: Path) -> None:
        super().__init__(logging.ERROR)
        self._cause = cause

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            # Another process may have been first, or the front end no longer wants to know.
            with suppress(OSError), self._cause.open("x", encoding="utf-8") as file:
                file.write(str(error).strip() or type(error).__name__)
