"""The real tritonserver of the wheel nvidia-pytriton, with its Python backend, on loopback.

    pip install --no-deps nvidia-pytriton
    python scripts/tritonserver.py REPOSITORY        serves a repository until it is interrupted

For tests, benchmarks, and for trying a repository without a container. The wheel has no other
backends. Python's shared library has to be installed, on Debian as libpython3.11.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

SECONDS_TO_START = 60
SECONDS_TO_STOP = 30
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Triton:
    """A running server."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    log: Path


def wheel() -> Path:
    """Where the wheel is installed; it is never imported, only its binaries are run."""
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise SystemExit("nvidia-pytriton is not installed; pip install --no-deps nvidia-pytriton")
    return Path(spec.origin).parent


def backends(folder: Path) -> Path:
    """The backends as tritonserver looks for them: the Python backend with its stub inside."""
    server = wheel() / "tritonserver"
    python = folder / "python"
    python.mkdir(parents=True)
    for file in (server / "backends" / "python").iterdir():
        (python / file.name).symlink_to(file)
    stub = python / "triton_python_backend_stub"
    stub.write_bytes(
        (server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub").read_bytes()
    )
    stub.chmod(0o755)
    return folder


@contextmanager
def tritonserver(repository: Path, scratch: Path, *options: str) -> Iterator[Triton]:
    """Serves a repository; must become ready, and end with exit code 0 when it is told to."""
    with started(repository, scratch, *options) as triton:
        wait_until_ready(triton)
        yield triton
        triton.process.send_signal(signal.SIGTERM)
        code = triton.process.wait(SECONDS_TO_STOP)
        assert code == 0, f"exit code {code}\n{tail(triton.log)}"


@contextmanager
def started(repository: Path, scratch: Path, *options: str) -> Iterator[Triton]:
    """The same without waiting; whatever happens, it is gone afterwards."""
    if not (scratch / "backends").exists():
        backends(scratch / "backends")
    http, grpc, metrics = free_ports(3)
    server = wheel() / "tritonserver" / "bin" / "tritonserver"
    server.chmod(0o755)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(wheel().parent / "nvidia_pytriton.libs"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(server),
        f"--model-repository={repository}",
        f"--backend-directory={scratch / 'backends'}",
        *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=20",
        *options,
    ]
    log = scratch / f"tritonserver-{grpc}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield Triton(process, f"127.0.0.1:{grpc}", f"127.0.0.1:{http}", log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(SECONDS_TO_STOP)


def wait_until_ready(triton: Triton) -> None:
    for _ in range(20 * SECONDS_TO_START):
        code = triton.process.poll()
        assert code is None, f"tritonserver ended with {code}\n{tail(triton.log)}"
        with suppress(OSError), urlopen(f"http://{triton.http}/v2/health/ready", timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(f"not ready after {SECONDS_TO_START} s\n{tail(triton.log)}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]


def free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with (
        tempfile.TemporaryDirectory() as scratch,
        started(Path(sys.argv[1]).resolve(), Path(scratch)) as triton,
        suppress(KeyboardInterrupt),
    ):
        wait_until_ready(triton)
        print(f"serving on {triton.grpc} (gRPC) and {triton.http} (HTTP)", flush=True)
        triton.process.wait()


if __name__ == "__main__":
    main()
