"""A process of vLLM ends with the one that started it, and tells it why it cannot start."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gr_vllm import front

PROGRAM = """
import logging, multiprocessing, os, sys, time
from pathlib import Path

from gr_vllm import front

def core(fails):
    front.attend()
    if fails:
        for text in ("the pool is too small", "what follows from it"):
            try:
                raise ValueError(text)
            except ValueError:
                logging.getLogger("vllm.v1.core").exception("it failed to start")
        return
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    os.environ.update(front.variables(Path(sys.argv[1])))
    child = multiprocessing.get_context("spawn").Process(target=core, args=(len(sys.argv) > 2,))
    child.start()
    child.join()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


def test_it_ends_with_a_front_end_that_is_killed(program: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(program), str(tmp_path / "cause")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        core = int(process.stdout.readline())
        assert os.getpgid(core) != os.getpgid(process.pid), "it gets the signals of the group"
        process.kill()
    end = time.monotonic() + 10
    while _runs(core):
        assert time.monotonic() < end, "it goes on without its front end"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        # A child of a killed process waits for whoever adopts it to ask for its status.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_tells_the_first_reason(program: Path, tmp_path: Path) -> None:
    cause = tmp_path / "cause"
    assert front.read(cause) == ""
    command = [sys.executable, str(program), str(cause), "fails"]
    subprocess.run(command, check=True, capture_output=True)
    assert front.read(cause) == "the pool is too small"


def test_nobody_else_attends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The front end calls it too; and it may itself be a process of another front end."""
    handlers = list(logging.getLogger("vllm").handlers)
    for name, value in front.variables(tmp_path / "cause").items():
        monkeypatch.setenv(name, value)
    front.attend()
    assert logging.getLogger("vllm").handlers == handlers
