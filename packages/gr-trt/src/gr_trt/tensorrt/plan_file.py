"""A plan on disk: its bytes, what the library wrote at their beginning, and a file of our own.

Beside ``NAME.plan`` lies ``NAME.plan.json``, which says what the plan was built for and what its
digest is. Both are checked before a plan is given to the library, which runs what is in it.

The library's header, in bytes, little-endian: 0 to 3 ``vtrt`` for TensorRT for RTX or ``ftrt`` for
TensorRT; 16 to 23 of ``vtrt``, the size of the file; 24 to 27, the version in four numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gr_core.errors import BundleError
from gr_trt.tensorrt.files import write_atomically
from gr_trt.tensorrt.options import CURRENT, TENSORRT, TENSORRT_RTX
from gr_trt.tensorrt.profiles import Profile

SUFFIX = ".plan"
MAGIC = "gr-trt plan"
FORMAT_VERSION = 1
HEADER_BYTES = 28
_MAGICS = {b"vtrt": TENSORRT_RTX, b"ftrt": TENSORRT}
_MAX_SIDECAR_BYTES = 16 * 2**20
_AGAIN = "export the model again"


def this_platform() -> str:
    """E.g. ``linux-x86_64``; plans are not read on another."""
    return f"{sys.platform}-{platform.machine().lower()}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a library writes at the beginning of a plan."""

    library: str
    version: str
    bytes: int | None
    """Size of the whole plan, where the header says it."""


def read_header(path: Path, content: bytes | memoryview) -> Header:
    """Raises `BundleError` for what is not a plan, or is cut off."""
    magic = bytes(content[:4])
    if magic not in _MAGICS:
        raise BundleError(f"{path}: not a plan of TensorRT, it begins with {magic!r}; {_AGAIN}")
    if len(content) < HEADER_BYTES:
        raise BundleError(f"{path}: truncated after {len(content)} bytes; {_AGAIN}")
    library = _MAGICS[magic]
    numbers = struct.unpack_from("4B", content, 24)
    size = struct.unpack_from("<Q", content, 16)[0] if library == TENSORRT_RTX else None
    return Header(library, ".".join(map(str, numbers)), size)


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What our own file says of a plan."""

    library: str
    version: str
    """In full, e.g. ``1.7.1.116``."""
    targets: tuple[str, ...]
    """Compute capabilities, e.g. ``sm80``, ``sm89``."""
    device: str
    """GPU that it was built on, empty if it was built without one."""
    platform: str
    bytes: int
    sha256: str
    profiles: tuple[Profile, ...]
    structure: str
    """Digest of the graph without its weights, see `gr_trt.tensorrt.graphs.OnnxGraph`."""
    refit: bool = False
    weight_streaming: bool = False
    activation_bytes: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0
    network: Mapping[str, Any] = field(default_factory=dict)
    """Layers before anything is fused, see `gr_trt.tensorrt.network.Network.summary`."""
    layers: tuple[str, ...] = ()
    """Those of the plan, see `gr_trt.tensorrt.messages.make_log`."""

    def as_dict(self) -> dict[str, Any]:
        profiles = [profile.as_dict() for profile in self.profiles]
        facts = {name: getattr(self, name) for name in self.__slots__}
        return {
            "magic": MAGIC,
            "format_version": FORMAT_VERSION,
            **facts,
            "targets": list(self.targets),
            "profiles": profiles,
            "network": dict(self.network),
            "layers": list(self.layers),
        }

    def on_this_gpu(self, capability: str) -> bool:
        return capability in self.targets


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write(path: Path, plan: bytes | memoryview, facts: PlanFacts) -> None:
    """Writes both files, the plan first. Raises `BundleError` where there is no room."""
    write_atomically(path, plan)
    try:
        text = json.dumps(facts.as_dict(), indent=2) + "\n"
        write_atomically(sidecar(path), text.encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def digest(plan: bytes | memoryview) -> str:
    return hashlib.sha256(plan).hexdigest()


def read_facts(path: Path) -> PlanFacts:
    """What our file says of the plan ``path``. Raises `BundleError`."""
    file = sidecar(path)
    try:
        if file.stat().st_size > _MAX_SIDECAR_BYTES:
            raise BundleError(f"{file}: larger than {_MAX_SIDECAR_BYTES} bytes; {_AGAIN}")
        data = json.loads(file.read_text())
        if data.pop("magic") != MAGIC or data.pop("format_version") != FORMAT_VERSION:
            raise ValueError("made by another release of gr-trt")
        data["targets"] = tuple(map(str, data["targets"]))
        data["profiles"] = tuple(map(Profile.of, data["profiles"]))
        data["layers"] = tuple(map(str, data["layers"]))
        return PlanFacts(**data)
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror}; {_AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{file}: does not describe a plan ({type(error).__name__}: {error}); {_AGAIN}"
        ) from None


def read(path: Path) -> tuple[bytes, PlanFacts]:
    """A plan that is whole and what is known of it. Raises `BundleError` for any other."""
    facts = read_facts(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; {_AGAIN}") from None
    header = read_header(path, content)
    if len(content) != facts.bytes or header.bytes not in (None, facts.bytes):
        raise BundleError(
            f"{path}: truncated or altered: {len(content)} bytes, expected {facts.bytes}; {_AGAIN}"
        )
    if digest(content) != facts.sha256:
        raise BundleError(
            f"{path}: its SHA-256 differs from the one in {sidecar(path).name}; {_AGAIN}"
        )
    if (header.library, header.version) != (facts.library, _short(facts.version)):
        raise BundleError(
            f"{path}: is of {header.library} {header.version}, but {sidecar(path).name} says "
            f"{facts.library} {facts.version}; {_AGAIN}"
        )
    return content, facts


def check(path: Path, facts: PlanFacts, library: str, version: str, capability: str) -> None:
    """Whether a library on a GPU can run a plan. Raises `BundleError` that says what can."""
    if facts.platform != this_platform():
        raise BundleError(
            f"{path}: was built for {facts.platform}, this is {this_platform()}; {_AGAIN} here"
        )
    if facts.library != library:
        raise BundleError(
            f"{path}: was built by {facts.library} {facts.version}, not by {library}; "
            f"{_AGAIN} with --option library={library}, or leave option library at auto"
        )
    if _short(facts.version) != _short(version):
        raise BundleError(
            f"{path}: was built by {facts.library} {facts.version}, installed is {version}, and "
            f"plans are for one version alone; {_AGAIN}, or install {facts.version}"
        )
    if not facts.on_this_gpu(capability):
        built_on = f" on {facts.device}" if facts.device else ""
        raise BundleError(
            f"{path}: was built{built_on} for {', '.join(facts.targets)}, this GPU is "
            f"{capability}; {_AGAIN} with --option target={capability}, or "
            f"--option target={CURRENT} on this machine"
        )


def _short(version: str) -> str:
    """Four numbers, as in a plan's header: ``1.7.1.116``; the build is kept in a byte."""
    numbers = [int(part) for part in version.split(".")[:4] if part.isdigit()]
    return ".".join(str(number % 256) for number in (*numbers, 0, 0, 0, 0)[:4])
