"""Copies between a device's memory and the host's, beside what the device computes.

Copies are done one after another on a stream of their own, in the order in which they are asked
for. They are asked for while blocks are leased, and issued when the first of these leases waits for
them: so what a whole batch needs is copied layer by layer, and its first layer is computed while
the others are on their way.

Nothing here waits on the host, but for memory of the host that is given back. What is computed
waits, on the device: whoever was given blocks while copies were not known to be complete has
`Arrivals` to wait for, whether these are copies of its own, of a lease that ended without waiting,
or of blocks that had to be saved before theirs could be overwritten.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gr_kernels.cache.memory import Buffer, Memory, Pages

logger = logging.getLogger(__name__)

Addresses = npt.NDArray[np.uintp]


class Event(Protocol):
    """A point in a stream of copies."""

    def done(self) -> bool:
        """Whether all copies before it are complete; asks, and does not wait."""
        ...

    def wait(self) -> None:
        """Lets what is launched next on the current stream wait for it."""
        ...


class CopyStream(Protocol):
    """Copies of one device that are done in order, beside all else."""

    @property
    def device(self) -> Memory:
        """The device's memory. A piece that is freed is taken again behind the copies before."""
        ...

    @property
    def host(self) -> Memory:
        """Memory of the host that the device can reach."""
        ...

    def copy(self, to: Addresses, of: Addresses, size: int) -> None:
        """Copies pieces of ``size`` bytes, in any order among themselves."""
        ...

    def record(self) -> Event: ...

    def synchronize(self) -> None: ...


class DeviceArrivals:
    """Implements `gr_core.contracts.Arrivals`: one for all that is issued together."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self.events: tuple[Event, ...] = ()
        """One for each layer, or one for all; none before they are issued."""

    def start(self) -> None:
        self._transfers.issue(self)

    def wait(self, layer: int) -> None:
        if not self.events:
            self.start()
        self.events[min(layer, len(self.events) - 1)].wait()


class Transfers:
    """Implements `gr_kernels.cache.memory.Copies`, for blocks of a device. Thread-safe.

    What is copied together is copied in this order: first what is saved, then what is loaded, so
    that a block can be saved and overwritten in one go. What does not allow it is issued before.
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._saves: dict[int, list[tuple[int, int]]] = {}
        """(to, of) by size."""
        self._loads: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """(to, of) by size and layers."""
        self._saved: set[int] = set()
        self._read: set[int] = set()
        self._written: set[int] = set()
        """Slots that saves write, what loads read, and blocks that they write; all not issued."""
        self._next: DeviceArrivals | None = None
        """Of what is not issued, where somebody has it."""
        self._last: DeviceArrivals | None = None
        """Of what was issued last, until it is known to be complete."""
        self.device: Memory = _Settled(stream.device, self.issue)
        self.host: Memory = _Settled(stream.host, self.synchronize)

    def save(self, to: int, of: int, size: int) -> None:
        """Copies a block, of which nothing is being computed, to the host."""
        with self._lock:
            if to in self._read or to in self._saved or of in self._written:
                self._issue()
            self._saved.add(to)
            self._saves.setdefault(size, []).append((to, of))

    def copy(self, to: int, of: int, size: int, layers: int) -> None:
        """Copies a block from the host or the device to the device, layer by layer."""
        assert size % layers == 0
        with self._lock:
            if to in self._read or to in self._written or of in self._written:
                self._issue()
            self._read.add(of)
            self._written.add(to)
            self._loads.setdefault((size, layers), []).append((to, of))

    def arrivals(self) -> DeviceArrivals | None:
        """What a lease that is made now has to wait for; None if there is nothing."""
        with self._lock:
            if self._saves or self._loads:
                if self._next is None:
                    self._next = DeviceArrivals(self)
                return self._next
            if self._last is not None and self._last.events[-1].done():
                self._last = None
            return self._last

    def issue(self, arrivals: DeviceArrivals | None = None) -> None:
        """Starts what was asked for, unless it is ``arrivals`` that are issued already."""
        with self._lock:
            if arrivals is None or not arrivals.events:
                assert arrivals in (None, self._next)
                self._issue()

    def synchronize(self) -> None:
        """Waits for all copies, on the host."""
        self.issue()
        self._stream.synchronize()

    def _issue(self) -> None:
        if not self._saves and not self._loads:
            return
        issued = self._next or DeviceArrivals(self)
        for size, pairs in self._saves.items():
            self._stream.copy(*_columns(pairs), size)
        events = []
        if len(self._loads) == 1:
            [((size, layers), pairs)] = self._loads.items()
            to, of = _columns(pairs)
            part = size // layers
            for layer in range(layers):
                offset = np.uintp(layer * part)
                self._stream.copy(to + offset, of + offset, part)
                events.append(self._stream.record())
        else:  # there are none, or of several models at once
            for (size, _), pairs in self._loads.items():
                self._stream.copy(*_columns(pairs), size)
            events.append(self._stream.record())
        issued.events = tuple(events)
        self._last, self._next = issued, None
        for kept in (self._saves, self._loads, self._saved, self._read, self._written):
            kept.clear()


def _columns(pairs: list[tuple[int, int]]) -> tuple[Addresses, Addresses]:
    to, of = np.array(pairs, np.uintp).T.copy()
    return to, of


class _Settled:
    """A memory whose pieces are freed only after something was done."""

    def __init__(self, memory: Memory, first: Callable[[], None]) -> None:
        self._memory = memory
        self._first = first
        self.alignment = memory.alignment
        self.granularity = memory.granularity

    def allocate(self, size: int) -> Buffer | None:
        buffer = self._memory.allocate(size)
        return None if buffer is None else _SettledBuffer(buffer, self._first)


class _SettledBuffer:
    __slots__ = ("_buffer", "_first", "address")

    def __init__(self, buffer: Buffer, first: Callable[[], None]) -> None:
        self._buffer = buffer
        self._first = first
        self.address = buffer.address

    def free(self) -> None:
        self._first()
        self._buffer.free()


# ── CUDA ──────────────────────────────────────────────────────────────────────────────────────


class CudaMemory:
    """Implements `Memory`: pieces of a device's memory, for use on one stream first of all."""

    alignment = 256
    granularity = 1 << 21
    """To which torch's allocator rounds large pieces."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream
        """None: that which is current when a piece is taken."""

    def allocate(self, size: int) -> Buffer | None:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                return _TensorBuffer(torch.empty(size, dtype=torch.uint8, device=self._device))
        except torch.OutOfMemoryError:
            return None


class _TensorBuffer:
    __slots__ = ("_tensor", "address")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self.address = tensor.data_ptr()
        assert self.address % CudaMemory.alignment == 0

    def free(self) -> None:
        self._tensor = None


class PinnedMemory:
    """Implements `Memory`: the host's, locked into place, so that a device copies it by itself.

    Its pages are registered, as torch's own pinned memory comes in powers of two.
    """

    alignment = 64
    granularity = Pages.granularity

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, size: int) -> Buffer | None:
        try:
            pages = Pages(size)
        except OSError:
            return None
        with torch.cuda.device(self._device):
            if _cuda_runtime().register(pages.address, size):
                return _PinnedBuffer(pages, self._device)
        pages.free()
        return None


class _PinnedBuffer:
    __slots__ = ("_device", "_pages", "address")

    def __init__(self, pages: Pages, device: torch.device) -> None:
        self._pages = pages
        self._device = device
        self.address = pages.address

    def free(self) -> None:
        with torch.cuda.device(self._device):
            _cuda_runtime().unregister(self.address)
        self._pages.free()


class CudaCopies:
    """Implements `CopyStream` on a stream of torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Taken on this stream, so that what was computed before in the same place is no concern.
        self.device: Memory = CudaMemory(device, self._stream)
        self.host: Memory = PinnedMemory(device)

    def copy(self, to: Addresses, of: Addresses, size: int) -> None:
        with torch.cuda.device(self._device):
            _cuda_runtime().copy(to, of, size, self._stream.cuda_stream)

    def record(self) -> Event:
        return _CudaEvent(self._device, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


def _event(*, timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


class _CudaEvent:
    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._event = _event()
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class _MemcpyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes, with its two cudaMemLocation; their zeros are no hints."""

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_type", ctypes.c_int),
        ("src_id", ctypes.c_int),
        ("dst_type", ctypes.c_int),
        ("dst_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    )


_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_BESIDE_COMPUTING = 1  # cudaMemcpyFlagPreferOverlapWithCompute
_ANY_DIRECTION = 4  # cudaMemcpyDefault
_PORTABLE = 1  # cudaHostRegisterPortable


class _CudaRuntime:
    """The functions of the CUDA runtime that torch has no name for. For CUDA 12 and later."""

    def __init__(self) -> None:
        version = torch.version.cuda
        assert version is not None
        major = int(version.split(".")[0])
        # torch has loaded it, from wherever it is.
        library = ctypes.CDLL(f"libcudart.so.{major}")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._error = library.cudaGetErrorString
        self._error.argtypes, self._error.restype = [ctypes.c_int], ctypes.c_char_p
        self._forget = library.cudaGetLastError
        self._register = library.cudaHostRegister
        self._register.argtypes = [pointer, size, ctypes.c_uint]
        self._unregister = library.cudaHostUnregister
        self._unregister.argtypes = [pointer]
        self._copy = library.cudaMemcpyAsync
        self._copy.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
        # CUDA 12 has it from 12.8 on, with another parameter.
        self._copy_batch = library.cudaMemcpyBatchAsync if major >= 13 else None
        if self._copy_batch is not None:
            self._copy_batch.argtypes = [*[pointer] * 3, size, *[pointer] * 2, size, pointer]

    def register(self, address: int, size: int) -> bool:
        """Whether pages could be locked into place."""
        if self._register(address, size, _PORTABLE):
            self._forget()
            return False
        return True

    def unregister(self, address: int) -> None:
        self._check(self._unregister(address))

    def copy(self, to: Addresses, of: Addresses, size: int, stream: int) -> None:
        if self._copy_batch is not None and len(to) > 1:
            sizes = np.full(len(to), size, np.uintp)
            attributes = _MemcpyAttributes(_IN_STREAM_ORDER, flags=_BESIDE_COMPUTING)
            first = ctypes.c_size_t(0)
            status = self._copy_batch(
                to.ctypes.data,
                of.ctypes.data,
                sizes.ctypes.data,
                len(to),
                ctypes.addressof(attributes),
                ctypes.addressof(first),
                1,
                stream,
            )
            if not status:
                return
            # A driver that cannot; what it has copied is copied once more.
            self._forget()
            self._copy_batch = None
            logger.info(
                "blocks are copied one by one, not in batches: %s", self._error(status).decode()
            )
        for one, other in zip(to.tolist(), of.tolist(), strict=True):
            self._check(self._copy(one, other, size, _ANY_DIRECTION, stream))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA error {status}: {self._error(status).decode()}")


@cache
def _cuda_runtime() -> _CudaRuntime:
    return _CudaRuntime()


def cuda_device(name: str) -> torch.device:
    """Raises ValueError for what is no CUDA device of this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise ValueError(f"device: {name!r}, expected cpu, cuda or cuda:N")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device: {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices; use cpu, or a torch for CUDA on a machine with a GPU"
        )
    return torch.device("cuda", index)


def cuda_transfers(name: str) -> Transfers:
    """Copies of a CUDA device. Raises ValueError for what is none."""
    return Transfers(CudaCopies(cuda_device(name)))


def measure_copies(
    name: str, *, block_bytes: int = 1 << 20, blocks: int = 64, layers: int = 8, repeats: int = 5
) -> float:
    """Bytes per second that come from the host's pinned memory to a CUDA device, in blocks.

    The median of some tries, each timed by events; it takes tens of milliseconds and waits for the
    copies, so it belongs to an engine's warm-up.
    """
    device = cuda_device(name)
    copies = CudaCopies(device)
    size = block_bytes * blocks
    there, here = copies.device.allocate(size), copies.host.allocate(size)
    if there is None or here is None:
        raise MemoryError(f"device {name}: no room for {size} bytes to measure copies with")
    try:
        offsets = np.arange(blocks, dtype=np.uintp) * np.uintp(block_bytes)
        part = block_bytes // layers
        found = []
        for _ in range(repeats + 1):
            begin, end = _event(timing=True), _event(timing=True)
            begin.record(copies._stream)
            for layer in range(layers):
                start = offsets + np.uintp(layer * part)
                copies.copy(start + np.uintp(there.address), start + np.uintp(here.address), part)
            end.record(copies._stream)
            copies.synchronize()
            found.append(begin.elapsed_time(end))
    finally:
        copies.synchronize()
        there.free()
        here.free()
    # The first try meets pages that were never touched.
    return part * layers * blocks / float(np.median(found[1:])) * 1e3
