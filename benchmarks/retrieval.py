"""Exact and approximate search of a catalogue: processor time, recall, and building the graph.

    python benchmarks/retrieval.py [--items 10000 100000]

Clustered random vectors of 64 numbers, one core. Needs faiss (`pip install gr-kernels[faiss]`).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gr_kernels.retrieval import ItemIndex, make_index

WIDTH, CLUSTERS, USERS, REPEATS = 64, 200, 64, 10
CASES = ((10, 1), (200, 32))
"""k and users asked for at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| items | k | users | exact ms | hnsw ms | recall | building the graph s |")
    print("|---|---|---|---|---|---|---|")
    for items in parser.parse_args().items:
        centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
        table, users = (vectors(centres, n, generator) for n in (items + 1, USERS))
        exact = make_index(table, "exact", 1)
        started = time.perf_counter()
        graph = make_index(table, "hnsw", 1)
        built = time.perf_counter() - started
        for k, count in CASES:
            _, right = exact.search(users, k)
            _, found = graph.search(users, k)
            recall = np.mean([len({*a} & {*b}) / k for a, b in zip(found, right, strict=True)])
            times = [f"{milliseconds(index, users[:count], k):.2f}" for index in (exact, graph)]
            row = (f"{items:,}", k, count, *times, f"{recall:.3f}", f"{built:.1f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def vectors(centres: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(CLUSTERS, (count,), generator=generator)
    return F.normalize(centres[chosen] + 0.7 * torch.randn(count, WIDTH, generator=generator))


def milliseconds(index: ItemIndex, users: Tensor, k: int) -> float:
    """Median processor time of a search."""
    index.search(users, k)
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        index.search(users, k)
        times.append(time.process_time() - started)
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
