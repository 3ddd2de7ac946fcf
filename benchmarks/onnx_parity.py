"""ONNX graphs against torch in float32: every precision, in a single pass and in steps.

    python benchmarks/onnx_parity.py [--requests 200] [--write]

Models: the shipped bundles with the requests of their evaluation sets, and random ones of the
remaining variants with made-up users. *steps* is prefill of a part of the history, its K and V
kept, and decode of the rest with the candidates. Errors are relative to the largest magnitude of a
request's scores. `--write` replaces benchmarks/results/onnx_parity.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import gr_hstu
from gr_core import Candidates, RecommendRequest, Task
from gr_core.collate import collate
from gr_core.contracts import (
    Artifact,
    EncodedRequest,
    EngineOptions,
    ExportOptions,
    InferenceResult,
)
from gr_core.labelled import EVALUATION, read_labelled
from gr_core.repository import Bundle
from gr_core.samples import for_task
from gr_core.steps import KEYS, PAST_KEYS, PAST_VALUES, SCORES, USER, VALUES
from gr_hstu.engine import TorchEngine
from gr_hstu.model import HSTUModel, load_hstu, load_mtgr
from gr_hstu.testing import Users, write
from gr_trt.ensemble import Ensemble, Role
from gr_trt.export.exporter import OnnxExporter
from gr_trt.onnx_runtime.session import Runtime, Session

RESULTS = Path(__file__).parent / "results" / "onnx_parity.md"
BUNDLES = Path(gr_hstu.__file__).parent / "bundles"
DTYPES = ("float32", "float16", "int8")
K = 10


@dataclass(frozen=True)
class Subject:
    name: str
    model: HSTUModel
    requests: Sequence[RecommendRequest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# ONNX graphs against torch",
        "",
        f"`python benchmarks/onnx_parity.py --requests {arguments.requests}`, on "
        f"{platform.machine()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}.",
        "",
        "## onnx-parity",
        "",
        "| model | task | requests | graphs | error, single pass | error, steps | steps to single "
        f"pass | same top {K}, single pass | same top {K}, steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for subject in subjects(Path(scratch), arguments.requests):
            for dtype in DTYPES:
                folder = Path(scratch) / f"{subject.name}-{dtype}"
                folder.mkdir()
                model = subject.model
                artifact = Artifact("torch", model.bundle.path)
                OnnxExporter().export(artifact, model, folder, ExportOptions(dtype=dtype))
                for task in model.tasks:
                    lines.append(row(subject, task, dtype, folder))
                    print(lines[-1], flush=True)
    if arguments.write:
        RESULTS.write_text("\n".join(lines) + "\n")


def subjects(scratch: Path, count: int) -> Iterator[Subject]:
    yield shipped("kuairand-retrieval", load_hstu, count)
    for kind, load in (("research", load_hstu), ("ranking", load_hstu), ("mtgr", load_mtgr)):
        users = Users(seed=1, users=20)
        requests = [users.request() for _ in range(count)]
        yield Subject(f"random {kind}", load(write(scratch, kind)), requests)
    yield shipped("kuairand-ranking", load_mtgr, count)


def shipped(name: str, load: Callable[[Bundle], HSTUModel], count: int) -> Subject:
    bundle = Bundle.open(BUNDLES / name / "1")
    requests = [labelled.request for labelled in read_labelled(bundle.path / EVALUATION)]
    if bundle.tasks[0] is Task.RETRIEVE:
        rng = np.random.default_rng(0)
        ids = bundle.catalogue().ids_of(np.arange(1, len(bundle.catalogue()) + 1))
        requests = [
            replace(r, candidates=Candidates(rng.choice(ids, 64, replace=False))) for r in requests
        ]
    return Subject(name, load(bundle), requests[:count])


def row(subject: Subject, task: Task, dtype: str, folder: Path) -> str:
    model = subject.model
    batch = [
        replace(model.encode(for_task(request, task), task).request, k=K)
        for request in subject.requests
    ]
    batch = [r for r in batch if task is Task.RETRIEVE or len(r.arrays["candidate_items"])]
    engine = TorchEngine()
    engine.load(Artifact("torch", model.bundle.path), model, [task], EngineOptions())
    right = []
    for request in batch:
        (result,) = engine.infer([replace(request, k=len(model.catalogue))])
        scores = result.scores
        if result.indices is not None:
            scores = np.empty_like(scores)
            scores[result.indices - 1] = result.scores
        right.append(scores)
    graphs = Graphs(model, folder)
    single = [graphs.single_pass(request) for request in batch]
    steps = [graphs.in_steps(request) for request in batch]
    cells = [
        f"{max(map(error, single, right)):.1e}",
        f"{max(map(error, steps, right)):.1e}",
        f"{max(map(error, steps, single)):.1e}",
        f"{same(model, task, single, right):.1%}",
        f"{same(model, task, steps, right):.1%}",
    ]
    return f"| {subject.name} | {task.value} | {len(batch)} | {dtype} | {' | '.join(cells)} |"


class Graphs:
    """The graphs of a folder, run as a deployment of one's own would."""

    def __init__(self, model: HSTUModel, folder: Path) -> None:
        self.model = model
        self.ensemble = Ensemble.read(folder)
        runtime = Runtime.on("cpu", "auto", 1)
        self.sessions = {
            (graph.role, task): (graph, Session(folder, graph, runtime))
            for graph in self.ensemble.graphs
            for task in graph.tasks
        }

    def run(self, role: Role, task: Task, arrays: Mapping[str, Any]) -> dict[str, Any]:
        graph, session = self.sessions[role, task]
        specs = [tensor.spec for tensor in graph.inputs]
        return session.run(collate(specs, [EncodedRequest(task, arrays, 0)]))

    def single_pass(self, request: EncodedRequest) -> Any:
        outputs = self.run(Role.SINGLE_PASS, request.task, request.arrays)
        return self.scores(request, outputs)

    def in_steps(self, request: EncodedRequest) -> Any:
        """A part of the history first, if its K and V hold whatever follows."""
        model, task = self.model, request.task
        sequence = model.sequence(request)
        n = sequence.history
        part = min(sequence.reusable, n - (not sequence.candidates))
        if model.prefix_stability.reusable == "growing":
            part = min(part, n // 2)
        part = max(0, part)
        before = self.run(Role.PREFILL, task, model.step_arrays(request, sequence, 0))
        arrays = dict(model.step_arrays(request, sequence, part))
        arrays |= {
            PAST_KEYS: before[KEYS][0][:, :part],
            PAST_VALUES: before[VALUES][0][:, :part],
        }
        return self.scores(request, self.run(Role.DECODE, task, arrays))

    def scores(self, request: EncodedRequest, outputs: Mapping[str, Any]) -> Any:
        if request.task is Task.RANK:
            return outputs[SCORES][0, : len(request.arrays["candidate_items"])]
        _, session = self.sessions[Role.TOP_K, Task.RETRIEVE]
        size = self.ensemble.catalogue_size
        found = session.run({USER: outputs[USER], "k": np.array(size)})
        scores = np.empty(size, np.float32)
        scores[found["indices"][0] - 1] = found["scores"][0]
        return scores


def error(found: Any, right: Any) -> float:
    return float(np.abs(found - right).max() / max(float(np.abs(right).max()), 1e-6))


def same(model: HSTUModel, task: Task, found: Sequence[Any], right: Sequence[Any]) -> float:
    """Part of the reference's top ten that is in ours, averaged."""

    def top(scores: Any) -> set[int]:
        if task is Task.RANK:
            scores, _ = model.decode(task, InferenceResult(scores), {})
        return set(np.argsort(-scores, kind="stable")[:K].tolist())

    return float(
        np.mean([len(top(a) & top(b)) / len(top(b)) for a, b in zip(found, right, strict=True)])
    )


if __name__ == "__main__":
    main()
