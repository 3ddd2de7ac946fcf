"""The engine vllm beside torch and native: requests a second, latency, prefix caching.

    python benchmarks/vllm_engine.py [--rounds 5] [--write]

Needs gr-vllm[cpu]. A retrieval model of random weights (4 layers, d 128, 512 behaviours, 5,000
items) is asked in two ways, and one that generates in a third.

In process: 64 users at once, straight to vLLM's LLM in one process, with and without prefix
caching. Of each user's 512 tokens 448 were seen before; the last 64 are new in every round.

Generation: semantic ids of 3 codes by beam search (width 20), for histories of 50 behaviours and a
catalogue of the same size, beside the engine torch, a plain beam search in PyTorch.

Behind the queue: callers in a closed loop ask deployments, each its next request when the last is
answered. Returning users have 448 of 512 tokens seen before, new users none. All sides run in one
process, take turns in every round, and have one thread to compute with; vLLM's processes are its
own. Parity comes first: a side whose answers are not those of torch in float32 is not measured.
With `--write` the tables go to benchmarks/results/vllm.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gr_core import History, RecommendRequest, Task
from gr_core.batcher import BatchingOptions
from gr_core.caches import open_caches
from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.parity import retrieval_error
from gr_core.plugins.host import PluginHost
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_hstu.config import HSTUConfig, SemanticIdConfig
from gr_hstu.features import FeatureSchema
from gr_hstu.models import build_model
from gr_hstu.models.semantic_ids import HSTUSemanticIds

RESULTS = Path(__file__).parent / "results"
ITEMS, TOKENS, SEEN, USERS, K = 5000, 512, 448, 64, 10
BEHAVIOURS = 50
CALLERS = (1, 8, 64, 256)
TOLERANCE = 1e-4
NOW_MS = 1_700_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, nargs="*", default=list(CALLERS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of a side, load and round")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# The engine vllm on a CPU",
        "",
        f"`python benchmarks/vllm_engine.py --rounds {arguments.rounds} "
        f"--seconds {arguments.seconds:g}` on {machine()}.",
        "",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GR_CACHE_DIR"] = f"{scratch}/cache"
        bundle = write_model(Path(scratch))
        generates = write_generative(Path(scratch))
        for part in (
            in_process(bundle, arguments.rounds),
            behind_the_queue(bundle, arguments),
            generation(generates, arguments),
        ):
            for line in part:
                print(line, flush=True)
                lines.append(line)
    if arguments.write:
        (RESULTS / "vllm.md").write_text("\n".join(lines) + "\n")


def write_model(folder: Path) -> Bundle:
    config = HSTUConfig(
        variant="research",
        num_items=ITEMS,
        d_model=128,
        num_layers=4,
        num_heads=4,
        d_qk=32,
        d_v=32,
        max_seq_len=TOKENS,
        relative_bias=False,
    )
    torch.manual_seed(0)
    module = build_model(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        module.get_parameter("items.weight")[0] = 0.0
    ids = list(range(1, ITEMS + 1))
    return write_bundle(
        folder / "repository" / "hstu-4x128" / "1",
        name="hstu-4x128",
        version="1",
        architecture="hstu",
        tasks=[Task.RETRIEVE],
        config=config.to_dict(),
        features=FeatureSchema(max_history=TOKENS).to_dict(),
        catalogue=Catalogue(ids, [""] * len(ids)),
        weights=lambda path: save_file(module.state_dict(), path),
    )


def write_generative(folder: Path) -> Bundle:
    config = SemanticIdConfig(
        num_items=ITEMS,
        code_sizes=(256, 256, 256),
        max_behaviours=BEHAVIOURS,
        d_model=128,
        num_layers=4,
        num_heads=4,
        d_qk=32,
        d_v=32,
    )
    torch.manual_seed(0)
    module = HSTUSemanticIds(config)
    codes = np.random.default_rng(0).integers(0, 256, (ITEMS + 1, 3)).astype(np.int32)
    # As in real ones, the first codes are few and shared.
    codes[:, 0] //= 8
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        module.item_codes.copy_(torch.from_numpy(codes))
    ids = list(range(1, ITEMS + 1))
    return write_bundle(
        folder / "repository" / "sid-4x128" / "1",
        name="sid-4x128",
        version="1",
        architecture="hstu-sid",
        tasks=[Task.GENERATE],
        config=config.to_dict(),
        features=FeatureSchema(max_history=BEHAVIOURS, truncate_step=1).to_dict(),
        catalogue=Catalogue(ids, [""] * len(ids)),
        weights=lambda path: save_file(module.state_dict(), path),
    )


class Users:
    """Makes requests: of users who return with 64 new behaviours, or of new ones."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model = model
        self._rng = np.random.default_rng(seed)
        self._seen = [self._items(SEEN) for _ in range(USERS)]
        self._turn = 0

    def _items(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._rng.integers(1, ITEMS + 1, count)

    def _encoded(self, items: np.ndarray[Any, np.dtype[np.int64]]) -> EncodedRequest:
        times = NOW_MS - 60_000 * np.arange(len(items), 0, -1, dtype=np.int64)
        request = RecommendRequest(History(items, times), k=K, request_time_ms=NOW_MS)
        (task,) = self._model.tasks
        return replace(self._model.encode(request, task).request, k=K)

    def earlier(self) -> list[EncodedRequest]:
        """What was seen of all users before."""
        return [self._encoded(items) for items in self._seen]

    def history(self, length: int) -> EncodedRequest:
        return self._encoded(self._items(length))

    def request(self, *, returning: bool) -> EncodedRequest:
        if not returning:
            return self._encoded(self._items(TOKENS))
        self._turn += 1
        seen = self._seen[self._turn % USERS]
        return self._encoded(np.concatenate([seen, self._items(TOKENS - SEEN)]))


# ── In process ────────────────────────────────────────────────────────────────────────────────


def in_process(bundle: Bundle, rounds: int) -> Iterator[str]:
    yield from (
        "## in-process",
        "",
        f"{USERS} requests of {TOKENS} tokens, {SEEN} of them seen before, at once.",
        "",
        "| side | requests/s | ms a request | times without | error |",
        "|---|---|---|---|---|",
    )
    found = {}
    for caching in (False, True):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            found[caching] = pool.apply(one_llm, (str(bundle.path), caching, rounds))
    plain = found[False][0]
    for caching, (seconds, error) in found.items():
        name = "prefix caching" if caching else "no prefix caching"
        rate = USERS / seconds
        yield (
            f"| vllm, {name} | {rate:.0f} | {1e3 * seconds / USERS:.2f} | "
            f"{plain / seconds:.2f} | {error:.1e} |"
        )
    yield ""


def one_llm(path: str, caching: bool, rounds: int) -> tuple[float, float]:
    """Median seconds of 64 requests at once, and the largest error."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from gr_core.contracts import Artifact, EngineOptions, ExportOptions
    from gr_hstu.engine import TorchEngine
    from gr_hstu.model import load_hstu
    from gr_vllm.checkpoint import Checkpoint
    from gr_vllm.export.exporter import VllmExporter
    from gr_vllm.prompts import Prompts

    bundle = Bundle.open(Path(path))
    model = load_hstu(bundle)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact("torch", bundle.path)
        VllmExporter().export(artifact, model, Path(folder), ExportOptions("cpu", "float32", {}))
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            block_size=32,
            max_model_len=TOKENS + 1,
            max_num_seqs=USERS,
            kv_cache_memory_bytes=2**30,
            enable_prefix_caching=caching,
            max_logprobs=-1,
            logprobs_mode="processed_logits",
            use_tqdm_on_load=False,
        )
        prompts = Prompts(Checkpoint.read(Path(folder)), model)
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=K,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    users = Users(model, 0)

    def ask(requests: Sequence[EncodedRequest]) -> Any:
        made = [prompts.prompt(request, model.sequence(request)) for request in requests]
        return llm.generate(made, params, use_tqdm=False)

    ask(users.earlier())
    reference = TorchEngine()
    reference.load(artifact, model, [Task.RETRIEVE], EngineOptions(threads=1))
    seconds, worst = [], 0.0
    for number in range(rounds + 1):
        requests = [users.request(returning=True) for _ in range(USERS)]
        started = time.perf_counter()
        outputs = ask(requests)
        if number:  # the first warms up
            seconds.append(time.perf_counter() - started)
            continue
        for request, output in zip(requests, outputs, strict=True):
            flat = output.outputs[0].logprobs
            worst = max(worst, error(reference.infer([deep(request)])[0], flat_result(flat)))
    return statistics.median(seconds), worst


def flat_result(flat: Any) -> InferenceResult:
    return InferenceResult(np.array(flat.logprobs[1:], np.float32), np.array(flat.token_ids[1:]))


def deep(request: EncodedRequest) -> EncodedRequest:
    return replace(request, k=10 * K)


def error(right: InferenceResult, found: InferenceResult) -> float:
    assert found.indices is not None
    assert right.indices is not None
    worst: float = retrieval_error(found.indices, found.scores, right.indices, right.scores, K)[0]
    return worst


# ── Behind the queue ──────────────────────────────────────────────────────────────────────────


@dataclass
class Side:
    name: str
    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    users: Users | None = None
    deployment: Deployment | None = None


SIDES = (
    ("vllm", "vllm", {}),
    ("vllm, no prefix caching", "vllm", {"prefix_caching": False}),
    ("native", "native", {}),
    ("torch", "torch", {}),
)


def behind_the_queue(bundle: Bundle, arguments: argparse.Namespace) -> Iterator[str]:
    registry = PluginHost.discover().registry
    environment = Environment(
        registry,
        batching=BatchingOptions(max_queue=1024, max_batch_size=64),
        caches=open_caches({}, registry),
    )
    sides = []
    for name, strategy, options in SIDES:
        if strategy not in registry.engines:
            continue
        side = Side(name, strategy, options)
        spec = ModelSpec(bundle.name, strategy=strategy, threads=1, options=options)
        side.deployment = Deployment.load(bundle, spec, environment)
        side.users = Users(side.deployment.model, 1)
        sides.append(side)
    try:
        yield from asyncio.run(measured(sides, arguments))
    finally:
        for side in sides:
            if side.deployment is not None:
                side.deployment.close()


async def measured(sides: Sequence[Side], arguments: argparse.Namespace) -> Sequence[str]:
    errors = await parity(sides)
    good = [side for side in sides if errors[side.name] <= TOLERANCE]
    lines = []
    for returning in (True, False):
        kind = "returning" if returning else "new"
        lines += [
            f"## {kind}-users",
            "",
            "| side | error | "
            + " | ".join(f"{c} callers: /s, p50, p99 ms" for c in arguments.callers)
            + " |",
            "|---|---|" + "---|" * len(arguments.callers),
        ]
        cells: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
        for side in good:
            await load(side, USERS, iter(side.users.earlier()), 0.0)
        for number in range(arguments.rounds):
            for callers in arguments.callers:
                for turn in range(len(good)):
                    side = good[(turn + number) % len(good)]
                    made = endless(side.users, returning)
                    found = await load(side, callers, made, arguments.seconds)
                    cells.setdefault((side.name, callers), []).append(found)
        for side in sides:
            shown = [
                cell(cells[side.name, callers]) if side in good else "wrong"
                for callers in arguments.callers
            ]
            lines.append(f"| {side.name} | {errors[side.name]:.1e} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def cell(rounds: Sequence[tuple[float, list[float]]]) -> str:
    rate = statistics.median(rate for rate, _ in rounds)
    seconds = [s for _, every in rounds for s in every]
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return f"{rate:.0f}, {1e3 * p50:.1f}, {1e3 * p99:.1f}"


def endless(users: Any, returning: bool) -> Iterator[EncodedRequest]:
    while True:
        yield users.request(returning=returning)


async def load(
    side: Side, callers: int, requests: Iterator[EncodedRequest], seconds: float
) -> tuple[float, list[float]]:
    """Requests a second, and the seconds of each; until the time is up or there are no more."""
    found: list[float] = []
    until = time.perf_counter() + (seconds or float("inf"))
    assert side.deployment is not None
    deployment = side.deployment

    async def caller() -> None:
        while time.perf_counter() < until:
            request = next(requests, None)
            if request is None:
                return
            asked = time.perf_counter()
            await deployment.infer(request.task, request, None)
            found.append(time.perf_counter() - asked)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(found) / (time.perf_counter() - started), found


async def parity(sides: Sequence[Side]) -> dict[str, float]:
    """Largest error of each side on 16 requests, new ones and returning ones, twice."""
    reference = next(side for side in sides if side.strategy == "torch")
    assert reference.users is not None
    requests = [reference.users.request(returning=i % 2 == 0) for i in range(16)]
    assert reference.deployment is not None
    right = [await reference.deployment.infer(Task.RETRIEVE, deep(r), None) for r in requests]
    worst = {}
    for side in sides:
        assert side.deployment is not None
        worst[side.name] = 0.0
        for _ in range(2):
            answers = await asyncio.gather(
                *(side.deployment.infer(Task.RETRIEVE, r, None) for r in requests)
            )
            for expected, found in zip(right, answers, strict=True):
                worst[side.name] = max(worst[side.name], error(expected.result, found.result))
    return worst


# ── Generation ────────────────────────────────────────────────────────────────────────────────


def generation(bundle: Bundle, arguments: argparse.Namespace) -> Iterator[str]:
    registry = PluginHost.discover().registry
    environment = Environment(registry, batching=BatchingOptions(max_queue=1024))
    sides = []
    for name in ("vllm", "torch"):
        side = Side(name, name)
        spec = ModelSpec(bundle.name, strategy=name, threads=1)
        side.deployment = Deployment.load(bundle, spec, environment)
        side.users = Users(side.deployment.model, 2)
        sides.append(side)
    try:
        yield from asyncio.run(generated(sides, arguments.rounds, arguments.seconds))
    finally:
        for side in sides:
            if side.deployment is not None:
                side.deployment.close()


async def generated(sides: Sequence[Side], rounds: int, seconds: float) -> Sequence[str]:
    callers = (1, 8, 32)
    vllm, plain = sides
    assert plain.users is not None
    requests = [plain.users.history(length) for length in (0, 1, 10, 50, 50, 50)]
    worst = 0.0
    for request in requests:
        right, found = [await ask(side, request) for side in (plain, vllm)]
        worst = max(worst, float(np.abs(right.scores - found.scores).max()))
    cells: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
    for number in range(rounds):
        for count in callers:
            for turn in range(2):
                side = sides[(turn + number) % 2]
                made = (side.users.history(BEHAVIOURS) for _ in itertools.count())
                cells.setdefault((side.name, count), []).append(
                    await load(side, count, made, seconds)
                )
    lines = [
        "## generation",
        "",
        "| side | error | " + " | ".join(f"{c} callers: /s, p50, p99 ms" for c in callers) + " |",
        "|---|---|" + "---|" * len(callers),
    ]
    for side, error_of_side in zip(sides, (worst, 0.0), strict=True):
        shown = [cell(cells[side.name, count]) for count in callers]
        lines.append(f"| {side.name} | {error_of_side:.1e} | {' | '.join(shown)} |")
    return lines


async def ask(side: Side, request: EncodedRequest) -> InferenceResult:
    assert side.deployment is not None
    return (await side.deployment.infer(request.task, request, None)).result


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cores = len(os.sched_getaffinity(0))
            name = line.partition(":")[2].strip()
            return f"{cores} virtual cores of {name}, torch {torch.__version__}"
    return sys.platform


if __name__ == "__main__":
    main()
