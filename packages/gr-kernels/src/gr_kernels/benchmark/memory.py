"""How much memory a side needs for a run, measured in a process of its own.

    python -m gr_kernels.benchmark.memory SIDE THREADS POINT...

What is reported is the largest resident size of the process during one run less the resident size
before it, weights, input and mask being there: the temporaries and, of the native side, its
workspace and the blocks of K and V that the run writes. malloc returns what is freed, so that
what was needed before does not hide what the run needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_TIMEOUT_S = 3600
_STATUS = Path("/proc/self/status")
_SMALL = "1/64/64+8/8"
_RESET_HIGH_WATER = "5"
"""Written to clear_refs, see proc(5)."""


def peak_bytes(side: str, points: Sequence[str], threads: int) -> tuple[Mapping[str, int], str]:
    """Of each point by its label, and why some are missing, if they are."""
    if not _STATUS.exists():
        return {}, f"this system has no {_STATUS}"
    command = [sys.executable, "-m", "gr_kernels.benchmark.memory", side, str(threads), *points]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    measured: dict[str, int] = {}
    for line in done.stdout.splitlines():
        measured |= json.loads(line)
    if done.returncode:
        return measured, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return measured, ""


def _measure(name: str, threads: int, labels: Sequence[str]) -> None:
    import torch

    from gr_kernels.benchmark.machine import return_freed_memory
    from gr_kernels.benchmark.peers import SIDES
    from gr_kernels.benchmark.points import Point
    from gr_kernels.benchmark.work import make_work

    (kind,) = (kind for kind in SIDES if kind.name == name)
    torch.set_num_threads(threads)
    return_freed_memory()
    # A first run brings code into memory, which is not the run's.
    small = kind(make_work(Point.parse(_SMALL)), threads)
    small.before()
    small.run()
    small.close()
    for label in labels:
        side = kind(make_work(Point.parse(label)), threads)
        if kind.compiles:
            side.run()
        side.before()
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text(_RESET_HIGH_WATER)
        side.run()
        print(json.dumps({label: _status_bytes("VmHWM") - before}), flush=True)
        side.close()


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
