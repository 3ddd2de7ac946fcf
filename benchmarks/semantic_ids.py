"""Semantic ids through the engines that serve: what is found in the test histories, and how fast.

    python benchmarks/semantic_ids.py BUNDLE --data-dir DIR [--cases 4533]

BUNDLE is what `gr hstu train --data amazon-industrial-sid --task generation` wrote, DIR the folder
that it read. Every test case is asked of deployments of the engines vllm and torch, 32 at once, as
requests without time limit; items of the history are left out as in docs/quality.md. Every answer
must be items of the catalogue, none twice.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gr_core import History, RecommendRequest, Task
from gr_core.batcher import BatchingOptions
from gr_core.contracts import EncodedRequest
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.plugins.host import PluginHost
from gr_core.repository import Bundle
from gr_hstu.data.amazon import TARGET, read
from gr_hstu.evaluation.protocols import held_out_users

CALLERS, K, BEHAVIOURS = 32, 10, 10
NOW_MS = 1_700_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=0, help="0: all")
    parser.add_argument("--engines", nargs="*", default=["vllm", "torch"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.open(arguments.bundle)
    environment = Environment(
        PluginHost.discover().registry, batching=BatchingOptions(max_queue=4 * CALLERS)
    )
    print("| engine | cases | HR@10 | NDCG@10 | requests/s | same items as the first engine |")
    print("|---|---|---|---|---|---|")
    first: list[list[int]] = []
    for engine in arguments.engines:
        spec = ModelSpec(bundle.name, strategy=engine, threads=1)
        deployment = Deployment.load(bundle, spec, environment)
        try:
            requests, targets, seen = cases(deployment, arguments.data_dir, arguments.cases)
            started = time.perf_counter()
            answers = asyncio.run(asked(deployment, requests))
            rate = len(requests) / (time.perf_counter() - started)
        finally:
            deployment.close()
        found = [
            [item for item in answer if item not in old][:K]
            for answer, old in zip(answers, seen, strict=True)
        ]
        first = first or found
        same = np.mean([a == b for a, b in zip(found, first, strict=True)])
        ranks = [
            answer.index(target) if target in answer else K
            for answer, target in zip(found, targets, strict=True)
        ]
        hits = np.array([rank < K for rank in ranks])
        gains = np.where(hits, 1 / np.log2(np.array(ranks) + 2), 0.0)
        print(
            f"| {engine} | {len(requests)} | {hits.mean():.4f} | {gains.mean():.4f} | {rate:.0f} "
            f"| {100 * same:.1f} % |",
            flush=True,
        )


def cases(
    deployment: Deployment, folder: Path, count: int
) -> tuple[list[EncodedRequest], list[int], list[set[int]]]:
    """Requests, what is to be found, and what may not be found; the items as catalogue indices."""
    data = read(folder)
    model = deployment.model
    chosen = held_out_users(data, "part", TARGET, BEHAVIOURS).test
    requests, targets, seen = [], [], []
    ids = np.array([0, *(int(i) for i in data.items.ids)])
    rows = zip(chosen.row_C, chosen.start_C, chosen.end_C, strict=True)
    for target, start, stop in list(rows)[: count or None]:
        items = ids[data.item_N[start:stop]]
        times = data.timestamp_ms_N[start:stop]
        request = RecommendRequest(History(items, times), request_time_ms=NOW_MS)
        old = set(model.catalogue.indices_of(items).tolist())
        encoded = model.encode(request, Task.GENERATE).request
        requests.append(replace(encoded, k=K + len(old)))
        targets.append(int(model.catalogue.indices_of(ids[[data.item_N[target]]])[0]))
        # As the evaluator has it: what is bought again may be found again.
        seen.append(old - {targets[-1]})
    return requests, targets, seen


async def asked(deployment: Deployment, requests: list[EncodedRequest]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    numbers = iter(range(len(requests)))

    async def caller() -> None:
        for number in numbers:
            batched = await deployment.infer(Task.GENERATE, requests[number], None)
            items = batched.result.indices
            assert items is not None
            answers[number] = items.tolist()
            assert len(set(answers[number])) == len(answers[number]), "an item occurs twice"
            assert items.min() > 0, "no item"
            assert items.max() <= len(deployment.model.catalogue), "no item"

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return answers


if __name__ == "__main__":
    main()
