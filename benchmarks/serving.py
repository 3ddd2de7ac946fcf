"""The server under load: requests a second and latencies, beside a bare gRPC server.

    python benchmarks/serving.py                       the platform's own cost, with a trivial model
    python benchmarks/serving.py --config FILE         also with the models of a configuration
    python benchmarks/serving.py --quick               a short look

Server and load are processes of their own. Within a round every side is measured once, one after
the other, and the sides are compared within rounds, because other work on the machine comes and
goes; what is printed are medians over the rounds. The processor time that the server took for a
request depends least on other work. Closed loop: each of N callers asks again as soon as it
is answered. Open loop: requests arrive as a Poisson process, and latency counts from the time at
which a request was due, so that waiting callers do not hide a stall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server_load.processes import ask, cpu_seconds, described, machine, python, read

HERE = Path(__file__).parent
LOAD = HERE / "server_load"
SIDES = ("bare", "server", "platform")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[500, 1000, 2000])
    parser.add_argument("--rows", type=int, nargs="*", default=[0, 512])
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--config", type=Path, help="a configuration to be served as well")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "serving.json")
    parser.add_argument("--quick", action="store_true", help="one short round, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.rates = 1, 1.0, options.rates[:1]

    report = measure(options)
    print(table(report))
    if not options.quick:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        page = f"# Server under load\n\n{conditions(report)}\n\n{table(report)}\n"
        options.json.with_suffix(".md").write_text(page)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    loads = [{"concurrency": c, "rate": 0} for c in options.concurrency]
    loads += [{"concurrency": 0, "rate": rate} for rate in options.rates]
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        sides = {side: (Path(folder), range(1, 7001)) for side in options.sides}
        write_trivial_model(Path(folder))
        if options.config is not None:
            sides["model"] = (options.config, known_items(options.config))
        client = running.enter_context(python("-m", "server_load.client"))
        servers = {}
        for side, (path, _) in sides.items():
            server = running.enter_context(python(str(LOAD / "sides.py"), side, str(path)))
            servers[side] = (read(server), server.pid)
        total, done = options.rounds * len(options.rows) * len(loads) * len(sides), 0
        for number in range(options.rounds):
            for rows in options.rows:
                for load in loads:
                    for side in turned(list(servers), number):
                        target, pid = servers[side]
                        job = {
                            **load, "rows": rows, "target": target,
                            "items": list(sides[side][1])[:7000],
                            "seconds": options.seconds, "warm_up_s": 0.3,
                        }  # fmt: skip
                        before = cpu_seconds(pid)
                        result = ask(client, job)
                        used = (cpu_seconds(pid) - before) / result.pop("sent")
                        result["server_cpu_us"] = used * 1e6
                        cells.append(
                            {"side": side, "round": number, "rows": rows, **load, **result}
                        )
                        done += 1
                        print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "what": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine("grpcio", "protobuf", "uvloop", "numpy"),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "measurements": cells,
    }


def turned(sides: list[str], number: int) -> list[str]:
    """Another one comes first in every round."""
    n = number % len(sides)
    return sides[n:] + sides[:n]


def write_trivial_model(folder: Path) -> None:
    sys.path.insert(0, str(LOAD))
    import trivial_plugin

    trivial_plugin.write_model(folder)


def known_items(file: Path) -> list[int]:
    """Item ids of the first model that a configuration serves."""
    from gr_core.config import Config
    from gr_core.repository import ModelRepository

    config = Config.load(file, environ={})
    repository = ModelRepository(config.repository.path)
    name = config.models[0].name if config.models else repository.names()[0]
    ids = repository.bundle(name, repository.active(name)).catalogue().ids
    return [int(i) for i in ids if isinstance(i, int) or str(i).isdecimal()]


# ── Report ───────────────────────────────────────────────────────────────────────────────────────


def conditions(report: dict[str, Any]) -> str:
    return (
        f"{report['when']}; {described(report['machine'])}. Medians of {report['rounds']} rounds "
        f"of {report['seconds']:g} s each; ratios are medians of the ratios within rounds."
    )


def table(report: dict[str, Any]) -> str:
    lines = [
        "| history | load | side | requests/s | p50 ms | p99 ms | server CPU µs "
        "| requests/s to bare | CPU to bare | failures |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells = report["measurements"]
    kinds = dict.fromkeys((c["rows"], c["concurrency"], c["rate"]) for c in cells)
    sides = dict.fromkeys(c["side"] for c in cells)
    for rows, concurrency, rate in sorted(kinds, key=lambda k: (k[0], not k[1], k[1], k[2])):
        same = [
            c
            for c in cells
            if (c["rows"], c["concurrency"], c["rate"]) == (rows, concurrency, rate)
        ]
        bare = {c["round"]: c for c in same if c["side"] == "bare"}
        for side in sides:
            mine = [c for c in same if c["side"] == side]
            middle = {
                key: statistics.median(c[key] for c in mine)
                for key in ("requests_per_s", "p50_ms", "p99_ms", "server_cpu_us")
            }
            lines.append(
                f"| {rows} rows | {f'{concurrency} callers' if concurrency else f'{rate:g}/s'} "
                f"| {side} | {middle['requests_per_s']:.0f} | {middle['p50_ms']:.2f} "
                f"| {middle['p99_ms']:.2f} | {middle['server_cpu_us']:.0f} "
                f"| {ratio(mine, bare, 'requests_per_s') if concurrency else ''} "
                f"| {ratio(mine, bare, 'server_cpu_us')} | {sum(c['failures'] for c in mine)} |"
            )
    return "\n".join(lines)


def ratio(mine: list[dict[str, Any]], bare: dict[int, dict[str, Any]], key: str) -> str:
    """Median over the rounds of a side's figure to that of the bare server in the same round."""
    ratios = [c[key] / bare[c["round"]][key] for c in mine if bare.get(c["round"], {}).get(key)]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


if __name__ == "__main__":
    main()
