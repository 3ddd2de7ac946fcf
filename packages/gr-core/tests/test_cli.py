"""The command ``gr`` with a plugin of a stranger that is installed in a folder on sys.path."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gr_core.cli.app import run
from gr_core.cli.options import TASKS
from gr_core.testing.tiny import write_tiny_bundle
from gr_core.types import Task

PLUGIN = '''
import asyncio, json
import click
from gr_core import (CommandDescriptor, EngineDescriptor, ExporterDescriptor, ObserverDescriptor,
    ServerDescriptor, Task, hookimpl)
from gr_core.contracts import Artifact
from gr_core.errors import BundleError, ConfigurationError, PlanError
from gr_core.observers import Observer
from gr_core.testing.tiny import TinyEngine, tiny_registry

@hookimpl
def gr_register_models():
    return tiny_registry().models.values()

@hookimpl
def gr_register_engines():
    slow = dict(formats=("numpy",), tasks=(Task.RETRIEVE, Task.RANK), devices=("cpu",),
        dtypes=("float32",), priority=-1)
    return [*tiny_registry().engines.values(),
        EngineDescriptor(name="slow", factory="tiny_plugin:Slow", **slow),
        EngineDescriptor(name="wrong", factory="tiny_plugin:Wrong", **slow),
        EngineDescriptor(name="gpu", factory="tiny_plugin:Slow", **{**slow, "priority": 9},
            probe=lambda: (False, "there is no GPU"))]

@hookimpl
def gr_register_exporters():
    both = (Task.RETRIEVE, Task.RANK)
    return [
        ExporterDescriptor(name="one", factory="tiny_plugin:Copy", source="numpy", target="two",
            tasks=both),
        ExporterDescriptor(name="two", factory="tiny_plugin:Copy", source="two", target="three",
            tasks=both),
    ]

@hookimpl
def gr_register_servers():
    return [ServerDescriptor(name="lines", factory="tiny_plugin:Lines")]

@hookimpl
def gr_register_observers():
    return [ObserverDescriptor(name="count", factory="tiny_plugin:Count")]

@hookimpl
def gr_register_commands():
    return [
        CommandDescriptor(name="shout", factory="tiny_plugin:shout", summary="Shout a word"),
        CommandDescriptor(name="lost", factory="tiny_plugin:nowhere", summary="Cannot be loaded"),
        CommandDescriptor(name="serve", factory="tiny_plugin:shout", summary="Takes a name"),
    ]

@click.command()
@click.argument("word")
def shout(word):
    """Shout a word."""
    if word == "fault":
        raise KeyError("a programming mistake")
    if word == "mistake":
        raise BundleError("the bundle is damaged; copy it again")
    click.echo(word.upper())

class Slow(TinyEngine):
    def infer(self, batch):
        import time
        time.sleep(0.01)
        return super().infer(batch)

class Wrong(TinyEngine):
    def infer(self, batch):
        from dataclasses import replace
        return [replace(r, scores=r.scores * 2) for r in super().infer(batch)]

class Copy:
    def export(self, artifact, model, out_dir, options):
        if "fail" in options.extra:
            raise PlanError("asked to fail")
        (out_dir / "artifact.txt").write_text(artifact.format + json.dumps(dict(options.extra)))
        return Artifact({"numpy": "two", "two": "three"}[artifact.format], out_dir)

class Count(Observer):
    def __init__(self, settings):
        self.settings = settings

class Lines:
    def __init__(self, pipeline, settings, observers):
        self.pipeline, self.observers = pipeline, observers
        self.drain_s = settings.get("drain_s", 0)
        self.port = settings.get("port", 0)
        if unknown := settings.keys() - {"drain_s", "port"}:
            raise ConfigurationError(f"server.lines: unknown {sorted(unknown)}")

    async def serve(self, stop, ready=None):
        server = await asyncio.start_server(self.client, "127.0.0.1", self.port)
        ready([":".join(map(str, server.sockets[0].getsockname()))])
        await stop.wait()
        server.close()
        await asyncio.sleep(self.drain_s)

    async def client(self, reader, writer):
        import gc
        from gr_core.json_requests import answer_as_dict, request_of
        answer = await self.pipeline.recommend(request_of(json.loads(await reader.readline())))
        facts = {**answer_as_dict(answer), "frozen_objects": gc.get_freeze_count()}
        writer.write(json.dumps(facts).encode() + b"\\n")
        await writer.drain()
        writer.close()
'''

Gr = Callable[..., Any]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin installed, nobody's configuration, and the logging of tests left as it is."""
    site = tmp_path / "site"
    info = site / "tiny_plugin-0.3.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 0.3\n")
    info.joinpath("entry_points.txt").write_text("[gr]\ntiny = tiny_plugin\n")
    site.joinpath("tiny_plugin.py").write_text(PLUGIN)
    for name in [name for name in os.environ if name.startswith("GR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GR_PLUGINS", "tiny")
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    root, ours = logging.getLogger(), logging.getLogger("gr_core.plugins")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    sys.modules.pop("tiny_plugin", None)


@pytest.fixture
def gr(capfd: pytest.CaptureFixture[str]) -> Gr:
    """Runs ``gr`` in this process; returns what it printed, its errors if ``status`` is 2."""

    def call(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        code = run(list(arguments))
        out, err = capfd.readouterr()
        assert code == status, out + err
        return out if status in (0, 1) else err

    return call


@pytest.fixture
def models(tmp_path: Path) -> str:
    write_tiny_bundle(tmp_path / "models")
    write_tiny_bundle(tmp_path / "models", version="2")
    return str(tmp_path / "models")


# ── Help and errors ───────────────────────────────────────────────────────────────────────────


def test_help_imports_nothing_heavy():
    code = "import sys; from gr_core.cli.app import run; run(['--help']); print(*sys.modules)"
    # All plugins that are installed, but for the one of these tests, which is not as careful.
    environment = {**os.environ, "GR_PLUGINS": "", "GR_DISABLED_PLUGINS": "tiny"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    modules = set(result.stdout.splitlines()[-1].split())
    assert "gr_core.builtins" in modules
    assert not modules & {"torch", "grpc", "pydantic", "rich", "asyncio", "gr_core.pipeline"}


def test_help_shows_the_summaries_of_plugins_without_loading_their_commands(gr: Gr):
    shown = gr("--help")
    assert "  shout  Shout a word\n" in shown
    assert "  lost   Cannot be loaded\n" in shown
    assert "  serve      Serve recommendations.\n" in shown, "built-in names cannot be taken"
    assert "Takes a name" not in shown


def test_a_command_of_a_plugin(gr: Gr):
    assert gr("shout", "hello") == "HELLO\n"


def test_commands_are_suggested(gr: Gr):
    assert "There is no command 'recomend'. Did you mean 'recommend'?" in gr("recomend", status=2)
    assert "Did you mean 'shout'?" in gr("shuot", status=2)


def test_a_missing_command_names_the_plugins_that_failed(
    gr: Gr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "site" / "tiny_plugin.py").write_text("import no_such_library")
    shown = gr("shout", "x", status=2)
    assert "There is no command 'shout'." in shown
    assert "Plugin tiny failed: could not be imported: ModuleNotFoundError" in shown
    assert "no_such_library" in gr("--help")


def test_a_mistake_is_one_message_and_a_fault_a_traceback(
    gr: Gr, capfd: pytest.CaptureFixture[str]
):
    shown = gr("shout", "mistake", status=2)
    assert shown == "gr: the bundle is damaged; copy it again\n"
    assert "Traceback" in gr("--debug", "shout", "mistake", status=2)
    assert run(["shout", "fault"]) == 1
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert "gr: a fault of ours, KeyError" in shown


def test_the_entry_point_exits_with_the_code(models: str):
    command = [sys.executable, "-c", "from gr_core.cli import main; main()", "plan", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("gr: model 'nothing': not in models")


# ── Looking ───────────────────────────────────────────────────────────────────────────────────


def test_plugins_list(gr: Gr):
    listed = {plugin["name"]: plugin for plugin in json.loads(gr("plugins", "list", "--json"))}
    tiny = listed["tiny"]
    assert (tiny["distribution"], tiny["version"]) == ("tiny-plugin", "0.3")
    assert tiny["status"] == "error"
    assert "the command 'serve' is reserved for gr-core" in tiny["reason"]
    assert "engine gpu: there is no GPU" in tiny["reason"]
    assert {"engine numpy", "model tiny", "server lines", "command shout"} <= set(tiny["offers"])
    assert "gr_register_engines" in tiny["hooks"]
    assert listed["core"]["status"] == "ok"
    (row,) = [line for line in gr("plugins", "list").splitlines() if line.startswith("tiny ")]
    assert row.split()[1:4] == ["tiny-plugin", "0.3", "error"]


def test_plugins_list_shows_tracebacks_when_asked(gr: Gr, tmp_path: Path):
    (tmp_path / "site" / "tiny_plugin.py").write_text("import no_such_library")
    assert "Traceback" not in gr("plugins", "list")
    assert "    import no_such_library\n" in gr("plugins", "list", "--verbose")


def test_check(gr: Gr, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = PLUGIN.replace('CommandDescriptor(name="serve"', 'CommandDescriptor(name="cry"')
    (tmp_path / "site" / "tiny_plugin.py").write_text(text)
    report = json.loads(gr("check", "--json"))
    assert report["ok"]
    facts = {(f["area"], f["name"]): f for f in report["facts"]}
    assert facts["machine", "python"]["detail"].startswith(sys.version.split()[0])
    assert facts["device", "cpu"]["status"] == "ok"
    assert facts["plugin", "tiny"]["status"] == "partial"
    assert facts["serving", "servers"]["detail"] == "lines"
    assert facts["serving", "repository"]["detail"] == "models: tiny"
    monkeypatch.setenv("GR_DISABLED_PLUGINS", "tiny")
    shown = gr("check", status=1)
    assert "serving models: pip install gr-hstu" in shown
    assert "serving servers: pip install gr-serve-grpc" in shown


def test_plan(gr: Gr, models: str):
    shown = gr("plan")
    assert shown.splitlines() == [
        f"tiny/2 {task}: tiny → numpy (cpu, float32): "
        "highest priority of 3 feasible chains; not gpu: there is no GPU"
        for task in ("retrieve", "rank")
    ]
    explained = gr("plan", "tiny", "--explain")
    for line in ("gpu (cpu, float32)", "slow (cpu, float32)   priority -1 is lower than 0"):
        assert line in explained
    plans = json.loads(gr("plan", "--json", "--strategy", "slow"))
    assert [plan["engine"] for plan in plans] == ["slow", "slow"]
    shown = gr("plan", "--strategy", "gpu", status=1)
    assert "gpu (cpu, float32): there is no GPU" in shown
    assert "Possible instead: numpy (cpu, float32)" in shown


def test_config(gr: Gr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert gr("config", "init", "--profile", "production") == "wrote gr.toml\n"
    assert "gr.toml is there already" in gr("config", "init", status=2)
    assert gr("config", "validate") == "the configuration is valid (profile production)\n"
    monkeypatch.setenv("GR_LIMITS__MAX_K", "7")
    entries = json.loads(gr("config", "show", "--json", "--set", "batching.max_queue=5"))
    origins = {entry["path"]: (entry["value"], entry["origin"]) for entry in entries}
    assert origins["limits.max_k"] == (7, "environment variable GR_LIMITS__MAX_K")
    assert origins["batching.max_queue"] == (5, "flag batching.max_queue")
    assert origins["logging.format"] == ("json", "profile production")
    (tmp_path / "gr.toml").write_text("[batching]\nmax_queue = -1\nmax_quue = 1\n")
    shown = gr("config", "validate", status=2)
    assert "batching.max_queue: -1 (gr.toml): expected at least 1" in shown
    assert "batching.max_quue: unknown (gr.toml); did you mean 'max_queue'?" in shown
    assert "expected FIELD=VALUE" in gr("config", "show", "--set", "x", status=2)


def test_models(gr: Gr, models: str):
    def active() -> list[str]:
        return [m["version"] for m in json.loads(gr("models", "list", "--json")) if m["active"]]

    assert active() == ["2"]
    assert gr("models", "activate", "tiny", "1") == "tiny: 1 is active now, before it was 2\n"
    assert active() == ["1"]
    assert gr("models", "rollback", "tiny") == "tiny: 2 is active again\n"
    assert active() == ["2"]
    assert "has no version '9'; there are: 1, 2" in gr("models", "activate", "tiny", "9", status=2)
    shown = json.loads(gr("models", "show", "tiny", "--json"))
    assert (shown["architecture"], shown["items"], shown["active"]) == ("tiny", 50, True)
    assert "architecture  tiny" in gr("models", "show", "tiny", "1")
    assert "no such folder" in gr("models", "list", "--models", "elsewhere", status=2)


def test_a_damaged_version_is_listed_as_such(gr: Gr, models: str):
    Path(models, "tiny", "1", "config.json").write_text("{")
    rows = {row["version"]: row for row in json.loads(gr("models", "list", "--json"))}
    assert rows["1"]["description"].startswith("damaged: ")
    assert rows["2"]["architecture"] == "tiny"


# ── Doing ─────────────────────────────────────────────────────────────────────────────────────


def test_recommend(gr: Gr, models: str, tmp_path: Path):
    answer = json.loads(gr("recommend", "--history", "1001,1002,7", "-k", "3", "--json"))
    assert len(answer["items"]) == 3
    assert answer["unknown_items"] == 1
    assert [stage["task"] for stage in answer["stages"]] == ["retrieve"]
    assert {stage["engine"] for stage in answer["stages"]} == {"numpy"}
    (tmp_path / "gr.toml").write_text('[[pipelines]]\nname="p"\nretrieve="tiny"\nrank="tiny"\n')
    shown = gr("recommend", "--history", "1001", "-k", "2", "--strategy", "slow", "--model", "p")
    assert shown.splitlines()[0].split() == ["item", "title", "score", "like", "share"]
    assert "retrieve: tiny/2 on slow" in shown
    assert "rank: tiny/2 on slow" in shown
    (tmp_path / "gr.toml").unlink()
    chosen = json.loads(gr("recommend", "--candidates", "1003,1004,5", "--json", "--version", "2"))
    assert {item["item_id"] for item in chosen["items"]} == {1003, 1004}
    assert chosen["unscored_item_ids"] == [5]
    request = {
        "history": [{"item_id": 1001, "timestamp_ms": 1_700_000_000_000}],
        "k": 1,
        "task": "retrieve",
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    answer = json.loads(gr("recommend", "--request", "request.json", "--json"))
    assert [stage["task"] for stage in answer["stages"]] == ["retrieve"]
    wanted = ("--history", "1001", "--task")
    shown = gr("recommend", *wanted, "generate", status=2)
    assert "task: tiny has no model that generates" in shown
    assert "candidates: none given" in gr("recommend", *wanted, "rank", status=2)
    assert tuple(task.value for task in Task) == TASKS


def test_a_wrong_request_names_all_that_is_wrong(gr: Gr, models: str, tmp_path: Path):
    request = {"history": [{"item_id": 1.5, "timestamp_ms": 1}, {"item_id": 1}], "kk": 1, "k": "a"}
    (tmp_path / "request.json").write_text(json.dumps(request))
    shown = gr("recommend", "--request", "request.json", status=2).splitlines()
    assert [line.split(": ")[1] for line in shown] == [
        "request.kk",
        "request.history[0]",
        "request.history[1]",
        "request.k",
    ]
    (tmp_path / "request.json").write_text("{")
    assert "is not JSON" in gr("recommend", "--request", "request.json", status=2)
    assert "k: 0, expected 1 to 1000" in gr("recommend", "-k", "0", status=2)
    assert "'tin' is not served; there are: tiny" in gr("recommend", "--model", "tin", status=2)


def test_verify(gr: Gr, models: str):
    rows = json.loads(gr("verify", "--json", "--engine", "slow"))
    assert [(row["task"], row["engine"], row["ok"]) for row in rows] == [
        ("retrieve", "slow (cpu, float32)", True),
        ("rank", "slow (cpu, float32)", True),
    ]
    assert {row["reference"] for row in rows} == {"numpy (cpu, float32)"}
    assert max(row["max_error"] for row in rows) < 1e-6
    shown = gr("verify", status=1)
    assert "FAILED: request" in shown
    assert shown.count("FAILED") == 2, "of both tasks on the wrong engine alone"
    assert "nothing to compare" in gr("verify", "--engine", "numpy")
    assert "engine 'gpu' cannot be used: there is no GPU" in gr(
        "verify", "--engine", "gpu", status=2
    )


def test_bench_remembers_what_is_quickest_and_measures_nothing_wrong(gr: Gr, models: str):
    options = ("--requests", "4", "--rounds", "2", "--json")
    rows = json.loads(gr("bench", *options, "--engine", "slow", "--engine", "numpy", "--save"))
    assert [row["task"] for row in rows] == ["retrieve", "rank"]
    engines = {engine["name"]: engine for engine in rows[0]["engines"]}
    assert engines["slow"]["p50_s"] > engines["numpy"]["p50_s"] > 0
    assert engines["slow"]["p50_s"] >= 0.01
    assert engines["slow"]["p99_s"] >= engines["slow"]["p50_s"]
    assert "quickest of 3 feasible chains" in gr("plan")
    rows = json.loads(gr("bench", *options, status=1))
    assert {engine["name"] for engine in rows[0]["engines"]} == {"numpy", "slow"}


def test_export(gr: Gr, models: str, tmp_path: Path):
    options = ("--target", "sm89", "--option", "n=3", "--option", "s=x")
    assert gr("export", "tiny", "--format", "three", *options) == (
        "numpy → two → three: wrote tiny-2-three\n"
    )
    text = (tmp_path / "tiny-2-three" / "artifact.txt").read_text()
    assert text == 'two{"n": 3, "s": "x", "target": "sm89"}'
    assert "tiny-2-three: exists" in gr("export", "tiny", "--format", "three", status=2)
    place = ("--version", "1", "--out", "tiny-2-three")
    gr("export", "tiny", "--format", "three", "--overwrite", *place)
    assert (tmp_path / "tiny-2-three" / "artifact.txt").read_text() == "two{}"
    shown = gr("export", "--model", "tiny", "--to", "onnx", status=2)
    assert "no exporter makes onnx of tiny (numpy)" in shown
    assert "one (numpy → two), two (two → three)" in shown
    gr("export", "tiny", "--format", "two", "--option", "fail=true", status=2)
    assert not (tmp_path / "tiny-2-two").exists()
    assert not list(tmp_path.glob(".tiny*")), "nothing half done is left behind"


# ── Serving ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served(models: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        code = "from gr_core.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "lines", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line + process.communicate()[1]
    host, port = line.removeprefix("serving on ").strip().split(":")
    return host, int(port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_told_to_stop(served, number: signal.Signals):
    import socket

    process = served()
    with socket.create_connection(address(process)) as connection:
        connection.sendall(b'{"history": {"item_ids": [1001], "timestamps_ms": [1]}}\n')
        answer = json.loads(connection.makefile().readline())
    assert len(answer["items"]) == 10
    assert answer["frozen_objects"] > 10_000, "collecting garbage would stall requests"
    process.send_signal(number)
    assert process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(served):
    process = served("--set", "server.lines.drain_s=60")
    address(process)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert "stopping at once" in process.communicate()[1]


def test_serve_says_what_is_wrong_before_it_loads(gr: Gr, models: str):
    assert "server 'linse' cannot be used" in gr("serve", "linse", status=2)
    assert "unknown ['x']" in gr("serve", "lines", "--set", "server.lines.x=1", status=2)
    assert "observer 'x' cannot be used" in gr(
        "serve", "lines", "--set", "observers.x.y=1", status=2
    )
    assert "tiny: could not be imported" not in gr("serve", "grpc", status=2)


def test_serve_logs_json_in_production(served):
    process = served("--profile", "production", "--set", "observers.log.level=info")
    address(process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=20)[1].splitlines()
    entries = [json.loads(line) for line in lines]
    assert any("tiny → numpy" in entry["message"] for entry in entries)
    assert {"time", "level", "logger", "message"} <= entries[0].keys()


def test_a_plugin_that_the_configuration_requires_must_work(gr: Gr, models: str, tmp_path: Path):
    (tmp_path / "site" / "tiny_plugin.py").write_text("import no_such_library")
    (tmp_path / "gr.toml").write_text('plugins.required = ["tiny"]')
    shown = gr("serve", "lines", status=2)
    assert "the configuration requires the plugin 'tiny'" in shown
    assert "no_such_library" in shown


def test_tables_are_plain_on_a_pipe_and_rich_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    code = textwrap.dedent(
        """
        import sys
        from gr_core.cli.output import table
        sys.stdout.isatty = lambda: True
        table(("name", "status"), [("a [b]", "ok")])
        """
    )
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert b"\x1b[32mok" in result.stdout, result
    assert b"a [b]" in result.stdout, "what looks like markup is text"
