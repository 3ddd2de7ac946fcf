"""How kernels for a GPU are launched there: a table per device, measured once and kept in a file.

A table says for a kernel, dtype and size how it is launched fastest, and how long that took. Files
come from two places: the package's folder ``tables`` and the user's folder, whose entries win;
`gr kernels tune` writes the latter. Without an entry a kernel has a default. Nothing is ever
measured inside a request.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gr_core.artifacts import cache_folder
from gr_core.errors import GrError

logger = logging.getLogger(__name__)

VERSION = 1


Key = tuple[str, str, tuple[tuple[str, int], ...]]


def key_of(kernel: str, dtype: str, sizes: Mapping[str, int]) -> Key:
    return kernel, dtype, tuple(sorted(sizes.items()))


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement: the best of what was tried."""

    kernel: str
    dtype: str
    sizes: Mapping[str, int]
    """What the launch depends on, e.g. columns per head; numbers of tokens are powers of two."""
    config: Mapping[str, int]
    """Arguments of the launch: tiles, ``num_warps``, ``num_stages``, perhaps ``maxnreg``, the
    registers of a thread."""
    microseconds: float

    @property
    def key(self) -> Key:
        return key_of(self.kernel, self.dtype, self.sizes)


def user_folder() -> Path:
    """Where what was measured or built for this machine is kept; only its user may write there."""
    return cache_folder() / "kernels"


def power_of_two(number: int, *, least: int = 1, most: int = 2**20) -> int:
    """The next power of two, kept within bounds: how numbers of tokens are told apart."""
    return min(max(1 << max(0, number - 1).bit_length(), least), most)


def configuration(
    kernel: str,
    dtype: str,
    sizes: Mapping[str, int],
    default: Mapping[str, int],
    device: str | None = None,
) -> Mapping[str, int]:
    """How to launch a kernel: as measured for these sizes on this device, else the default.

    ``device`` is a name as `device_name` gives it; None: that of the current CUDA device.
    """
    if kernel in _tried:
        return _tried[kernel]
    found = table(device or device_name()).get(key_of(kernel, dtype, sizes))
    return default if found is None else found.config


@contextlib.contextmanager
def trying(kernel: str, config: Mapping[str, int]) -> Iterator[None]:
    """Launches a kernel in a certain way, to measure it; in the whole process."""
    _tried[kernel] = config
    try:
        yield
    finally:
        del _tried[kernel]


_tried: dict[str, Mapping[str, int]] = {}


def measured(
    kernel: str, dtype: str, sizes: Mapping[str, int], device: str | None = None
) -> float | None:
    """Microseconds of a kernel at these sizes; None where it was not measured on this device."""
    found = table(device or device_name()).get(key_of(kernel, dtype, sizes))
    return None if found is None else found.microseconds


@functools.cache
def device_name() -> str:
    """Of the current CUDA device, as files are called; ``none`` without one."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    return file_name(torch.cuda.get_device_name())


def file_name(title: str) -> str:
    """A device's title as the name of its file: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


@functools.cache
def table(device: str) -> Mapping[Key, Entry]:
    """All entries of a device by kernel, dtype and sizes. A file that is damaged is passed over."""
    found = {}
    shipped = resources.files("gr_kernels") / "tables" / f"{device}.json"
    own = user_folder() / f"{device}.json"
    for name, text in ((str(shipped), _text(shipped)), (str(own), _text(own))):
        if text is None:
            continue
        try:
            entries = parse(text)
        except GrError as error:
            logger.warning("%s: passed over: %s", name, error)
            continue
        for entry in entries:
            found[entry.key] = entry
    return found


def parse(text: str) -> list[Entry]:
    """Entries of a file. Raises `GrError` for what is none."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise GrError(f"no JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        raise GrError(f"expected a table of version {VERSION}")
    return [_entry(one) for one in raw.get("entries", ())]


def _entry(raw: Any) -> Entry:
    try:
        entry = Entry(**raw)
        numbers = {**entry.sizes, **entry.config}
        assert all(isinstance(n, int) and 0 < n < 2**40 for n in numbers.values())
        assert isinstance(entry.microseconds, int | float)
    except (TypeError, AttributeError, AssertionError):
        raise GrError(f"an entry is {raw!r}; expected {', '.join(Entry.__slots__)}") from None
    return entry


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Replaces a file of entries, at once and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(dump(entries), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def dump(entries: Sequence[Entry]) -> str:
    """The inverse of `parse`."""
    return json.dumps({"version": VERSION, "entries": [asdict(e) for e in entries]}, indent=1)


def forget() -> None:
    """Reads the files anew from now on."""
    table.cache_clear()


def _text(path: Any) -> str | None:
    try:
        return str(path.read_text(encoding="utf-8"))
    except OSError:
        return None
