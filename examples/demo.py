"""Real recommendations from a real server: starts `gr serve` with the shipped models, asks it over
gRPC what to show to some users of KuaiRand, prints what it answers, and stops it.

    python examples/demo.py [--users 3] [--k 5] [--config examples/demo.toml]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from gr_core.config import Config
from gr_core.errors import UserError
from gr_core.json_requests import read_requests
from gr_core.pipeline import ServedModel
from gr_core.repository import Catalogue, ModelRepository
from gr_core.samples import SAMPLES
from gr_core.types import History, Recommendation, RecommendRequest
from gr_serve_grpc.client import Client

console = Console(width=None if sys.stdout.isatty() else 110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--config", default=str(Path(__file__).with_name("demo.toml")))
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--k", type=int, default=5, help="items to recommend to each")
    options = parser.parse_args()

    requests, catalogue = samples(options.config)
    assert requests, "the bundle brings no sample requests"
    with server(options.config) as client:
        show_plan(client.list_models())
        for request in requests[: options.users]:
            request = replace(request, k=options.k, model="", task=None, candidates=None)
            started = time.perf_counter()
            answer = client.recommend(request)
            show(request, answer, time.perf_counter() - started, catalogue)
    console.print("The server has stopped cleanly.")
    return 0


def samples(config: str) -> tuple[Sequence[RecommendRequest], Catalogue]:
    """Requests of sample users, and the titles of what they saw."""
    loaded = Config.load(config)
    repository = ModelRepository(loaded.repository.path)
    bundle = repository.bundle(loaded.pipelines[0].retrieve)
    return read_requests(bundle.path / SAMPLES), bundle.catalogue()


@contextmanager
def server(config: str) -> Iterator[Client]:
    """A client of a server of its own, which must start, and end with exit code 0."""
    console.print(f"[bold]$ gr serve --config {Path(config).name}")
    started = time.perf_counter()
    gr = str(Path(sys.executable).with_name("gr"))
    command = [gr, "serve", "--config", config, "--port", "0", "--set", "logging.level=warning"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        announcement = process.stdout.readline().strip()
        if announcement:
            with Client(announcement.removeprefix("serving on ")) as client:
                client.wait_until_ready()
                seconds = time.perf_counter() - started
                console.print(f"{announcement}, ready after {seconds:.1f} s\n")
                yield client
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=30)
    if status or not announcement:
        raise SystemExit(f"gr serve ended with exit code {status}")


def show_plan(models: Sequence[ServedModel]) -> None:
    default = next(model for model in models if model.default)
    plan = table("stage", "model", "plan")
    for version in default.versions:
        for task, chain in version.plan.items():
            if default.stages.get(task) == version.model:
                name = f"{version.model} {version.version}"
                plan.add_row(task.value, name, chain)
    console.print(plan)


def show(
    request: RecommendRequest, answer: Recommendation, seconds: float, catalogue: Catalogue
) -> None:
    watched = table("last behaviours", "when", "signals")
    for title, when, signals in last(request.history, catalogue, 5):
        watched.add_row(title, when, signals)
    heads = list(answer.items[0].head_scores) if answer.items else []
    shown = table("#", "recommended", "score", *heads)
    for place, item in enumerate(answer.items, 1):
        scores = (f"{item.head_scores[head]:.3f}" for head in heads)
        shown.add_row(str(place), item.title or str(item.item_id), f"{item.score:.3f}", *scores)
    user = f"User {request.user_id}, {len(request.history)} behaviours"
    console.rule(f"[bold]{user}", align="left")
    console.print(watched)
    console.print(shown)
    stages = ", ".join(f"{s.task} {1e3 * s.compute_s:.1f} ms" for s in answer.stages)
    console.print(
        f"{1e3 * seconds:.1f} ms at the client, {1e3 * answer.total_s:.1f} ms in the server: "
        f"features {1e3 * answer.features_s:.1f} ms, {stages}\n"
    )


def last(history: History, catalogue: Catalogue, count: int) -> Iterator[tuple[str, str, str]]:
    """Title, time and signals of the newest behaviours, newest first."""
    indices = catalogue.indices_of(history.item_ids).tolist()
    for row in reversed(range(max(0, len(history) - count), len(history))):
        title = catalogue.title(indices[row]) if indices[row] else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(history.timestamps_ms[row] / 1000))
        signals = (
            f"{name} {column[row]:.2g}"
            for name, column in history.signals.items()
            if column[row] > 0
        )
        yield title or str(history.item_ids[row]), when, ", ".join(signals)


def table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
