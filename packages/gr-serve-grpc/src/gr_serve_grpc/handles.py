"""What a client remembers of the histories that its server knows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from gr_core.errors import GrError, InvalidRequest, UnknownHistory
from gr_core.histories import content_digest
from gr_core.types import History, RecommendRequest

CAPACITY = 10_000


@dataclass(frozen=True, slots=True)
class _Known:
    """A history that the server knows: how long it is, and what it says."""

    handle: bytes
    length: int
    digest: bytes


class HistoryHandles:
    """Makes requests shorter: only what is new is sent to a server that knows the rest.

    Given to a client, it changes nothing for the caller, who gives whole histories as ever and gets
    the same answers. For each user and model it remembers the handle of the last answer and a
    digest of the history that was sent for it. A history that begins with exactly that is sent as
    the handle and the behaviours after it; one that was edited, or whose oldest behaviours were cut
    off, is sent whole. Where the server has forgotten the history, whatever the reason, the client
    sends the request once more, whole.

    Thread-safe. Make one for each server: another server does not know its handles. Behind a
    balancer that sends each request to another server it costs more than it saves.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        """``capacity`` is in histories, of about 600 bytes each; the longest unused goes first."""
        if capacity < 1:
            raise ValueError(f"capacity: {capacity}, expected at least 1")
        self._capacity = capacity
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def shortened(self, request: RecommendRequest) -> RecommendRequest:
        """The request with a handle and the rest of its history; itself if it must go whole."""
        if not request.user_id or request.history_handle:
            return request
        key = _key(request)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        history = request.history
        if known is None or known.length > len(history):
            return request
        if content_digest(_rows(history, slice(known.length))) != known.digest:
            return request
        new = _rows(history, slice(known.length, None))
        return replace(request, history=new, history_handle=known.handle)

    def learn(self, request: RecommendRequest, handle: bytes) -> None:
        """Remembers the handle in the answer to a request with its whole history."""
        if not request.user_id or request.history_handle:
            return
        key = _key(request)
        digest = content_digest(request.history)
        with self._lock:
            self._known.pop(key, None)
            if handle:
                self._known[key] = _Known(handle, len(request.history), digest)
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)


def calls_for_the_whole(error: GrError) -> bool:
    """Whether a request that was sent with a handle is to be sent again with its whole history.

    A violation in its history too: it names rows as they were sent, which the caller would not
    recognise.
    """
    if isinstance(error, InvalidRequest):
        return any(violation.field.startswith("history") for violation in error.violations)
    return isinstance(error, UnknownHistory)


def _key(request: RecommendRequest) -> tuple[str, str, str]:
    return request.user_id, request.model, request.version


def _rows(history: History, rows: slice) -> History:
    return History(
        history.item_ids[rows],
        history.timestamps_ms[rows],
        {name: column[rows] for name, column in history.signals.items()},
    )
