"""Server and load as processes of their own, and what the system knows of them."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVING = "serving on "
"""What `gr serve` prints before its addresses."""
GR = "from gr_core.cli import main; raise SystemExit(main())"


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that ends when its standard input does."""
    with _started(*arguments, stdin=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            assert running.stdin is not None
            running.stdin.close()
            _end(running)


@contextmanager
def gr_server(config: Path, log: Path) -> Iterator[tuple[str, int]]:
    """`gr serve` with a configuration: its address and process id. ``log`` gets what it logs."""
    with log.open("w") as errors:
        arguments = ("-c", GR, "serve", "--config", str(config), "--port", "0")
        with _started(*arguments, stderr=errors) as running:
            try:
                line = _line(running)
                if not line.startswith(SERVING):
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
                yield line.removeprefix(SERVING).split(",")[0].strip(), running.pid
            finally:
                running.send_signal(signal.SIGTERM)
                _end(running)


@contextmanager
def _started(*arguments: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, **streams
    ) as running:
        yield running


def _end(running: subprocess.Popen[str]) -> None:
    try:
        running.wait(30)
    except subprocess.TimeoutExpired:
        running.kill()


def _line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def read(running: subprocess.Popen[str]) -> str:
    if not (line := _line(running)):
        raise SystemExit("a process of the benchmark ended early; see its error above")
    return line


def ask(client: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, Any]:
    """One JSON job a line in, one JSON result a line out."""
    assert client.stdin is not None
    client.stdin.write(json.dumps(job) + "\n")
    client.stdin.flush()
    answer: dict[str, Any] = json.loads(read(client))
    return answer


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all its threads; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM; 0 where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine(*distributions: str) -> dict[str, Any]:
    """What figures depend on: the processor, Python, and versions of distributions."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in distributions},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def described(facts: dict[str, Any], separator: str = ", ") -> str:
    return separator.join(f"{name} {value}" for name, value in facts.items())


__all__: Sequence[str] = (
    "ROOT", "ask", "cpu_seconds", "described", "gr_server", "machine", "python", "read",
    "resident_bytes",
)  # fmt: skip
