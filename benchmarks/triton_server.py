"""Triton Inference Server beside `gr serve`, with the models that gr-hstu ships.

    nox -s triton -- --bench                  in the environment that has tritonserver
    python benchmarks/triton_server.py --quick       a short look

Triton serves what `gr export --format triton-repository` writes, with the backend `python`: the
platform's engine onnxruntime in three steps. `gr serve` runs with the strategies `onnxruntime` and
`auto`. All get the same requests and one thread an engine, and nothing is cached. Answers are
compared before time is taken. Within a round every side is measured once, one after the other;
what is printed are medians over the rounds. Closed loop: each of N callers asks again as soon as
it is answered.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server_load.processes import (
    GR,
    SERVING,
    ask,
    cpu_seconds,
    described,
    machine,
    python,
    resident_bytes,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))
import tritonserver  # noqa: E402

MODELS = "package:gr_hstu/bundles"
TASKS = {"kuairand-retrieval": "retrieve", "kuairand-ranking": "rank"}
SIDES = ("triton", "onnxruntime", "auto")
TOLERANCE = 1e-3
"""Of scores, relative to the largest: the strategies compute in different orders."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--python", default=sys.executable, help="of the environment of gr serve")
    parser.add_argument("--repository", type=Path, help="exported before; is made otherwise")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "triton.json")
    parser.add_argument("--quick", action="store_true", help="one short round, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
    report = measure(options)
    print(table(report))
    if report["wrong"]:
        print("answers differ, so the figures mean nothing:", *report["wrong"], sep="\n")
        return 1
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        text = f"# Triton Inference Server\n\n{conditions(report)}\n\n{table(report)}\n"
        options.out.with_suffix(".md").write_text(text)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        scratch = Path(folder)
        repository = options.repository or exported(scratch / "repository")
        triton = running.enter_context(tritonserver.tritonserver(repository, scratch))
        servers = {"triton": (triton.grpc, triton.process.pid)}
        for side in SIDES[1:]:
            servers[side] = running.enter_context(gr_serve(options.python, side, scratch))
        client = running.enter_context(python("-m", "server_load.triton_client"))
        jobs = {
            (side, model): {
                "protocol": "triton" if side == "triton" else "gr",
                "target": servers[side][0],
                "models": MODELS,
                "model": model,
                "task": task,
            }
            for side in SIDES
            for model, task in TASKS.items()
        }
        checks = {key: ask(client, {**job, "check": True}) for key, job in jobs.items()}
        answers = {key: check["items"] for key, check in checks.items()}
        wrong = [
            f"{model}: {side} beside {SIDES[1]}: {difference}"
            for side, model in jobs
            if (difference := differing(answers[side, model], answers[SIDES[1], model]))
        ]
        total = options.rounds * len(options.concurrency) * len(jobs)
        for number in range(0 if wrong else options.rounds):
            for model in TASKS:
                for concurrency in options.concurrency:
                    for side in turned(number):
                        job = {"concurrency": concurrency, "seconds": options.seconds}
                        before = processor_seconds(servers[side][1])
                        result = ask(client, {**jobs[side, model], **job, "warm_up_s": 0.3})
                        used = processor_seconds(servers[side][1]) - before
                        result["server_cpu_ms"] = 1e3 * used / result.pop("sent")
                        cells.append(
                            {
                                "model": model,
                                "side": side,
                                "round": number,
                                "concurrency": concurrency,
                                **result,
                            }
                        )
                        print(f"\r{len(cells)}/{total}", end="", file=sys.stderr, flush=True)
        memory = {
            side: sum(map(resident_bytes, family(pid))) / 2**20
            for side, (_, pid) in servers.items()
        }
    print(file=sys.stderr)
    return {
        "what": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine("onnxruntime", "torch", "grpcio", "protobuf", "numpy"),
        "tritonserver": "2.51 (nvidia-pytriton 0.7.0)",
        "gr_serve": versions(options.python),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "load_average": os.getloadavg(),
        "resident_mib": memory,
        "engines": {f"{side} {model}": c["engine"] for (side, model), c in checks.items()},
        "wrong": wrong,
        "measurements": cells,
    }


# ── Servers ───────────────────────────────────────────────────────────────────────────────────


def exported(folder: Path) -> Path:
    """Both models in one repository."""
    from gr_trt.triton.repository import add

    for number, (name, task) in enumerate(TASKS.items()):
        out = folder if number == 0 else folder.with_name(name)
        print(f"exporting {name}", file=sys.stderr)
        subprocess.run(
            [
                *(sys.executable, "-c", GR, "export", name, "--models", MODELS),
                *("--format", "triton-repository", "--out", str(out)),
                *("--task", task, "--option", "engine_threads=1"),
            ],
            check=True,
            stdout=sys.stderr,
        )
        if number:
            add(out, folder)
    return folder


@contextmanager
def gr_serve(interpreter: str, strategy: str, scratch: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of `gr serve` with one strategy."""
    config = scratch / f"{strategy}.toml"
    models = "".join(
        f'[[models]]\nname = "{name}"\nstrategy = "{strategy}"\nthreads = 1\n' for name in TASKS
    )
    config.write_text(f'[repository]\npath = "{MODELS}"\n[cache.user_kv]\ncache = "off"\n{models}')
    log = scratch / f"{strategy}.log"
    command = [interpreter, "-c", GR, "serve", "--config", str(config), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line.startswith(SERVING):
                raise SystemExit(f"gr serve did not start:\n{log.read_text()[-4000:]}")
            yield line.removeprefix(SERVING).split(",")[0].strip(), process.pid
        finally:
            process.terminate()
            process.wait(30)


def versions(interpreter: str) -> dict[str, str]:
    """Of what `gr serve` stands on, in its own environment."""
    names = ("onnxruntime", "torch", "grpcio", "protobuf", "numpy", "gr-kernels")
    code = (
        "import json; from importlib.metadata import distributions as d; "
        f"print(json.dumps({{x.name: x.version for x in d() if x.name in {names}}}))"
    )
    found = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    own: dict[str, str] = json.loads(found.stdout)
    return {name: own[name] for name in names if name in own}


def family(pid: int) -> list[int]:
    """A process and its children: Triton runs each Python model in one of its own."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [
        pid,
        *(c for file in children for one in file.read_text().split() for c in family(int(one))),
    ]


def processor_seconds(pid: int) -> float:
    return sum(map(cpu_seconds, family(pid)))


def turned(number: int) -> list[str]:
    """Another one comes first in every round."""
    n = number % len(SIDES)
    return [*SIDES[n:], *SIDES[:n]]


# ── Report ────────────────────────────────────────────────────────────────────────────────────


def differing(ours: list[Any], theirs: list[Any]) -> str:
    """Where answers differ, beyond the order of items with nearly the same score."""
    for row, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        if len(mine) != len(yours):
            return f"request {row}: {len(mine)} items, {len(yours)} there"
        scale = max((abs(score) for _, score in yours), default=0.0)
        there = dict(map(tuple, yours))
        for (item, score), (_, expected) in zip(mine, yours, strict=True):
            if abs(score - expected) > TOLERANCE * scale:
                return f"request {row}: item {item} has the score {score}, {expected} there"
            if item in there and abs(score - there[item]) > TOLERANCE * scale:
                return f"request {row}: item {item} has the score {score}, {there[item]} there"
    return ""


def conditions(report: Mapping[str, Any]) -> str:
    memory = ", ".join(f"{side} {mib:.0f}" for side, mib in report["resident_mib"].items())
    return (
        f"{report['when']}; {described(report['machine'])}, tritonserver "
        f"{report['tritonserver']}; gr serve with {described(report['gr_serve'])}. "
        "`nox -s triton -- --bench` takes such figures. Medians of "
        f"{report['rounds']} rounds of {report['seconds']:g} s each, the client on the same "
        "cores; ratios are medians of the ratios within rounds. Resident memory of all processes "
        f"of a server at the end, MiB, shared pages counted for each: {memory}. Load of the "
        f"machine in the last minute: {report['load_average'][0]:.1f}."
    )


def table(report: Mapping[str, Any]) -> str:
    lines = [
        "| model | callers | server | requests/s | p50 ms | p99 ms | server CPU ms "
        "| requests/s to Triton's | failures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cells = report["measurements"]
    for model, callers in dict.fromkeys((c["model"], c["concurrency"]) for c in cells):
        same = [c for c in cells if (c["model"], c["concurrency"]) == (model, callers)]
        triton = {c["round"]: c["requests_per_s"] for c in same if c["side"] == "triton"}
        for side in SIDES:
            mine = [c for c in same if c["side"] == side]
            rate, p50, p99, cpu = (
                statistics.median(c[key] for c in mine)
                for key in ("requests_per_s", "p50_ms", "p99_ms", "server_cpu_ms")
            )
            ratio = statistics.median(
                c["requests_per_s"] / triton[c["round"]] for c in mine if triton[c["round"]]
            )
            engine = report["engines"][f"{side} {model}"]
            name = "Triton" if side == "triton" else "gr serve"
            name = f"{name}, auto: {engine}" if side == "auto" else f"{name}, {engine}"
            lines.append(
                f"| {model} | {callers} | {name} | {rate:.0f} | {p50:.2f} | {p99:.2f} "
                f"| {cpu:.2f} | {ratio:.2f} | {sum(c['failures'] for c in mine)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
