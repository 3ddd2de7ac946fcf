"""Which execution context computes a part, and whether its launches are recorded or replayed.

A recorded CUDA graph is true only while its context keeps its shapes. So every context remembers
one shape: the second run of a shape records it, later ones replay it, another shape forgets it.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum


class Step(Enum):
    """What a context does with its next shape."""

    RUN = "run"
    """Set the shapes, launch kernel by kernel."""
    RECORD = "record"
    """Record the launches of the shapes that are set, then replay them."""
    REPLAY = "replay"


class Slots:
    """The contexts of one profile. One thread at a time."""

    def __init__(self, count: int, record: bool) -> None:
        self._keys: list[Hashable] = [None] * count
        self._runs = [0] * count
        self._busy = [False] * count
        self._used = list(range(count))
        """Slots, the one that was taken longest ago first."""
        self._record = record

    def take(self, key: Hashable) -> tuple[int, Step] | None:
        """A free slot, one that knows the shape ``key`` if there is one; None if all are busy."""
        free = [slot for slot in self._used if not self._busy[slot]]
        if not free:
            return None
        slot = next((slot for slot in free if self._keys[slot] == key), free[0])
        self._used.remove(slot)
        self._used.append(slot)
        self._busy[slot] = True
        if self._keys[slot] != key:
            self._keys[slot], self._runs[slot] = key, 0
        self._runs[slot] += 1
        if not self._record or self._runs[slot] == 1:
            return slot, Step.RUN
        return slot, Step.RECORD if self._runs[slot] == 2 else Step.REPLAY

    def release(self, slot: int) -> None:
        self._busy[slot] = False

    def forget(self, slot: int) -> None:
        """After a failure: what the slot holds is not to be relied upon."""
        self._keys[slot], self._runs[slot] = None, 0
