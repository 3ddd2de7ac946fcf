"""A device that is played by memory of the host, whose copies are as late as they may be.

They are done when somebody waits for them, or, with a generator of numbers, at any moment before.
Until then nothing is where it should be, so whoever forgets to wait reads or destroys something.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gr_kernels.cache.paged import PagedCache
from gr_kernels.cuda.transfers import Addresses, Transfers

POISON = 0xA5


class Piece:
    """Implements `Buffer`."""

    def __init__(self, memory: PoisonedMemory, size: int) -> None:
        self._memory = memory
        self.size = size
        self._array: npt.NDArray[np.uint8] = np.full(size + memory.alignment, POISON, np.uint8)
        self.address = -(-self._array.ctypes.data // memory.alignment) * memory.alignment

    def free(self) -> None:
        self._memory.taken -= self.size
        self._memory.on_free(self)

    def gone(self) -> None:
        self._array.fill(POISON)
        self._memory.pieces.remove(self)


class PoisonedMemory:
    """Implements `Memory`, and knows what of it is taken."""

    granularity = 512

    def __init__(self, alignment: int, on_free: Callable[[Piece], None]) -> None:
        self.alignment = alignment
        self.on_free = on_free
        self.pieces: list[Piece] = []
        self.taken = self.most = 0
        self.limit: int | None = None
        """What the system has, in bytes."""

    def allocate(self, size: int) -> Piece | None:
        assert size % self.granularity == 0
        if self.limit is not None and self.taken + size > self.limit:
            return None
        self.taken += size
        self.most = max(self.most, self.taken)
        self.pieces.append(Piece(self, size))
        return self.pieces[-1]

    def has(self, address: int, size: int) -> bool:
        return any(
            piece.address <= address and address + size <= piece.address + piece.size
            for piece in self.pieces
        )


class LateStream:
    """Implements `CopyStream`. All its copies are in `pending` until they are done."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng
        self._lock = threading.RLock()
        self.device = PoisonedMemory(256, self._free_in_order)
        self.host = PoisonedMemory(64, self._free_now)
        self.pending: deque[tuple[int, int, int] | Piece] = deque()
        """(to, of, bytes), or what is freed."""
        self.asked = self.done = self.calls = 0

    def copy(self, to: Addresses, of: Addresses, size: int) -> None:
        pairs = list(zip(to.tolist(), of.tolist(), strict=True))
        if self._rng is not None:
            self._rng.shuffle(pairs)
        with self._lock:
            self.calls += 1
            for one, other in pairs:
                if not any(self._touches(entry, one, size) for entry in self.pending):
                    ctypes.memset(one, POISON, size)
                self._ask((one, other, size))
        self._go_on()

    def record(self) -> LateEvent:
        self._go_on()
        return LateEvent(self, self.asked)

    def synchronize(self) -> None:
        self.do(self.asked)

    def do(self, count: int) -> None:
        """Does what was asked for, up to some number of it."""
        with self._lock:
            while self.done < count:
                entry = self.pending.popleft()
                self.done += 1
                if isinstance(entry, Piece):
                    entry.gone()
                    continue
                to, of, size = entry
                assert any(memory.has(to, size) for memory in (self.device, self.host))
                assert any(memory.has(of, size) for memory in (self.device, self.host))
                ctypes.memmove(to, of, size)

    def _ask(self, entry: tuple[int, int, int] | Piece) -> None:
        with self._lock:
            self.pending.append(entry)
            self.asked += 1

    def _go_on(self) -> None:
        if self._rng is not None and self._rng.random() < 0.3:
            with self._lock:
                self.do(self._rng.randint(self.done, self.asked))

    def _free_in_order(self, piece: Piece) -> None:
        self._ask(piece)

    def _free_now(self, piece: Piece) -> None:
        with self._lock:
            assert not any(self._touches(e, piece.address, piece.size) for e in self.pending)
            piece.gone()

    @staticmethod
    def _touches(entry: tuple[int, int, int] | Piece, begin: int, size: int) -> bool:
        if isinstance(entry, Piece):
            return False
        *begins, length = entry
        return any(at < begin + size and begin < at + length for at in begins)


class LateEvent:
    """Implements `Event`: who waits for it makes it happen."""

    def __init__(self, stream: LateStream, number: int) -> None:
        self._stream = stream
        self._number = number

    def done(self) -> bool:
        self._stream._go_on()
        return self._stream.done >= self._number

    def wait(self) -> None:
        self._stream.do(self._number)


class LateCache(PagedCache):
    """A paged cache with devices ``late:0``, ``late:1``, …"""

    def __init__(
        self,
        device_bytes: int = 1 << 20,
        host_bytes: int = 0,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(1 << 20, device_bytes=device_bytes, host_bytes=host_bytes)
        self.streams: dict[str, LateStream] = {}
        self._rng = rng

    def _transfers(self, device: str) -> Transfers:
        assert device.startswith("late:")
        stream = self.streams[device] = LateStream(self._rng)
        return Transfers(stream)
