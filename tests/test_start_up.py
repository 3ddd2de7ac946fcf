"""`gr` answers at once although heavy plugins are installed."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

BUDGET_S = 0.25
HEAVY = ("torch", "grpc", "scipy", "sklearn", "onnxruntime", "tensorrt", "vllm")


def cpu_seconds(command: Sequence[str], env: Mapping[str, str]) -> float:
    """The least CPU time of five runs: what the machine is busy with otherwise does not count."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=env, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


@pytest.mark.parametrize(
    "command",
    [("gr", "--help"), ("gr", "--version"), (sys.executable, "-c", "import gr_core")],
    ids=" ".join,
)
def test_it_is_quick(command: Sequence[str], environment: Mapping[str, str]):
    assert cpu_seconds(command, environment) < BUDGET_S


@pytest.mark.parametrize(
    "code",
    [
        "import gr_core",
        "import contextlib; from gr_core.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])",
    ],
    ids=["import gr_core", "gr --help"],
)
def test_it_imports_nothing_heavy(code: str, run):
    code += f"\nimport sys; print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.endswith("heavy: []\n")


def test_help_lists_the_commands_of_all_plugins(run):
    shown = run("gr", "--help").stdout
    for command in ("check", "plugins", "plan", "config", "models", "recommend", "serve", "call"):
        assert f"  {command} " in shown
    for command in ("verify", "bench", "export", "hstu"):
        assert f"  {command} " in shown
