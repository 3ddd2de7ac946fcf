"""Latency of every engine of a device on the shipped models, beside torch.compile.

    python benchmarks/engines.py --device cuda [--rounds 7] [--write]

Batches of the evaluation sets' requests go straight to the engines, interleaved in one process.
Parity comes first: a side whose answers are not those of torch in float32 is not measured. With
`--write` the table goes to benchmarks/results/engines_DEVICE.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gr_hstu
from gr_core import Task
from gr_core.collate import collate
from gr_core.contracts import EncodedRequest, Model, TorchModel
from gr_core.engines import Only, feasible_plans, running
from gr_core.labelled import EVALUATION, read_labelled
from gr_core.parity import TOLERANCE, reference_plan, retrieval_error, score_error
from gr_core.plugins.host import PluginHost
from gr_core.repository import Bundle
from gr_core.samples import for_task

RESULTS = Path(__file__).parent / "results"
BUNDLES = Path(gr_hstu.__file__).parent / "bundles"
MODELS = (("kuairand-retrieval", Task.RETRIEVE), ("kuairand-ranking", Task.RANK))
BATCHES = (1, 8, 32)
K = 10

Batch = Sequence[EncodedRequest]
Answers = Sequence[tuple[Any, Any]]
"""Of each request, indices (None in ranking) and scores."""


@dataclass
class Side:
    name: str
    dtype: str
    infer: Callable[[Batch], Answers]
    seconds: dict[int, list[float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=20, help="batches a side and round")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        f"# Engines on {arguments.device}",
        "",
        f"`python benchmarks/engines.py --device {arguments.device} --rounds {arguments.rounds} "
        f"--threads {arguments.threads}` on {machine(arguments.device)}.",
        "",
        f"## engines-{arguments.device}",
        "",
        "| model | side | error | " + " | ".join(f"batch {b}, ms" for b in BATCHES) + " |",
        "|---|---|---|" + "---|" * len(BATCHES),
    ]
    print("\n".join(lines), flush=True)
    registry = PluginHost.discover().registry
    for name, task in MODELS:
        bundle = Bundle.open(BUNDLES / name / "1")
        model: Model = registry.models[bundle.architecture].resolve()(bundle)
        requests = encoded(model, task)
        with ExitStack() as stack:
            reference = stack.enter_context(
                running(reference_plan(registry, bundle.architecture, task), model)
            )
            right = [(r.indices, r.scores) for r in reference.infer([deep(r) for r in requests])]
            plans = feasible_plans(
                registry, bundle.architecture, task, Only(device=arguments.device)
            )
            sides = [
                Side(
                    engine.label,
                    engine.plan.dtype,
                    lambda b, e=engine: [(r.indices, r.scores) for r in e.infer(b)],
                )
                for engine in (
                    stack.enter_context(running(p, model, threads=arguments.threads)) for p in plans
                )
            ]
            assert isinstance(model, TorchModel)
            sides.append(compiled(model, task, arguments.device))
            torch.set_num_threads(arguments.threads)
            for line in measured(name, task, sides, requests, right, arguments):
                lines.append(line)
                print(line, flush=True)
        model.close()
    if arguments.write:
        (RESULTS / f"engines_{arguments.device}.md").write_text("\n".join(lines) + "\n")


def encoded(model: Model, task: Task) -> list[EncodedRequest]:
    requests = [labelled.request for labelled in read_labelled(model.bundle.path / EVALUATION)]
    found = [model.encode(for_task(request, task), task).request for request in requests]
    if task is Task.RETRIEVE:
        return [replace(request, k=K) for request in found]
    return [request for request in found if len(request.arrays["candidate_items"])]


def deep(request: EncodedRequest) -> EncodedRequest:
    return replace(request, k=10 * K) if request.task is Task.RETRIEVE else request


def compiled(model: TorchModel, task: Task, device: str) -> Side:
    """The model's own module under torch.compile, dynamic shapes, and torch's top-k."""
    module = torch.compile(copy.deepcopy(model.module(task)).to(device), dynamic=True)
    table = model.item_table()[1:].T.contiguous().to(device) if task is Task.RETRIEVE else None

    @torch.inference_mode()
    def infer(batch: Batch) -> Answers:
        arrays = collate(model.inputs(task), batch)
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        output = module(**inputs)
        if table is None:
            scores = output.cpu().numpy()
            return [
                (None, scores[i, : len(r.arrays["candidate_items"])]) for i, r in enumerate(batch)
            ]
        best = torch.topk(output @ table, max(r.k for r in batch))
        scores, places = best.values.cpu().numpy(), best.indices.cpu().numpy() + 1
        return [(places[i, : r.k], scores[i, : r.k]) for i, r in enumerate(batch)]

    return Side(f"torch.compile ({device}, float32)", "float32", infer)


def measured(
    name: str,
    task: Task,
    sides: Sequence[Side],
    requests: Sequence[EncodedRequest],
    right: Answers,
    arguments: argparse.Namespace,
) -> Sequence[str]:
    errors = {id(side): parity(side, requests, right) for side in sides}
    good = [side for side in sides if errors[id(side)] <= TOLERANCE[side.dtype]]
    rng = np.random.default_rng(0)
    for number in range(arguments.rounds + 1):
        for size in BATCHES:
            chosen = [
                [requests[i] for i in rng.choice(len(requests), size, replace=False)]
                for _ in range(arguments.batches)
            ]
            for turn in range(len(good)):
                side = good[(turn + number) % len(good)]
                seconds = []
                for batch in chosen:
                    started = time.perf_counter()
                    side.infer(batch)
                    seconds.append(time.perf_counter() - started)
                if number:  # the first round warms up
                    side.seconds.setdefault(size, []).append(statistics.median(seconds))
    lines = []
    for side in sides:
        error = errors[id(side)]
        cells = [f"{1e3 * statistics.median(side.seconds[b]):.2f}" for b in BATCHES if side in good]
        cells = cells or ["wrong"] * len(BATCHES)
        lines.append(f"| {name}, {task.value} | {side.name} | {error:.1e} | {' | '.join(cells)} |")
    return lines


def parity(side: Side, requests: Sequence[EncodedRequest], right: Answers) -> float:
    worst = 0.0
    for start in range(0, len(requests), 8):
        batch = requests[start : start + 8]
        answers = side.infer(batch)
        for request, (indices, scores), (items, expected) in zip(
            batch, answers, right[start : start + 8], strict=True
        ):
            if indices is None:
                worst = max(worst, score_error(scores, expected))
            else:
                worst = max(worst, retrieval_error(indices, scores, items, expected, request.k)[0])
    return worst


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, torch {torch.__version__}"
    return f"torch {torch.__version__}"


if __name__ == "__main__":
    main()
