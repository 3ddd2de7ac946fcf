"""What a precision does to the answers: each engine's top ten against torch in float32.

    python benchmarks/precision.py --data KUAIRAND-PURE [--users 1000]

For users of KuaiRand-Pure with their whole histories, in the shipped models: retrieval from the
whole catalogue, and ranking of 64 random candidates. Needs the data set; prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gr_core import Candidates, History, RecommendRequest, Task
from gr_core.contracts import EncodedRequest, InferenceResult, Model
from gr_core.engines import Only, RunningEngine, feasible_plans, running
from gr_core.parity import reference_plan
from gr_core.plugins.host import PluginHost
from gr_core.repository import Bundle
from gr_hstu.data import kuairand
from gr_hstu.data.interactions import Interactions

BUNDLES = Path(kuairand.__file__).parents[1] / "bundles"
MODELS = (("kuairand-retrieval", Task.RETRIEVE), ("kuairand-ranking", Task.RANK))
K = 10
CANDIDATES = 64
HOUR_MS = 3_600_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of KuaiRand-Pure")
    parser.add_argument("--users", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = kuairand.read(arguments.data)
    registry = PluginHost.discover().registry
    print(f"| model | engine | same {K} | same {K} in the same order | largest error |")
    print("|---|---|---|---|---|")
    for name, task in MODELS:
        bundle = Bundle.open(BUNDLES / name / "1")
        model: Model = registry.models[bundle.architecture].resolve()(bundle)
        requests = [encoded(model, task, r) for r in requests_of(data, model, arguments.users)]
        with ExitStack() as stack:
            reference = stack.enter_context(
                running(reference_plan(registry, bundle.architecture, task), model)
            )
            plans = feasible_plans(registry, bundle.architecture, task, Only(device="cpu"))
            engines = [stack.enter_context(running(plan, model)) for plan in plans]
            right = [answer(reference, request) for request in requests]
            for engine in engines:
                print_row(name, engine, model, requests, right)
        model.close()


def requests_of(data: Interactions, model: Model, count: int) -> Iterator[RecommendRequest]:
    """Users in random order, an hour after their last behaviour, with candidates to rank."""
    random = np.random.default_rng(0)
    ends = np.flatnonzero(np.diff(data.user_N, append=-1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    item_ids = np.array(data.items.ids).astype(np.int64)
    for user in random.permutation(len(ends))[:count]:
        rows = slice(starts[user], ends[user])
        number = data.user_N[rows.start] - 1
        candidates = random.choice(len(model.catalogue), CANDIDATES, replace=False) + 1
        yield RecommendRequest(
            History(
                item_ids[data.item_N[rows] - 1],
                data.timestamp_ms_N[rows],
                {name: column[rows] for name, column in data.signals.items()},
            ),
            user_features={
                name: column[number].item() for name, column in data.users.features.items()
            },
            request_time_ms=int(data.timestamp_ms_N[rows.stop - 1]) + HOUR_MS,
            candidates=Candidates(model.catalogue.ids_of(candidates)),
        )


def encoded(model: Model, task: Task, request: RecommendRequest) -> EncodedRequest:
    return replace(model.encode(request, task).request, k=K if task is Task.RETRIEVE else 0)


def answer(engine: RunningEngine, request: EncodedRequest) -> InferenceResult:
    (result,) = engine.infer([request])
    return result


def top(model: Model, task: Task, result: InferenceResult) -> list[int]:
    if result.indices is not None:
        return [int(index) for index in result.indices]
    scores, _ = model.decode(task, result, {})
    return [int(place) for place in np.argsort(-scores, kind="stable")[:K]]


def print_row(
    name: str,
    engine: RunningEngine,
    model: Model,
    requests: list[EncodedRequest],
    right: list[InferenceResult],
) -> None:
    same = ordered = 0
    largest = 0.0
    for request, expected in zip(requests, right, strict=True):
        found = answer(engine, request)
        ours, theirs = (top(model, request.task, r) for r in (found, expected))
        same += set(ours) == set(theirs)
        ordered += ours == theirs
        scale = float(np.abs(expected.scores).max())
        largest = max(largest, float(np.abs(found.scores - expected.scores).max()) / scale)
    count = len(requests)
    print(
        f"| {name} | {engine.label} | {same / count:.1%} | {ordered / count:.1%} | {largest:.2g} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
