"""The library of kernels in CUDA C++: built by nvcc when asked for, kept, checked and loaded.

Its sources are in the folder ``cutlass`` beside this module, its interface is their ``gr_cuda.h``.
`build` compiles it for one architecture with nvcc and the headers of CUTLASS, into the user's
folder, under a name that tells its sources, flags, compiler and headers. After that neither is
needed any more, only the driver. As no kernel is trusted on hardware that it never ran on, a
library is used on a device only once `gr_kernels.cuda.self_test` has passed
there; `record` keeps that beside the library. Nothing here needs a GPU but a launch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gr_core.devices import machine
from gr_core.errors import GrError
from gr_kernels import tuning

logger = logging.getLogger(__name__)

ABI_VERSION = 1
"""Of cutlass/gr_cuda.h."""

ARCHITECTURES = {
    # With PTX beside it, which drivers compile for what came later.
    "sm_80": ("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-DGR_CUDA_ARCHITECTURE=80"),
    # wgmma and setmaxnreg are of compute_90a alone, not of what comes after.
    "sm_90a": ("-gencode=arch=compute_90a,code=sm_90a", "-DGR_CUDA_ARCHITECTURE=90"),
}
"""What can be built for, and nvcc's arguments for it."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-shared",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
)
SOURCES = Path(__file__).parent / "cutlass"
USUAL = Path("/usr/local/cuda")
"""Where the CUDA toolkit is usually installed."""
FOLDER_VARIABLE = "GR_CUDA_LIBRARIES"
"""A folder of libraries that were built before, e.g. for a container without a compiler."""
HEADERS_VARIABLE = "GR_CUTLASS_DIR"
"""A checkout of CUTLASS, or its folder ``include``."""
LONGEST = 900.0
"""Seconds that a compilation may take."""
LINES = 20
"""Of the compiler's output that an error shows."""


class Call(ctypes.Structure):
    """``GrHstuAttention`` of cutlass/gr_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "device", "heads", "columns")),
        *((name, ctypes.c_int32) for name in ("sequences", "offset_bytes")),
        *((name, ctypes.c_int64) for name in ("tokens", "keys")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *(
            (f"{name}_{axis}_stride", ctypes.c_int64)
            for name in ("q", "k", "v", "out")
            for axis in ("token", "head")
        ),
        *((name, ctypes.c_void_p) for name in ("query_offsets", "key_offsets")),
        *((name, ctypes.c_void_p) for name in ("low", "high", "own", "addresses", "counts")),
        *((name, ctypes.c_int64) for name in ("addresses_stride", "layer_offset")),
        *((name, ctypes.c_float) for name in ("alpha", "scale")),
        *((name, ctypes.c_int32) for name in ("splits", "reserved")),
        ("workspace", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles the library."""

    nvcc: Path
    version: str
    headers: Path
    cutlass: str

    def key(self) -> str:
        return hashlib.sha256(f"{self.version}\n{self.cutlass}".encode()).hexdigest()[:12]


class Library:
    """A loaded library. Raises `OSError` where it is damaged, or its interface is another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = ctypes.CDLL(str(path))
        try:
            version, size = found.gr_cuda_abi_version(), found.gr_cuda_hstu_attention_size
            found.gr_cuda_architecture.restype = ctypes.c_char_p
            self._attend = found.gr_cuda_hstu_attention
        except AttributeError as error:
            raise OSError(f"{path} is no library of gr-kernels: {error}") from None
        size.restype = ctypes.c_int64
        if version != ABI_VERSION or size() != ctypes.sizeof(Call):
            raise OSError(f"{path} has the interface {version}, expected {ABI_VERSION}")
        self.architecture: str = found.gr_cuda_architecture().decode()
        self._attend.argtypes = [
            ctypes.POINTER(Call),
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int64,
        ]

    def hstu_attention(self, call: Call, stream: int) -> None:
        """Launches. Raises `ValueError` for what there is no kernel for, `GrError` if CUDA does."""
        message = ctypes.create_string_buffer(512)
        code = self._attend(ctypes.byref(call), stream, message, len(message))
        if code:
            text = f"hstu_attention-cutlass: {message.value.decode(errors='replace')}"
            raise ValueError(text) if code == 1 else GrError(text)


# ── Where things are ──────────────────────────────────────────────────────────────────────────


def folder() -> Path:
    """Where libraries are built and kept."""
    return tuning.user_folder() / "cuda"


@functools.cache
def sources_key() -> str:
    """A digest of all that is compiled, but for what the compiler brings."""
    digest = hashlib.sha256(json.dumps([ABI_VERSION, FLAGS, ARCHITECTURES]).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in {".cu", ".cuh", ".h"}:
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def find(architecture: str) -> Path | None:
    """The library of these sources for an architecture that was built last, if there is one.

    Looks into the folder that ``GR_CUDA_LIBRARIES`` names, then into the user's.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    for place in (Path(given), folder()) if given else (folder(),):
        files = list(place.glob(f"libgr_cuda-{architecture}-{sources_key()}-*.so"))
        if files:
            return max(files, key=lambda file: file.stat().st_mtime)
    return None


def find_toolchain() -> Toolchain:
    """Raises `GrError` where nvcc or the headers of CUTLASS are not to be found."""
    nvcc = find_nvcc()
    done = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    version = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    if done.returncode or version is None:
        raise GrError(f"{nvcc} --version says: {(done.stderr or done.stdout).strip()[-200:]!r}")
    headers = find_headers()
    text = (headers / "cutlass" / "version.h").read_text(encoding="utf-8")
    numbers = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text)
    return Toolchain(nvcc, version[1], headers, ".".join(numbers))


def find_nvcc() -> Path:
    """The compiler: in ``$CUDA_HOME``, on the path, in /usr/local/cuda, in NVIDIA's wheels."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            found = Path(home, "bin", "nvcc")
            if not found.is_file():
                raise GrError(f"{variable} is {home!r}, which has no bin/nvcc")
            return found
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    usual = [USUAL / "bin" / "nvcc"]
    wheels = find_spec("nvidia")
    for place in (wheels.submodule_search_locations or ()) if wheels else ():
        usual += sorted(Path(place).glob("*/bin/nvcc"), reverse=True)
    for file in usual:
        if os.access(file, os.X_OK):
            return file
    raise GrError(
        f"nvcc is not found in CUDA_HOME, on the path, in {USUAL} or in NVIDIA's wheels; "
        "install the CUDA toolkit and set CUDA_HOME, or go on with the kernels in Triton"
    )


def find_headers() -> Path:
    """The folder that holds ``cute`` and ``cutlass``."""
    if given := os.environ.get(HEADERS_VARIABLE):
        for place in (Path(given), Path(given, "include")):
            if (place / "cute" / "tensor.hpp").is_file():
                return place
        raise GrError(f"{HEADERS_VARIABLE} is {given!r}, which has no include/cute/tensor.hpp")
    wheel = find_spec("cutlass_library")
    if wheel is not None and wheel.origin is not None:
        place = Path(wheel.origin).parent / "source" / "include"
        if (place / "cute" / "tensor.hpp").is_file():
            return place
    raise GrError(
        "the headers of CUTLASS are not installed; pip install nvidia-cutlass, "
        f"or set {HEADERS_VARIABLE} to a checkout"
    )


# ── Building ──────────────────────────────────────────────────────────────────────────────────


def build(
    architecture: str, out: Path | None = None, report: Callable[[str], None] = logger.info
) -> Path:
    """Compiles the library unless it is there already; returns its file.

    Two processes do not build it twice: the second waits for the first. What is interrupted leaves
    nothing but, at worst, a hidden folder, which the next build removes. Raises `GrError`.
    """
    if architecture not in ARCHITECTURES:
        raise GrError(
            f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    tools = find_toolchain()
    place = folder() if out is None else out
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if why := _unsafe(place):
        raise GrError(why)
    file = place / f"libgr_cuda-{architecture}-{sources_key()}-{tools.key()}.so"
    with _locked(place / f".{architecture}.lock"):
        if file.exists() and not (why := damage(file)):
            report(f"{architecture}: {file} is there already")
            return file
        if file.exists():
            report(f"{architecture}: built again: {why}")
        for left in place.glob(f".build-{architecture}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=f".build-{architecture}-") as work:
            made = Path(work, file.name)
            output = _compile(architecture, tools, made, report)
            about = {
                "architecture": architecture,
                "sha256": _sha256(made),
                "nvcc": tools.version,
                "cutlass": tools.cutlass,
                # Registers and shared memory of each kernel among it.
                "output": output.splitlines(),
            }
            note = Path(work, "about.json")
            note.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            # The library last: whoever sees it sees its note too.
            os.replace(note, _note(file))
            os.replace(made, file)
    report(f"{architecture}: built {file}")
    return file


def _compile(architecture: str, tools: Toolchain, file: Path, report: Callable[[str], None]) -> str:
    """Returns what the compiler has said. Raises `GrError` where it fails."""
    command = [str(tools.nvcc), *FLAGS, *ARCHITECTURES[architecture], f"-I{tools.headers}"]
    # Where nvcc of NVIDIA's wheels does not look for what it links.
    command += [f"-L{tools.nvcc.resolve().parents[1] / name}" for name in ("lib64", "lib")]
    command += [str(SOURCES / "gr_cuda.cu"), "-o", str(file)]
    report(f"{architecture}: compiling with nvcc {tools.version} and CUTLASS {tools.cutlass}")
    # In a session of its own, so that what nvcc starts ends with it; its files go where ours do.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(file.parent)},
    )
    try:
        output, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise GrError(f"nvcc did not end within {LONGEST:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        last = "\n".join(output.strip().splitlines()[-LINES:])
        raise GrError(f"nvcc failed for {architecture}; its last lines:\n{last}")
    file.chmod(0o600)
    return output


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    if sys.platform == "win32":
        raise GrError("the library of kernels for CUDA can be built on Linux alone")
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ── Trust ─────────────────────────────────────────────────────────────────────────────────────


def damage(file: Path) -> str:
    """Why a library is not to be loaded; empty where it may be."""
    if why := _unsafe(file.parent) or _unsafe(file):
        return why
    try:
        about = json.loads(_note(file).read_text(encoding="utf-8"))
        expected = about["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_note(file)}, its digest, is missing or damaged; run `gr kernels build`"
    if _sha256(file) != expected:
        return f"{file} is not what was built; run `gr kernels build`"
    return ""


def _unsafe(path: Path) -> str:
    """Why somebody else could have written there; empty where nobody could but root."""
    found = path.stat()
    if sys.platform != "win32" and found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to the user {found.st_uid}; expected {os.getuid()}, this one"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others; run chmod go-w on it"
    return ""


def _note(file: Path) -> Path:
    return file.with_suffix(".json")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record(file: Path, device: str, failure: str) -> None:
    """Keeps how the self-test went on a device; an empty ``failure`` is a success.

    Beside the library, or in the user's folder where nothing can be written beside it.
    """
    place = file.parent
    if not os.access(place, os.W_OK):
        place = folder()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(
        "w", dir=place, prefix=".outcome-", delete=False, encoding="utf-8"
    ) as stream:
        json.dump({"sha256": _sha256(file), "failure": failure}, stream, indent=1)
    os.replace(stream.name, place / _outcome_name(file, device))


def _outcome_name(file: Path, device: str) -> str:
    return f"{file.stem}.{device}.json"


def outcome(file: Path, device: str) -> tuple[bool, str]:
    """Whether a library has passed its self-test on a device, by the name of `tuning`."""
    name = _outcome_name(file, device)
    places = [place / name for place in (file.parent, folder()) if (place / name).exists()]
    try:
        raw: Any = json.loads(places[0].read_text(encoding="utf-8"))
        failure = str(raw["failure"])
        is_current = raw["sha256"] == _sha256(file)
    except (OSError, ValueError, LookupError, TypeError):
        is_current, failure = False, ""
    if not is_current:
        return False, f"{file.name} was never tested on {device}; run `gr kernels test`"
    if failure:
        return False, f"{file.name} failed its self-test on {device}: {failure}"
    return True, f"{file.name} passed its self-test on {device}"


# ── Using ─────────────────────────────────────────────────────────────────────────────────────


def architectures(capability: tuple[int, int]) -> tuple[str, ...]:
    """What a device of a compute capability can run, best first."""
    if capability < (8, 0):
        return ()
    return ("sm_90a", "sm_80") if capability == (9, 0) else ("sm_80",)


def usable(capability: tuple[int, int], device: str) -> tuple[Path | None, str]:
    """The best library that was built for a device, and trusted there; or None and why."""
    reasons = []
    for architecture in architectures(capability):
        file = find(architecture)
        if file is None:
            reasons.append(f"not built for {architecture}; run `gr kernels build`")
            continue
        ok, reason = False, damage(file)
        if not reason:
            ok, reason = outcome(file, device)
        if ok:
            return file, reason
        reasons.append(reason)
    if not reasons:
        return None, f"the CUDA device has the capability {capability}; expected 8.0 or more"
    return None, "; ".join(reasons)


@functools.cache
def load(file: Path) -> Library:
    """Raises `GrError` for a library that is damaged or not to be trusted."""
    if why := damage(file):
        raise GrError(why)
    try:
        return Library(file)
    except OSError as error:
        raise GrError(f"{error}; run `gr kernels build`") from None


@functools.cache
def library_of(device: int) -> Library:
    """The library for a CUDA device, by its ordinal. Raises `GrError` where there is none."""
    import torch

    name = tuning.file_name(torch.cuda.get_device_name(device))
    file, reason = usable(torch.cuda.get_device_capability(device), name)
    if file is None:
        raise GrError(f"hstu_attention-cutlass: {reason}")
    return load(file)


def probe() -> tuple[bool, str]:
    """Whether a library is there for the current CUDA device and has passed its self-test."""
    try:
        ok, reason = machine().available("cuda")
        if not ok:
            return False, reason
        import torch

        if not torch.cuda.is_available():
            return False, f"torch {torch.__version__} cannot use CUDA; install a build that can"
        file, reason = usable(torch.cuda.get_device_capability(), tuning.device_name())
        if file is None:
            return False, reason
        load(file)
    except Exception as error:  # a probe never raises
        return False, str(error)
    return True, reason
