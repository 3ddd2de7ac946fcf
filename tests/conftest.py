"""What the integration tests and the tests of the documentation share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """For subprocesses: this environment's commands, nobody's configuration, a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GR_")}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "GR_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Installs a package from its built wheel into a folder for PYTHONPATH, as a stranger would."""

    def install(package: Path) -> Path:
        target = tmp_path_factory.mktemp(package.name)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
        options = ["--no-deps", "--no-build-isolation", "--no-index", str(package)]
        subprocess.run([*command, *options], check=True)
        return target

    return install


@pytest.fixture(scope="session")
def with_popularity(
    environment: Mapping[str, str], install: Callable[[Path], Path]
) -> Mapping[str, str]:
    """The environment with the example plugin installed."""
    target = install(ROOT / "examples" / "gr-popularity")
    return {**environment, "PYTHONPATH": str(target)}


@pytest.fixture
def run(environment: Mapping[str, str], tmp_path: Path) -> Run:
    """Runs a command in an empty folder and returns what it printed; fails with it otherwise."""

    def run(
        *command: str, env: Mapping[str, str] = environment, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == status, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    return run


Serve = Callable[..., str]


@contextmanager
def servers(environment: Mapping[str, str], folder: Path) -> Iterator[Serve]:
    """Starts `gr serve` with options and returns its address; each must stop with exit code 0."""
    started: list[subprocess.Popen[str]] = []

    def serve(*options: str, env: Mapping[str, str] = environment) -> str:
        command = ["gr", "serve", "--port", "0", *options]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        announcement = process.stdout.readline()
        assert announcement.startswith("serving on "), announcement
        return announcement.removeprefix("serving on ").strip()

    yield serve
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        assert process.wait(timeout=60) == 0


@pytest.fixture
def serve(environment: Mapping[str, str], tmp_path: Path) -> Iterator[Serve]:
    with servers(environment, tmp_path) as serve:
        yield serve


@pytest.fixture(scope="module")
def serve_once(
    environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """The same for a server that the tests of a module share."""
    with servers(environment, tmp_path_factory.mktemp("server")) as serve:
        yield serve


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
