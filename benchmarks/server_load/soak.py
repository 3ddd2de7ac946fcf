"""A long run at one rate, with users who come and go: is the server's memory flat?

The cache of K and V and the store of histories are smaller than what the active users need, so that
both evict all the time. Memory is what the system says the server process has in RAM.
"""

from __future__ import annotations

import argparse
import csv
import json
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from server_load.processes import ask, cpu_seconds, described, machine, python, resident_bytes

WARM_UP = 0.2
"""Part of the run that is left out of the fit: caches fill, allocators find their size."""
BLOCKS = 16
"""Means of so many stretches are fitted, because samples of one process are not independent."""
FLAT = 0.01
"""Growth over the fitted time, as a part of the memory, that counts as none."""
COUNTERS = ("hits", "misses", "evictions", "entries", "bytes", "capacity_bytes")


@dataclass(frozen=True)
class Slope:
    """A line fitted to block means by least squares."""

    per_minute: float
    error: float
    """Standard error of it."""
    mean: float
    minutes: float

    @property
    def is_flat(self) -> bool:
        """Whether, with two standard errors, it grew by less than `FLAT` while it was watched."""
        return (self.per_minute + 2 * self.error) * self.minutes < FLAT * self.mean


def slope(seconds: Sequence[float], values: Sequence[float], blocks: int = BLOCKS) -> Slope:
    """Raises ValueError for less than two samples a block."""
    if len(seconds) < 2 * blocks:
        raise ValueError(f"{len(seconds)} samples, expected at least {2 * blocks}; run it longer")
    t = np.array([part.mean() for part in np.array_split(np.asarray(seconds) / 60, blocks)])
    y = np.array([part.mean() for part in np.array_split(np.asarray(values, float), blocks)])
    spread = ((t - t.mean()) ** 2).sum()
    per_minute = ((t - t.mean()) * (y - y.mean())).sum() / spread
    residual = y - y.mean() - per_minute * (t - t.mean())
    error = (residual**2).sum() / (blocks - 2) / spread
    return Slope(
        float(per_minute),
        float(error**0.5),
        float(y.mean()),
        float(seconds[-1] - seconds[0]) / 60,
    )


class Sampler:
    """Looks at a server every so often, on a thread of its own, while it lasts."""

    def __init__(self, pid: int, metrics: str, every_s: float) -> None:
        self.samples: list[dict[str, float]] = []
        self._pid = pid
        self._metrics = metrics
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(self._every_s):
            self.samples.append(
                {
                    "seconds": time.monotonic() - started,
                    "rss_mib": resident_bytes(self._pid) / 2**20,
                    "cpu_s": cpu_seconds(self._pid),
                    **caches(self._metrics),
                }
            )


def caches(address: str) -> dict[str, float]:
    """``{"user_kv.hits": …}`` from a page of Prometheus metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("gr_cache_") and 'cache="' in line:
            name, _, rest = line.partition("{")
            counter = name.removeprefix("gr_cache_").removesuffix("_total")
            if counter in COUNTERS:
                cache = rest.partition('cache="')[2].partition('"')[0]
                found[f"{cache}.{counter}"] = float(line.rpartition(" ")[2])
    return found


def soak(options: argparse.Namespace) -> int:
    """Writes ``returning_users_soak`` as .md, .json and .csv. Returns 1 if memory is not flat."""
    from returning_users import CLIENT, SEED, models, start, work_of

    side = options.sides[0]
    options.cache, options.histories = options.soak_cache, options.soak_histories
    metrics = f"127.0.0.1:{free_port()}"
    options.more_configuration = f"[observers.prometheus]\nport = {metrics.partition(':')[2]}\n"
    seconds = 60 * options.soak
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        (model, *_) = models(options.models[:1], folder)
        target, pid = start(running, model, side.server, folder, options)
        client = running.enter_context(python(*CLIENT))
        job = {
            "kind": "soak", "target": target, "pid": pid, "work": work_of(model),
            "model": model.name, "rate": options.soak_rate, "seconds": seconds,
            "active": options.soak_users, "timeout_s": options.timeout, "seed": SEED,
        }  # fmt: skip
        print(f"{model.name}: {options.soak:g} minutes at {job['rate']:g}/s", file=sys.stderr)
        with Sampler(pid, metrics, max(0.1, min(1.0, seconds / 400))) as sampler:
            result = ask(client, job)
    report = {
        "what": "A soak of returning users",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine("torch", "grpcio", "protobuf", "uvloop", "numpy"),
        "model": model.name, "about": model.about, "server": " ".join(side.server),
        "minutes": options.soak, "rate": options.soak_rate, "active_users": options.soak_users,
        "cache": options.cache, "histories": options.histories,
        "result": result, "samples": sampler.samples,
    }  # fmt: skip
    fitted = fit(sampler.samples)
    text = page(report, fitted)
    print(text)
    out = options.out / "returning_users_soak"
    options.out.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    rows = report.pop("samples")
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.10g}" for k, v in row.items()} for row in rows)
    return int(not fitted.is_flat)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def fit(samples: Sequence[Mapping[str, float]]) -> Slope:
    after = samples[int(WARM_UP * len(samples)) :]
    return slope([s["seconds"] for s in after], [s["rss_mib"] for s in after])


def page(report: Mapping[str, Any], fitted: Slope) -> str:
    result, samples = report["result"], report["samples"]
    first, last = samples[0], samples[-1]
    begun = samples[int(WARM_UP * len(samples))]
    failed = ", ".join(f"{n} {code}" for code, n in result["failures"].items()) or "none"
    lines = [
        "# Returning users, a soak",
        "",
        f"{report['when']}; {described(report['machine'])}. {report['model']} ({report['about']}) "
        f"on {report['server']}, {report['minutes']:g} minutes, Poisson arrivals at "
        f"{report['rate']:g}/s from {report['active_users']} active users, {result['users']} in "
        "all: each returns 8 times and leaves to a new one. Half of them send handles, half whole "
        f"histories. K and V may take {report['cache']}, histories {report['histories']}.",
        "",
        f"- Memory of the server: {first['rss_mib']:.0f} MiB at the first sample, "
        f"{begun['rss_mib']:.0f} MiB after {begun['seconds'] / 60:.1f} minutes, "
        f"{last['rss_mib']:.0f} MiB at the end, at most {max(s['rss_mib'] for s in samples):.0f}.",
        f"- From then on it changed by {fitted.per_minute:+.3f} ± {fitted.error:.3f} MiB a minute "
        f"(standard error over {BLOCKS} block means), of {fitted.mean:.0f} MiB: "
        + (
            f"flat, being less than {FLAT:.0%} in {fitted.minutes:.1f} minutes."
            if fitted.is_flat
            else f"NOT shown to be flat, which would be less than {FLAT:.0%} in "
            f"{fitted.minutes:.1f} minutes."
        ),
        f"- {result['answered']} of {result['sent']} requests answered; failed: {failed}; whole "
        f"histories sent again: {result['resent']}; tokens reused: {result['reused']:.1%}.",
        f"- Latency p50 {result['p50_ms']:.1f} ms, p99 {result['p99_ms']:.1f} ms, p99.9 "
        f"{result['p99.9_ms']:.1f} ms; processor time of the server "
        f"{result['server_cpu_ms']:.2f} ms a request.",
        "",
        "| cache | hits | misses | evictions | entries at the end | MiB at the end | MiB allowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for cache in dict.fromkeys(name.partition(".")[0] for name in last if "." in name):
        value = {c: last.get(f"{cache}.{c}", 0.0) for c in COUNTERS}
        lines.append(
            f"| {cache} | {value['hits']:.0f} | {value['misses']:.0f} | {value['evictions']:.0f} "
            f"| {value['entries']:.0f} | {value['bytes'] / 2**20:.1f} "
            f"| {value['capacity_bytes'] / 2**20:.1f} |"
        )
    return "\n".join([*lines, ""])
