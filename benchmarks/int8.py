"""int8 against float32 in ONNX Runtime, beside torch: quality, processor time, memory, profile.

    python benchmarks/int8.py [--rounds 9] [--grid] [--write]

Quality comes first, by what the quantizer itself reports. Then the engines answer batches of the
shipped models' sample requests, interleaved in one process, one thread each; figures are medians of
processor time, which depends least on what else runs on the machine. `--grid` adds models with
random weights in sizes of industry. With `--write` all goes to benchmarks/results/int8.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from server_load.processes import machine

import gr_hstu
from gr_core import Task
from gr_core.collate import collate
from gr_core.contracts import Artifact, EncodedRequest, Engine, EngineOptions, ExportOptions
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.samples import for_task, sample_requests
from gr_core.steps import PAST_KEYS, PAST_VALUES
from gr_hstu.config import HSTUConfig
from gr_hstu.engine import TorchEngine
from gr_hstu.model import HSTUModel
from gr_hstu.models import build_model
from gr_hstu.testing import FULL, FULL_SCHEMA, load
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.export.exporter import OnnxExporter
from gr_trt.onnx_runtime.engine import OnnxRuntimeEngine
from gr_trt.quantization import QuantizationOptions, quantize_ensemble

RESULTS = Path(__file__).parent / "results" / "int8.md"
BUNDLES = Path(gr_hstu.__file__).parent / "bundles"
SHIPPED = (("kuairand-retrieval", Task.RETRIEVE), ("kuairand-ranking", Task.RANK))
BATCHES = (1, 8, 32)
LAYERS, HEADS, ITEMS = 4, 4, 50_000
GRID = (
    (256, 256, 64),
    (256, 256, 256),
    (256, 512, 256),
    (256, 1024, 256),
    (256, 2048, 256),
    (512, 2048, 256),
)
"""Width, length of the history, candidates."""
K = 10
CHOICES: tuple[dict[str, Any], ...] = (
    {"activations": "int8"},
    {"quantize_embeddings": False},
    {"quantize_top_k": True},
)
WARM_S = 0.05
"""What is quicker is repeated until it takes so long."""
ANY_QUALITY: dict[str, Any] = {"max_error": 1.0, "min_overlap": 0.0, "max_loss": 1.0}
"""Random weights answer at random."""
CHILD = """
import json, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options)
feeds = dict(np.load(sys.argv[2]))
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmRSS")).split()[1]) / 1024
loaded = resident()
session.run(None, feeds)
print(json.dumps([loaded, resident()]))
"""
"""A process that holds one graph and nothing else, and its resident memory in MiB."""

Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--grid", action="store_true", help="random models of larger sizes too")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# int8 in ONNX Runtime",
        "",
        f"`{shlex.join(['python', 'benchmarks/int8.py', *sys.argv[1:]])}`; "
        + ", ".join(f"{name} {value}" for name, value in machine("torch", "onnxruntime").items())
        + f". One thread; milliseconds of processor time, medians of {arguments.rounds} "
        "interleaved rounds. float32 and int8 are the engine `onnxruntime`, torch is eager.",
    ]
    with tempfile.TemporaryDirectory(prefix="gr-int8-") as folder:
        for part in (shipped(Path(folder), arguments), grid(Path(folder), arguments)):
            for line in part:
                lines.append(line)
                print(line, flush=True)
    if arguments.write:
        RESULTS.write_text("\n".join(lines) + "\n")


# ── Shipped models ────────────────────────────────────────────────────────────────────────────


def shipped(folder: Path, arguments: argparse.Namespace) -> Iterator[str]:
    models = [(load(Bundle.open(BUNDLES / name / "1")), task) for name, task in SHIPPED]
    made = [export(model, folder / model.bundle.name) for model, _ in models]
    yield from ["", "## Quality", ""]
    yield "| model | requests | same top 10 | metric | float32 | int8 | standard error |"
    yield "|---|---|---|---|---|---|---|"
    for (model, task), (_, int8) in zip(models, made, strict=True):
        facts = Ensemble.read(int8).notes["int8"]["quality"][task.value]
        for metric, before in facts["float32"].items():
            noise = facts["standard_error"].get(metric)
            yield (
                f"| {model.bundle.name} | {facts['requests']} | {facts['overlap']:.1%} | {metric} "
                f"| {before:.4f} | {facts['int8'][metric]:.4f} | "
                f"{'' if noise is None else format(noise, '.4f')} |"
            )
    yield from ["", "## Shipped models, engines", ""]
    yield "| model | batch | torch | float32 | int8 | torch / int8 | float32 / int8 |"
    yield "|---|---|---|---|---|---|---|"
    for (model, task), (before, int8) in zip(models, made, strict=True):
        engines = {
            "torch": loaded(TorchEngine(), "torch", model.bundle.path, model, task, "float32"),
            "float32": loaded(OnnxRuntimeEngine(), "onnx", before, model, task, "float32"),
            "int8": loaded(OnnxRuntimeEngine(), "onnx", int8, model, task, "int8"),
        }
        requests = encoded(model, task, max(BATCHES))
        for size in BATCHES:
            found = race(answering(engines, requests[:size]), arguments.rounds)
            yield f"| {model.bundle.name} | {size} | {timed(found)} |"
        for engine in engines.values():
            engine.close()
    yield from ["", "## Shipped models, graphs", ""]
    yield "| model | graph | batch | float32 | int8 | float32 / int8 |"
    yield "|---|---|---|---|---|---|"
    for (model, task), folders in zip(models, made, strict=True):
        for role in (Role.SINGLE_PASS, Role.PREFILL, Role.DECODE):
            for size in BATCHES:
                found = race(graph_runs(folders, role, model, task, size), arguments.rounds)
                cells = f"{found['float32']:.2f} | {found['int8']:.2f}"
                ratio = found["float32"] / found["int8"]
                yield f"| {model.bundle.name} | {role.value} | {size} | {cells} | {ratio:.2f} |"
    yield from ["", "## Other choices", ""]
    yield "Engines in batches of 32, against float32 in the same rounds."
    yield from ["", "| model | option | same top 10 | float32 / int8 |", "|---|---|---|---|"]
    for (model, task), (before, int8) in zip(models, made, strict=True):
        yield from other_choices(folder / "others", model, task, before, int8, arguments.rounds)
    yield from ["", "## Shipped models, where the time goes", ""]
    yield "Milliseconds of the operators of the graph that serves, in batches of 32."
    for (model, task), folders in zip(models, made, strict=True):
        profiles = [profile(folder, model, task) for folder in folders]
        yield from [
            "",
            f"### {model.bundle.name}",
            "",
            "| operator | float32 | int8 |",
            "|---|---|---|",
        ]
        names = sorted(set().union(*profiles), key=lambda n: -max(p[n] for p in profiles))
        for name in names[:14]:
            yield f"| {name} | {profiles[0][name]:.2f} | {profiles[1][name]:.2f} |"
        rest = [sum(p[name] for name in names[14:]) for p in profiles]
        totals = [sum(p.values()) for p in profiles]
        yield f"| {len(names[14:])} others | {rest[0]:.2f} | {rest[1]:.2f} |"
        yield f"| all | {totals[0]:.2f} | {totals[1]:.2f} |"
    yield from ["", "## Memory", ""]
    yield "MiB resident of a process that runs one graph in ONNX Runtime once, and of its file."
    yield from ["", "| model | request | float32 | int8 | file, float32 | file, int8 |"]
    yield "|---|---|---|---|---|---|"
    for (model, task), folders in zip(models, made, strict=True):
        arrays = collate(model.inputs(task), encoded(model, task, 32))
        yield memory_row(model, task, folders, arrays, "batch of 32")


def export(model: HSTUModel, folder: Path) -> tuple[Path, Path]:
    """Folders of the graphs in float32 and in int8."""
    before, after = folder / "float32", folder / "int8"
    for out in (before, after):
        out.mkdir(parents=True)
    OnnxExporter().export(Artifact("torch", model.bundle.path), model, before, ExportOptions())
    quantize_ensemble(before, after, model, QuantizationOptions())
    return before, after


def loaded(
    engine: Engine, kind: str, path: Path, model: HSTUModel, task: Task, dtype: str
) -> Engine:
    engine.load(Artifact(kind, path), model, [task], EngineOptions(dtype=dtype, threads=1))
    return engine


def encoded(model: HSTUModel, task: Task, count: int) -> list[EncodedRequest]:
    return [
        replace(model.encode(for_task(request, task), task).request, k=K)
        for request in sample_requests(model, count)
    ]


def other_choices(
    folder: Path, model: HSTUModel, task: Task, before: Path, int8: Path, rounds: int
) -> Iterator[str]:
    folders = {"none": int8}
    for choice in CHOICES:
        words = ", ".join(f"{name}={json.dumps(value)}" for name, value in choice.items())
        folders[words] = folder / model.bundle.name / str(len(folders))
        folders[words].mkdir(parents=True)
        options = QuantizationOptions(**{**ANY_QUALITY, **choice})
        quantize_ensemble(before, folders[words], model, options)
    engines = {
        words: loaded(OnnxRuntimeEngine(), "onnx", path, model, task, "int8")
        for words, path in folders.items()
    }
    engines["float32"] = loaded(OnnxRuntimeEngine(), "onnx", before, model, task, "float32")
    found = race(answering(engines, encoded(model, task, 32)), rounds)
    for words, path in folders.items():
        overlap = Ensemble.read(path).notes["int8"]["quality"][task.value]["overlap"]
        ratio = found["float32"] / found[words]
        yield f"| {model.bundle.name} | {words} | {overlap:.1%} | {ratio:.2f} |"
    for engine in engines.values():
        engine.close()


def graph_runs(
    folders: Sequence[Path], role: Role, model: HSTUModel, task: Task, size: int
) -> dict[str, Run]:
    """One graph of both folders on the same arrays, without the engine around it."""
    import onnxruntime as ort

    runs: dict[str, Run] = {}
    for name, folder in zip(("float32", "int8"), folders, strict=True):
        graph = Ensemble.read(folder).graph(role, task)
        assert graph is not None
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(folder / graph.file), options)
        runs[name] = partial(session.run, None, arrays_of(graph, model, task, size))
    return runs


def arrays_of(graph: Graph, model: HSTUModel, task: Task, size: int) -> dict[str, Any]:
    """Inputs of a graph for a batch of whole histories, nothing of them cached."""
    requests = encoded(model, task, size)
    rows = []
    for request in requests:
        arrays = dict(request.arrays)
        if graph.role is not Role.SINGLE_PASS:
            arrays = dict(model.step_arrays(request, model.sequence(request), 0))
        for tensor in graph.inputs:
            if tensor.name in (PAST_KEYS, PAST_VALUES):
                sizes = [axis if isinstance(axis, int) else 0 for axis in tensor.axes]
                arrays[tensor.name] = np.zeros(sizes, np.float32)
        rows.append(EncodedRequest(task, arrays, 0))
    return collate([tensor.spec for tensor in graph.inputs], rows)


# ── The grid ──────────────────────────────────────────────────────────────────────────────────


def grid(folder: Path, arguments: argparse.Namespace) -> Iterator[str]:
    if not arguments.grid:
        return
    yield from ["", "## Random models", ""]
    yield (
        f"{LAYERS} layers of the ranking variant, {HEADS} heads, {ITEMS} items, one user in a "
        "single pass. Error: largest difference to torch, of the largest score."
    )
    yield ""
    sizes = "width / history / candidates"
    yield f"| {sizes} | error | torch | float32 | int8 | torch / int8 | float32 / int8 |"
    yield "|---|---|---|---|---|---|---|"
    memory = []
    for width in sorted({width for width, _, _ in GRID}):
        points = [(n, c) for w, n, c in GRID if w == width]
        model = random_model(folder, width, max(n for n, _ in points))
        folders = export_single_pass(model, folder / f"graphs-{width}")
        engines = [
            loaded(OnnxRuntimeEngine(), "onnx", path, model, Task.RANK, dtype)
            for path, dtype in zip(folders, ("float32", "int8"), strict=True)
        ]
        eager = loaded(TorchEngine(), "torch", model.bundle.path, model, Task.RANK, "float32")
        for history, candidates in points:
            request = made_up(model, history, candidates)
            sides = {"torch": eager, "float32": engines[0], "int8": engines[1]}
            answers = {name: engine.infer([request])[0].scores for name, engine in sides.items()}
            right = answers["torch"]
            error = float(np.abs(answers["int8"] - right).max() / np.abs(right).max())
            found = race(answering(sides, [request]), max(3, arguments.rounds // 2))
            yield f"| {width} / {history} / {candidates} | {error:.3f} | {timed(found)} |"
        for engine in (*engines, eager):
            engine.close()
        history, candidates = points[-1]
        arrays = collate(model.inputs(Task.RANK), [made_up(model, history, candidates)])
        memory.append(memory_row(model, Task.RANK, folders, arrays, f"{history} / {candidates}"))
        model.close()
    yield from ["", "## Memory of random models", ""]
    yield "| model | request | float32 | int8 | file, float32 | file, int8 |"
    yield "|---|---|---|---|---|---|"
    yield from memory


def random_model(folder: Path, width: int, history: int) -> HSTUModel:
    config = HSTUConfig(
        variant="ranking",
        num_items=ITEMS,
        d_model=width,
        num_layers=LAYERS,
        num_heads=HEADS,
        d_qk=width // HEADS,
        d_v=width // HEADS,
        max_seq_len=history + 16,
        mlp_dim=512,
        **FULL,
    )
    schema = dataclasses.replace(FULL_SCHEMA, max_history=history)
    torch.manual_seed(0)
    weights = build_model(config).state_dict()
    bundle = write_bundle(
        folder / f"hstu-{LAYERS}x{width}" / "1",
        name=f"hstu-{LAYERS}x{width}",
        version="1",
        architecture="hstu",
        tasks=[Task.RANK],
        config=config.to_dict(),
        features=schema.to_dict(),
        catalogue=Catalogue(range(1, ITEMS + 1)),
        weights=lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path),
    )
    return load(bundle)


def export_single_pass(model: HSTUModel, folder: Path) -> tuple[Path, Path]:
    """As `export`, of what the grid runs."""
    before, after = folder / "float32", folder / "int8"
    for out in (before, after):
        out.mkdir(parents=True)
    OnnxExporter().export(Artifact("torch", model.bundle.path), model, before, ExportOptions())
    ensemble = Ensemble.read(before)
    single = tuple(graph for graph in ensemble.graphs if graph.role is Role.SINGLE_PASS)
    replace(ensemble, graphs=single).write(before)
    options = QuantizationOptions(calibration_requests=8, **ANY_QUALITY)
    quantize_ensemble(before, after, model, options)
    return before, after


def made_up(model: HSTUModel, history: int, candidates: int) -> EncodedRequest:
    (request,) = sample_requests(model, 4, max_history=history, candidates=candidates)[2:3]
    found = model.encode(for_task(request, Task.RANK), Task.RANK).request
    assert len(found.arrays["candidate_items"]) == candidates
    return found


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────


def race(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of each, medians of interleaved rounds."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(WARM_S / max(seconds(run, 1), 1e-5)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run, repeats[name]))
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def answering(engines: Mapping[str, Engine], batch: Sequence[EncodedRequest]) -> dict[str, Run]:
    return {name: partial(engine.infer, batch) for name, engine in engines.items()}


def seconds(run: Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def timed(found: Mapping[str, float]) -> str:
    ratios = (found[name] / found["int8"] for name in ("torch", "float32"))
    return " | ".join(
        [*(f"{found[name]:.2f}" for name in ("torch", "float32", "int8"))]
        + [f"{ratio:.2f}" for ratio in ratios]
    )


def profile(folder: Path, model: HSTUModel, task: Task) -> Counter[str]:
    """Milliseconds by operator of the decode graph, for 32 whole histories."""
    import onnxruntime as ort

    graph = Ensemble.read(folder).graph(Role.DECODE, task)
    assert graph is not None
    feeds = arrays_of(graph, model, task, 32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = ort.InferenceSession(str(folder / graph.file), options)
        runs = 40
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += event["dur"] / 1e3 / runs
    return found


def memory_row(
    model: HSTUModel, task: Task, folders: Sequence[Path], arrays: Mapping[str, Any], words: str
) -> str:
    resident, sizes = [], []
    for folder in folders:
        graph = Ensemble.read(folder).graph(Role.SINGLE_PASS, task)
        assert graph is not None
        feeds = folder / "feeds.npz"
        np.savez(feeds, **{tensor.name: arrays[tensor.name] for tensor in graph.inputs})
        command = [sys.executable, "-c", CHILD, str(folder / graph.file), str(feeds)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        resident.append(json.loads(out)[1])
        weights = folder / "weights.bin"
        beside = weights.stat().st_size if weights.exists() else 0
        sizes.append(((folder / graph.file).stat().st_size + beside) / 2**20)
    cells = [f"{value:.0f}" for value in resident] + [f"{size:.1f}" for size in sizes]
    return f"| {model.bundle.name} | {words} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
