"""HSTU layers on a GPU: ours beside plain PyTorch, torch.compile and softmax attention.

    python benchmarks/gpu_layers.py [--tune] [--quick] [--only stack attention] [--write]

Needs a CUDA GPU and gr-kernels[triton]. Each case is checked first: fresh random inputs, poisoned
outputs, the error relative to float32 at most twice that of plain PyTorch in bfloat16. What is
wrong is not timed, no speed-up is told of it or by it, and the script ends with 1. Then the sides
take turns in rounds, timed by events on the device. With `--write` the tables go to
benchmarks/results/gpu_layers.md and everything else to gpu_layers.json; `--markdown` and `--json`
name other files. `--tune` first measures how kernels are launched best at these sizes, as
`gr kernels tune` does, and keeps it for all that runs here later. The card's settings are read,
never changed.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    from gr_kernels.benchmark.gpu import report, suite
    from gr_kernels.benchmark.gpu.measure import CaseResult, Settings
    from gr_kernels.benchmark.report import markdown, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=0, help="15, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="few points and rounds")
    parser.add_argument("--tune", action="store_true", help="measure launches first")
    parser.add_argument("--only", nargs="+", choices=suite.SERIES, default=list(suite.SERIES))
    parser.add_argument("--device", type=int, default=0, help="number of the GPU")
    parser.add_argument("--json", type=Path, help="write all measurements there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--write", action="store_true", help="both, to benchmarks/results")
    given = parser.parse_args(arguments)
    if given.rounds < 0:
        parser.error("--rounds: expected at least 1")
    if trouble := unusable(given.device):
        print(f"not measured: {trouble}", file=sys.stderr)
        return 2
    if given.write:
        given.json = given.json or RESULTS / "gpu_layers.json"
        given.markdown = given.markdown or RESULTS / "gpu_layers.md"

    from gr_kernels.benchmark.gpu import tuned
    from gr_kernels.benchmark.gpu.device import CudaDevice
    from gr_kernels.tune import cuda_timer

    def advance(step: str) -> None:
        print(f"… {step}", file=sys.stderr, flush=True)

    def tell(case: CaseResult) -> None:
        print(f"\n{case.name}\n", flush=True)
        print(markdown(report.case_table(case, None)), flush=True)

    plan = suite.QUICK if given.quick else suite.FULL
    device = CudaDevice(given.device)
    if given.tune:
        points = [*plan.stack, *plan.returning, *plan.host]
        tuned.tune(tuned.todo(points, device.name), cuda_timer, advance)
    outcome = suite.run(
        plan,
        device,
        Settings(rounds=given.rounds or (3 if given.quick else 15)),
        given.only,
        advance,
        tell,
    )
    page = report.as_markdown(outcome)
    print("\n" + page)
    files = {}
    if given.json is not None:
        files[given.json] = report.json_text(outcome)
    if given.markdown is not None:
        files[given.markdown] = page
    write(files)
    for sentence in (*outcome.red, *outcome.broken):
        print(f"wrong: {sentence}", file=sys.stderr)
    return 1 if outcome.red or outcome.broken else 0


def unusable(device: int) -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if not 0 <= device < torch.cuda.device_count():
        return f"--device is {device}; torch sees {torch.cuda.device_count()} CUDA devices"
    if find_spec("triton") is None:
        return "Triton is not installed; pip install gr-kernels[triton]"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
