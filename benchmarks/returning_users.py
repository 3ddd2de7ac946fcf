"""Returning users end to end: how many a second, how quickly, and what reuse saves.

    python benchmarks/returning_users.py               all sides at all rates
    python benchmarks/returning_users.py --soak 10     ten minutes at one rate: is memory flat?
    python benchmarks/returning_users.py --quick       a short look with a small model

Users with 512 behaviours return with 16 new ones each time and have 64 candidates ranked. The
server is `gr serve`, the load a process of its own on the same machine. Requests arrive as a
Poisson process whether or not others are answered, and latency counts from the time at which a
request was due. What is printed are medians over the rounds; the sides take turns within each.

Before anything is timed, the answers of every engine are compared with those of torch in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from server_load.processes import ask, described, gr_server, machine, python, resident_bytes
from server_load.users import Visits

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGET_RATE, TARGET_P99_MS = 300, 50
RATES = (10, 50, 100, 200, 300, 400)
SEED = 7
CLIENT = ("-m", "server_load.returning_client")


@dataclass(frozen=True)
class Side:
    """Who answers, and how users ask."""

    name: str
    strategy: str
    dtype: str
    way: str

    @property
    def server(self) -> tuple[str, str]:
        return self.strategy, self.dtype

    @property
    def is_native(self) -> bool:
        return self.strategy == "native"


SIDES = (
    Side("native, handle", "native", "bfloat16", "handle"),
    Side("native, whole history", "native", "bfloat16", "whole"),
    Side("native, first visits", "native", "bfloat16", "new"),
    Side("torch, whole history", "baseline", "bfloat16", "whole"),
)
REFERENCE = ("baseline", "float32")


@dataclass(frozen=True)
class Model:
    """What is served, and how users of it come."""

    name: str
    about: str
    visits: Visits
    pipeline: str = ""
    """A table of the configuration beyond its models."""
    repository: str = ""
    """Where it is; empty: in a folder of this benchmark."""


def models(names: Sequence[str], folder: Path) -> Iterator[Model]:
    """Writes what is not there."""
    from server_load.random_ranker import FIRST_ID, write_ranker

    sizes: Mapping[str, dict[str, int]] = {
        "hstu-4x256": {"layers": 4, "width": 256, "heads": 4, "head_width": 64, "items": 50_000},
        "hstu-2x64": {"layers": 2, "width": 64, "heads": 2, "head_width": 32, "items": 500},
    }
    for name in names:
        if name in sizes:
            size = sizes[name]
            write_ranker(folder, name, **size, max_history=1024)
            items = range(FIRST_ID, FIRST_ID + size["items"])
            yield Model(
                name,
                "{layers} HSTU layers, d {width}, {heads} heads of {head_width}, {items} items, "
                "random weights".format(**size),
                Visits(items, first=512, new=16, returns=8, candidates=64),
            )
        elif name == "kuairand-ranking":
            yield Model(
                name,
                "the shipped MTGR ranker, which reads the newest 32 behaviours and attends in both "
                "directions, so that nothing of a history that grew can be reused",
                Visits(shipped_items(name), first=512, new=16, returns=8, candidates=64),
                repository="package:gr_hstu/bundles",
            )
        elif name == "kuairand":
            retriever, ranker = "kuairand-retrieval", "kuairand-ranking"
            yield Model(
                name,
                "the shipped pair: 100 items retrieved from 64 behaviours and ranked, no "
                "candidates; users have 16 behaviours, then 32, 48 and 64, all that is read",
                Visits(shipped_items(retriever), first=16, new=16, returns=3, candidates=0),
                pipeline=f'[[pipelines]]\nname = "{name}"\nretrieve = "{retriever}"\n'
                f'rank = "{ranker}"\ndefault = true\n',
                repository="package:gr_hstu/bundles",
            )
        else:
            known = ", ".join([*sizes, "kuairand-ranking", "kuairand"])
            raise SystemExit(f"--models: {name!r} is unknown; there are: {known}")


def shipped_items(name: str) -> list[int]:
    from gr_core.repository import ModelRepository

    ids = ModelRepository("package:gr_hstu/bundles").bundle(name, "1").catalogue().ids
    return [int(i) for i in ids]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [side.name for side in SIDES]
    parser.add_argument("--models", nargs="*", default=["hstu-4x256", "kuairand-ranking"])
    parser.add_argument("--sides", nargs="*", default=names, choices=names, metavar="SIDE")
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--batch", type=int, default=8, help="requests in a batch, at most")
    parser.add_argument("--cache", default="4GiB", help="capacity for users' K and V")
    parser.add_argument("--histories", default="256MiB", help="capacity for handles' histories")
    parser.add_argument("--timeout", type=float, default=5.0, help="of a request, in seconds")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--soak-rate", type=float, default=100.0)
    parser.add_argument("--soak-users", type=int, default=400, help="active at any time")
    parser.add_argument("--soak-cache", default="384MiB", help="less than these users need")
    parser.add_argument("--soak-histories", default="8MiB", help="likewise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="short and small")
    parser.add_argument("--keep-logs", type=Path, help="folder for what servers log")
    options = parser.parse_args()
    if options.quick:
        options.models = ["hstu-2x64"]
        options.rounds, options.seconds, options.rates = 1, 1.5, [20.0]
        options.cache = "64MiB"
    options.sides = available([side for side in SIDES if side.name in options.sides])
    if options.soak is not None:
        from server_load.soak import soak

        return soak(options)
    report = measure(options)
    print(page(report))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "returning_users.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "returning_users.md").write_text(page(report))
    return 0


def available(sides: Sequence[Side]) -> list[Side]:
    """Without those of an engine that is not installed."""
    from gr_core.plugins.host import PluginHost

    registry = PluginHost.discover().registry
    if "native" in registry.engines:
        return list(sides)
    print("the engine native is not installed; its sides are left out", file=sys.stderr)
    return [side for side in sides if not side.is_native]


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────


def configuration(
    model: Model, server: tuple[str, str], folder: Path, options: argparse.Namespace
) -> Path:
    """The TOML file of one server."""
    strategy, dtype = server
    served = f'[[models]]\nname = {{name}}\nstrategy = "{strategy}"\ndtype = "{dtype}"\n'
    served += f"threads = {options.threads}\n"
    names = [model.name]
    if model.pipeline:
        names = ["kuairand-retrieval", "kuairand-ranking"]
    text = "\n".join(
        [
            f'[repository]\npath = "{model.repository or folder}"\npoll_seconds = 0\n',
            *(served.format(name=json.dumps(name)) for name in names),
            model.pipeline,
            f"[batching]\nmax_batch_size = {options.batch}\n",
            f'[histories]\ncapacity_bytes = "{options.histories}"\n',
            '[logging]\nlevel = "warning"\n',
            f'[cache.user_kv]\ncapacity_bytes = "{options.cache}"\n'
            if strategy == "native"
            else '[cache.user_kv]\ncache = "off"\n',
            getattr(options, "more_configuration", ""),
        ]
    )
    file = folder / f"{model.name}-{strategy}-{dtype}.toml"
    file.write_text(text)
    return file


def start(
    running: ExitStack, model: Model, server: tuple[str, str], folder: Path, options: Any
) -> tuple[str, int]:
    config = configuration(model, server, folder, options)
    return running.enter_context(
        gr_server(config, (options.keep_logs or folder) / f"{config.stem}.log")
    )


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    parity: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        client = running.enter_context(python(*CLIENT))
        described_models = {}
        for model in models(options.models, folder):
            described_models[model.name] = model.about
            with ExitStack() as serving:
                servers = {
                    server: start(serving, model, server, folder, options)
                    for server in dict.fromkeys(side.server for side in options.sides)
                }
                if model.visits.candidates:
                    parity += compare(client, model, servers, folder, options)
                cells += sweep(client, model, servers, options)
    return {
        "what": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine("torch", "grpcio", "protobuf", "uvloop", "numpy"),
        "models": described_models,
        "settings": {
            "seconds": options.seconds, "rounds": options.rounds, "threads": options.threads,
            "batch": options.batch, "cache": options.cache, "timeout_s": options.timeout,
        },
        "parity": parity,
        "measurements": cells,
    }  # fmt: skip


def compare(
    client: subprocess.Popen[str],
    model: Model,
    servers: Mapping[tuple[str, str], tuple[str, int]],
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Answers of some users at all their visits beside those of the reference.

    Raises SystemExit where they differ by more than the precision allows: there is no use in
    timing what is wrong.
    """
    from gr_core.parity import TOLERANCE

    job = {
        "kind": "answers", "work": work_of(model), "model": model.name, "seed": SEED, "users": 3,
        "timeout_s": 60,
    }  # fmt: skip
    with ExitStack() as serving:
        target, _ = servers.get(REFERENCE) or start(serving, model, REFERENCE, folder, options)
        expected = ask(client, {**job, "target": target})["answers"]
    for server, (target, _) in servers.items():
        if server == REFERENCE:
            continue
        found = ask(client, {**job, "target": target})["answers"]
        errors = [error_of(a, b) for a, b in zip(found, expected, strict=True)]
        top = [
            len({*a["items"][:10]} & {*b["items"][:10]}) / 10
            for a, b in zip(found, expected, strict=True)
        ]
        tolerance = TOLERANCE[server[1]]
        if max(errors) > tolerance:
            raise SystemExit(
                f"{model.name}: the scores of {' '.join(server)} differ from those of "
                f"{' '.join(REFERENCE)} by {max(errors):.3g} of the largest, more than "
                f"{tolerance}; nothing is timed"
            )
        yield {
            "model": model.name, "server": " ".join(server), "requests": len(found),
            "largest_error": max(errors), "median_error": statistics.median(errors),
            "tolerance": tolerance, "top_10_in_common": statistics.mean(top),
            "tokens_reused": sum(answer["reused"] for answer in found),
        }  # fmt: skip


def error_of(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest difference of the heads' outputs to the largest of them.

    Answers carry probabilities; errors count in what the heads put out before that.
    """

    def outputs(answer: Mapping[str, Any]) -> dict[int, Any]:
        p = np.clip(np.array(answer["scores"], np.float64), 1e-12, 1 - 1e-12)
        return dict(zip(answer["items"], np.log(p / (1 - p)), strict=True))

    a, b = outputs(found), outputs(expected)
    if a.keys() != b.keys():
        return float("inf")
    largest = max(float(np.abs(row).max()) for row in b.values())
    return max(float(np.abs(a[item] - b[item]).max()) for item in b) / largest


def work_of(model: Model) -> dict[str, Any]:
    return {**asdict(model.visits), "items": list(model.visits.items)}


def sweep(
    client: subprocess.Popen[str],
    model: Model,
    servers: Mapping[tuple[str, str], tuple[str, int]],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """All sides at all rates; a side that cannot keep up is not asked for more."""
    work = work_of(model)
    sides = list(options.sides)
    beyond: dict[str, float] = {}
    for number in range(options.rounds):
        n = number % max(1, len(sides))
        for rate in sorted(options.rates):
            for side in sides[n:] + sides[:n]:
                if rate > beyond.get(side.name, float("inf")):
                    continue
                target, pid = servers[side.server]
                print(f"{model.name}: round {number + 1}, {side.name}, {rate:g}/s", file=sys.stderr)
                result = ask(
                    client,
                    {
                        "kind": "measure", "target": target, "pid": pid, "work": work,
                        "model": model.name, "way": side.way, "rate": rate,
                        "seconds": options.seconds, "timeout_s": options.timeout,
                        "first_visits": side.is_native,
                        # Users that no server has seen before.
                        "seed": seed(number, rate, side),
                    },
                )  # fmt: skip
                if not keeps_up(result):
                    beyond[side.name] = min(rate, beyond.get(side.name, rate))
                yield {
                    "model": model.name, "side": side.name, "round": number, "rate": rate,
                    **result, "server_rss_mib": resident_bytes(pid) / 2**20,
                }  # fmt: skip


def seed(number: int, rate: float, side: Side) -> int:
    return SEED + 10 * (1000 * (len(SIDES) * number + SIDES.index(side)) + int(rate))


def keeps_up(cell: Mapping[str, Any]) -> bool:
    """Whether all that arrived was answered, and not much later than it arrived."""
    return cell["answered"] == cell["sent"] and cell["p99_ms"] < 1000


# ── Report ───────────────────────────────────────────────────────────────────────────────────────


def page(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        "# Returning users",
        "",
        f"{report['when']}; {described(report['machine'])}. Medians of {settings['rounds']} "
        f"rounds of {settings['seconds']:g} s each, Poisson arrivals from a client on the same "
        f"machine. The engine has {settings['threads']} thread, batches of at most "
        f"{settings['batch']} requests, and {settings['cache']} for K and V.",
        "",
    ]
    for model, about in report["models"].items():
        lines += [f"## {model}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += [*table(report, model), "", *verdicts(report, model), ""]
    lines += ["## Parity", "", *parity_table(report), ""]
    return "\n".join(lines)


COLUMNS = (
    ("answered/s", "requests_per_s", "{:.0f}"),
    ("p50 ms", "p50_ms", "{:.1f}"),
    ("p90 ms", "p90_ms", "{:.1f}"),
    ("p99 ms", "p99_ms", "{:.1f}"),
    ("p99.9 ms", "p99.9_ms", "{:.1f}"),
    ("tokens reused %", "reused", "{:.1%}"),
    ("batch", "batch", "{:.1f}"),
    ("engine ms", "compute_ms", "{:.2f}"),
    ("server CPU ms", "server_cpu_ms", "{:.2f}"),
    ("client CPU ms", "client_cpu_ms", "{:.2f}"),
    ("server cores", "server_cores", "{:.2f}"),
    ("client cores", "client_cores", "{:.2f}"),
    ("server MiB", "server_rss_mib", "{:.0f}"),
)


def table(report: Mapping[str, Any], model: str) -> list[str]:
    names = ["side", "arrivals", *(title for title, _, _ in COLUMNS), "failed", "resent"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for side, rate, cells in grouped(report, model):
        row = [side, f"{rate:g}/s"]
        for _, key, form in COLUMNS:
            row.append(form.format(statistics.median(c[key] for c in cells)).rstrip("%"))
        row.append(failures(cells))
        row.append(str(sum(c["resent"] for c in cells)))
        lines.append(f"| {' | '.join(row)} |")
    return lines


def grouped(
    report: Mapping[str, Any], model: str
) -> Iterator[tuple[str, float, list[dict[str, Any]]]]:
    cells = [c for c in report["measurements"] if c["model"] == model]
    for side in dict.fromkeys(c["side"] for c in cells):
        for rate in sorted({c["rate"] for c in cells if c["side"] == side}):
            yield side, rate, [c for c in cells if (c["side"], c["rate"]) == (side, rate)]


def failures(cells: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        for code, count in cell["failures"].items():
            counts[code] = counts.get(code, 0) + count
    return ", ".join(f"{count} {code}" for code, count in sorted(counts.items())) or "0"


def verdicts(report: Mapping[str, Any], model: str) -> list[str]:
    """The highest rate of each side within the target's latency, and below all that failed."""
    best: dict[str, float] = {}
    broken: set[str] = set()
    for side, rate, cells in grouped(report, model):
        best.setdefault(side, 0.0)
        p99 = statistics.median(c["p99_ms"] for c in cells)
        if p99 >= TARGET_P99_MS or any(c["answered"] < c["sent"] for c in cells):
            broken.add(side)
        elif side not in broken:
            best[side] = rate
    return [
        f"- {side}: {f'up to {rate:g}/s' if rate else 'at none of the rates'} within p99 < "
        f"{TARGET_P99_MS} ms" + (", as aimed at" if rate >= TARGET_RATE else "")
        for side, rate in best.items()
    ]


def parity_table(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "Largest difference of a head's output to torch in float32, relative to the largest output "
        "of the request, over all visits of three users.",
        "",
        "| model | server | largest | median | allowed | top 10 in common | tokens reused |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["parity"]:
        lines.append(
            f"| {row['model']} | {row['server']} | {row['largest_error']:.2g} "
            f"| {row['median_error']:.2g} | {row['tolerance']} | {row['top_10_in_common']:.1%} "
            f"| {row['tokens_reused']} |"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
