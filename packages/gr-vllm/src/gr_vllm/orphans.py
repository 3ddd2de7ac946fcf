"""No process of vLLM outlives the one that started it, however that ended.

vLLM ends its processes when it is closed, and its workers end when its core does; but nobody ends
the core of a front end that was killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading

FRONT = "GR_VLLM_FRONT"
"""Environment variable of vLLM's processes: the id of the process whose engine they are."""


def follow_front() -> None:
    """In a process that the front end started: ends with it. Elsewhere it does nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(FRONT) != str(parent.pid):
        return
    threading.Thread(
        target=_follow, args=(parent.sentinel,), name="gr-vllm-follow", daemon=True
    ).start()


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    # There is nobody left to tell, and nothing that has to be put in order.
    os._exit(1)
