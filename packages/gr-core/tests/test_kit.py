"""The conformance kit: what is right passes it, and each kind of mistake fails its case."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.testing import (
    CacheSuite,
    EngineSuite,
    ExporterSuite,
    ModelSuite,
    PluginSuite,
    Suite,
    check_plugin,
)
from gr_core.testing.suite import cases_of
from gr_core.testing.tiny import tiny_registry, write_tiny_bundle

# ── What is right ─────────────────────────────────────────────────────────────────────────────


class _Tiny:
    @pytest.fixture
    def registry(self) -> Registry:
        return tiny_registry()

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write_tiny_bundle(tmp_path)


class TestTinyModel(_Tiny, ModelSuite):
    pass


class TestTinyEngine(_Tiny, EngineSuite):
    engine = "numpy"


class TestMemoryCache(CacheSuite):
    cache = "memory"


class TestBuiltins(PluginSuite):
    plugin = "core"


# ── Opting out ────────────────────────────────────────────────────────────────────────────────


def test_a_case_is_left_out_by_name_and_with_a_reason():
    with pytest.raises(TypeError, match="'no_such_case', expected one of"):
        type("Mine", (CacheSuite,), {"skip": {"no_such_case": "because of something"}})
    with pytest.raises(TypeError, match=r"skip\['it_counts'\]: '', expected a reason"):
        type("Mine", (CacheSuite,), {"skip": {"it_counts": ""}})
    with pytest.raises(TypeError, match="overrides test_it_counts; to leave a case out"):
        type("Mine", (CacheSuite,), {"test_it_counts": lambda self: None})
    type("Mine", (CacheSuite,), {"skip": {"it_counts": "a counter would cost more"}})


def test_check_plugin_names_what_is_wrong():
    import gr_core.builtins
    from gr_core import hookimpl

    assert check_plugin(gr_core.builtins) == []

    class Wrong:
        @hookimpl
        def gr_register_engine(self):
            return []

    (problem,) = check_plugin(Wrong())
    assert "there is no hook 'gr_register_engine'" in problem


# ── What is wrong ─────────────────────────────────────────────────────────────────────────────

PRELUDE = """
import asyncio, base64, json, shutil, time
from dataclasses import replace
import numpy as np
import pytest
from gr_core import (CacheDescriptor, EngineDescriptor, ExporterDescriptor, KernelDescriptor,
    ServerDescriptor)
from gr_core.errors import *
from gr_core.contracts import *
from gr_core.caches.memory import MemoryCache
from gr_core.plugins.registry import Registry
from gr_core.testing import *
from gr_core.testing.tiny import *

class Changed:
    changes = {}

    @pytest.fixture
    def registry(self):
        tiny = [offer.descriptor for offer in tiny_registry().offers]
        return Registry.of(*(replace(d, **self.changes.get(d.name, {})) for d in tiny))

    @pytest.fixture
    def bundle(self, tmp_path):
        return write_tiny_bundle(tmp_path)
"""


@cache
def failures(source: str) -> Mapping[str, set[str]]:
    """Cases that fail, by class, of a file of tests that runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_subject.py").write_text(PRELUDE + source)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "."]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout
    found: dict[str, set[str]] = defaultdict(set)
    for line in result.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")) and "::" in line:
            _, suite, case = line.split(" - ")[0].split("::")
            found[suite].add(case.split("[")[0].removeprefix("test_"))
    return found


def classes(template: str, variants: Mapping[str, tuple[str, set[str]]]) -> str:
    """One subject and one suite for each variant, named after it."""
    parts = []
    for name, (body, _) in variants.items():
        parts.append(
            template.replace("NAME", name).replace(
                "BODY", textwrap.indent(textwrap.dedent(body), "    ")
            )
        )
    return "\n".join(parts)


def check(
    template: str, variants: Mapping[str, tuple[str, set[str]]], name: str, suite: type[Suite]
) -> None:
    found = failures(classes(template, variants)).get(f"Test{name}", set())
    expected = variants[name][1]
    assert found >= expected
    assert bool(found) == bool(expected), found
    assert found <= set(cases_of(suite))


ENGINE = """
class NAME(TinyEngine):
    changes = {}
BODY

class TestNAME(Changed, EngineSuite):
    engine = "numpy"
    changes = {"numpy": {"factory": "test_subject:NAME", **NAME.changes}}
"""
ENGINES: Mapping[str, tuple[str, set[str]]] = {
    "Right": ("", set()),
    "DependsOnPadding": (
        """
    def infer(self, batch):
        longest = max(r.tokens for r in batch)
        return [replace(r, scores=(r.scores * (1 + longest / 1e3)).astype("float32"))
                for r in super().infer(batch)]
        """,
        {"batch_mates_and_padding_never_change_scores"},
    ),
    "DependsOnPlace": (
        """
    def infer(self, batch):
        return [replace(r, scores=(r.scores * (1 + i)).astype("float32"))
                for i, r in enumerate(super().infer(batch))]
        """,
        {
            "batch_mates_and_padding_never_change_scores",
            "the_order_of_a_batch_never_changes_scores",
            "the_same_request_twice_in_a_batch",
            "each_request_gets_its_own_k",
        },
    ),
    "ReusesItsBuffer": (
        """
    out = np.zeros(10_000, np.float32)
    def infer(self, batch):
        results, start = [], 0
        for r in super().infer(batch):
            flat = self.out[start : start + r.scores.size]
            flat[:] = r.scores.ravel()
            results.append(replace(r, scores=flat.reshape(r.scores.shape)))
            start += r.scores.size
        return results
        """,
        {"results_stay_as_they_are"},
    ),
    "GivesFloat64": (
        """
    def infer(self, batch):
        return [replace(r, scores=r.scores.astype("float64")) for r in super().infer(batch)]
        """,
        {"results_have_the_promised_shapes", "an_empty_history_and_one_item"},
    ),
    "GivesNaNForNobody": (
        """
    def infer(self, batch):
        if any(not r.arrays["items"].size for r in batch):
            return [replace(r, scores=r.scores * np.nan) for r in super().infer(batch)]
        return super().infer(batch)
        """,
        {"results_have_the_promised_shapes", "an_empty_history_and_one_item"},
    ),
    "ClosesOnce": (
        """
    def close(self):
        if self._model is None:
            raise RuntimeError("closed already")
        super().close()
        """,
        {"its_life", "a_closed_engine_is_unavailable"},
    ),
    "IgnoresOptions": (
        """
    def load(self, artifact, model, tasks, options):
        super().load(artifact, model, tasks, replace(options, extra={}))
        """,
        {"unknown_options_are_refused"},
    ),
    "IsAlwaysHealthy": (
        """
    def health(self):
        return Health(True)
        """,
        {"its_life"},
    ),
    "TakesOneK": (
        """
    def infer(self, batch):
        k = max(r.k for r in batch)
        return super().infer([replace(r, k=k) for r in batch])
        """,
        {"each_request_gets_its_own_k"},
    ),
    "SaysItBatchesItself": (
        """
    changes = {"batches_itself": True}
        """,
        {"it_is_what_its_descriptor_says"},
    ),
    "BatchesItself": (
        """
    changes = {"batches_itself": True}
    async def infer(self, request, deadline):
        if deadline is not None and deadline < time.monotonic():
            raise DeadlineExceeded("late")
        return (await asyncio.to_thread(TinyEngine.infer, self, [request]))[0]
        """,
        set(),
    ),
    "BatchesItselfForever": (
        """
    changes = {"batches_itself": True}
    async def infer(self, request, deadline):
        return (await asyncio.to_thread(TinyEngine.infer, self, [request]))[0]
        """,
        {"a_passed_deadline_is_not_computed"},
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name: str):
    check(ENGINE, ENGINES, name, EngineSuite)


def test_an_engine_that_is_not_the_reference_is_compared_with_it():
    source = """
class Off(TinyEngine):
    def infer(self, batch):
        return [replace(r, scores=r.scores * np.float32(1.01)) for r in super().infer(batch)]

class TestOff(Changed, EngineSuite):
    engine = "off"

    @pytest.fixture
    def registry(self):
        tiny = [offer.descriptor for offer in tiny_registry().offers]
        off = replace(tiny[1], name="off", factory="test_subject:Off", priority=-1)
        return Registry.of(*tiny, off)
"""
    assert failures(source) == {"TestOff": {"it_agrees_with_the_reference"}}


MODEL = """
class NAME(TinyModel):
    pass
BODY

class TestNAME(Changed, ModelSuite):
    changes = {"tiny": {"factory": "test_subject:NAME"}}
"""
MODELS: Mapping[str, tuple[str, set[str]]] = {
    "TrustsTheOrder": (
        """
    def encode(self, request, task):
        times = np.arange(len(request.history))
        history = replace(request.history, timestamps_ms=times)
        return super().encode(replace(request, history=history), task)
        """,
        {"times_out_of_order_are_put_in_order"},
    ),
    "DoesNotCount": (
        """
    def encode(self, request, task):
        return replace(super().encode(request, task), unknown_items=0)
        """,
        {"unknown_items_are_left_out_and_counted"},
    ),
    "HasAnotherDtype": (
        """
    def encode(self, request, task):
        encoding = super().encode(request, task)
        arrays = {n: a.astype("int32") for n, a in encoding.request.arrays.items()}
        return replace(encoding, request=replace(encoding.request, arrays=arrays))
        """,
        {"arrays_are_as_declared"},
    ),
    "ChangesTheRequest": (
        """
    def encode(self, request, task):
        request.history.timestamps_ms[:] += 1
        return super().encode(request, task)
        """,
        {"encoding_is_repeatable_and_leaves_the_request_alone"},
    ),
    "DecodesBackwards": (
        """
    def decode(self, task, result, head_weights):
        scores, heads = super().decode(task, result, head_weights)
        return scores[::-1], heads
        """,
        {"decoded_scores_follow_the_heads"},
    ),
    "RaisesAnythingForDamage": (
        """
    def __init__(self, bundle):
        try:
            super().__init__(bundle)
        except BundleError as error:
            raise RuntimeError(str(error))
        """,
        {"damaged_weights_are_refused", "missing_weights_are_refused"},
    ),
    "MarksNothing": (
        """
    def encode(self, request, task):
        encoding = super().encode(request, task)
        return replace(encoding, unscored=np.zeros_like(encoding.unscored))
        """,
        {"unknown_candidates_are_marked"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str):
    check(MODEL, MODELS, name, ModelSuite)


CACHE = """
class NAME(MemoryCache):
    pass
BODY

class TestNAME(CacheSuite):
    cache = "it"

    @pytest.fixture
    def registry(self):
        factory = "test_subject:NAME"
        return Registry.of(CacheDescriptor(name="it", factory=factory, kinds=("results",)))
"""
CACHES: Mapping[str, tuple[str, set[str]]] = {
    "Right": ("", set()),
    "CountsHalf": (
        """
    def put(self, key, value, size, owner=""):
        super().put(key, value, size // 2, owner)
    def statistics(self):
        found = super().statistics()
        return replace(found, bytes=found.bytes * 2)
        """,
        {"it_never_holds_more_than_its_capacity"},
    ),
    "KeepsOwners": (
        """
    def evict(self, owner):
        return 0
        """,
        {"an_owner_can_be_dropped", "evicted_entries_no_longer_count_for_their_owner"},
    ),
    "KeepsStale": (
        """
    def put(self, key, value, size, owner=""):
        if size <= self._capacity:
            super().put(key, value, size, owner)
        """,
        {"a_stale_value_never_outlives_a_larger_one"},
    ),
    "IsFirstInFirstOut": (
        """
    def get(self, key):
        entry = self._entries.get(key)
        return entry.value if entry else None
        """,
        {"it_counts", "a_hot_entry_survives_cold_ones"},
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str):
    check(CACHE, CACHES, name, CacheSuite)


EXPORTER = """
class Engine(TinyEngine):
    def load(self, artifact, model, tasks, options):
        if artifact.format == "copy":
            model = TinyModel(replace(model.bundle, path=artifact.path))
        super().load(artifact, model, tasks, options)

class NAME:
    def export(self, artifact, model, out_dir, options):
        self.check(options.extra)
        self.write(artifact, out_dir)
        return Artifact("copy", out_dir)

    def check(self, options):
        if options:
            raise PlanError(f"unknown: {options}")

    def write(self, artifact, out_dir):
        shutil.copytree(artifact.path, out_dir, dirs_exist_ok=True)
BODY

class TestNAME(Changed, ExporterSuite):
    exporter = "it"

    @pytest.fixture
    def registry(self):
        model, engine = (offer.descriptor for offer in tiny_registry().offers)
        return Registry.of(model, engine,
            replace(engine, name="copied", formats=("copy",), factory="test_subject:Engine"),
            ExporterDescriptor(name="it", factory="test_subject:NAME", source="numpy",
                target="copy", tasks=TASKS))
"""
EXPORTERS: Mapping[str, tuple[str, set[str]]] = {
    "Right": ("", set()),
    "IgnoresOptions": (
        """
    def check(self, options): pass
        """,
        {"unknown_options_are_refused"},
    ),
    "WritesWhereItReads": (
        """
    def write(self, artifact, out_dir):
        shutil.copytree(artifact.path, out_dir, dirs_exist_ok=True)
        (artifact.path / "cache.bin").write_bytes(b"x")
        """,
        {"it_leaves_its_source_alone"},
    ),
    "NamesItsFolder": (
        """
    def write(self, artifact, out_dir):
        shutil.copytree(artifact.path, out_dir, dirs_exist_ok=True)
        (out_dir / "engine.json").write_text(str(out_dir))
        """,
        {"what_it_makes_can_be_moved"},
    ),
    "MakesSomethingElse": (
        """
    def export(self, artifact, model, out_dir, options):
        self.check(options.extra)
        self.write(artifact, out_dir)
        return Artifact("onnx", out_dir)
        """,
        {"it_makes_what_its_descriptor_says"},
    ),
    "ChangesTheWeights": (
        """
    def write(self, artifact, out_dir):
        from safetensors.numpy import load_file, save_file
        shutil.copytree(artifact.path, out_dir, dirs_exist_ok=True)
        weights = load_file(out_dir / "model.safetensors")
        save_file({k: w * np.float32(1.01) for k, w in weights.items()},
                  out_dir / "model.safetensors")
        """,
        {"engines_that_run_it_agree_with_the_reference"},
    ),
}


@pytest.mark.parametrize("name", EXPORTERS)
def test_exporters(name: str):
    check(EXPORTER, EXPORTERS, name, ExporterSuite)


KERNEL = """
def reference(x): return np.cumsum(x, axis=-1)
def same(x): return np.add.accumulate(x, axis=-1)
def wrong(x): return np.cumsum(x, axis=-1) * x.dtype.type(1.01)
def greedy(x): x += 1; return np.cumsum(x - 1, axis=-1)
out = np.zeros((3, 101), np.float32)
def sharing(x): out[:] += 1; out[:] = np.cumsum(x, axis=-1) + 1e-3 * (out > 0); return out

class Base(KernelSuite):
    reference = "reference"

    @pytest.fixture
    def registry(self):
        return Registry.of(*(
            KernelDescriptor(name=name, factory=f"test_subject:{name}", op="cumsum",
                device="cpu", dtypes=("float32",))
            for name in ("reference", "same", "wrong", "greedy", "sharing")
        ))

    @pytest.fixture
    def cases(self):
        x = np.random.default_rng(0).normal(size=(3, 101))
        return [KernelCase("odd", (x.astype("float32"),), (x,))]

class TestSame(Base):
    kernel = "same"

class TestWrong(Base):
    kernel = "wrong"

class TestGreedy(Base):
    kernel = "greedy"
"""


def test_kernels():
    found = failures(KERNEL)
    assert "TestSame" not in found
    assert found["TestWrong"] == {"its_error_is_that_of_its_precision"}
    assert "it_leaves_its_inputs_alone" in found["TestGreedy"]


SERVER = '''
class Lines:
    """Serves a pipeline by lines of JSON, one request a line."""

    drains = True

    def __init__(self, pipeline, settings, observers):
        if unknown := settings.keys() - {"port"}:
            raise ConfigurationError(f"unknown: {unknown}")
        self.pipeline = pipeline
        self.busy = set()

    async def serve(self, stop, ready=None):
        server = await asyncio.start_server(self.client, "127.0.0.1", 0)
        ready([":".join(map(str, server.sockets[0].getsockname()))])
        await stop.wait()
        server.close()
        for task in () if self.drains else self.busy:
            task.cancel()
        await asyncio.gather(*self.busy, return_exceptions=True)
        await server.wait_closed()

    async def client(self, reader, writer):
        from gr_core.json_requests import answer_as_dict, request_of
        self.busy.add(asyncio.current_task())
        try:
            line = await reader.readline()
            try:
                answer = answer_as_dict(await self.pipeline.recommend(request_of(json.loads(line))))
            except (UserError, ValueError) as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\\n")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.busy.discard(asyncio.current_task())
            writer.close()

class Abrupt(Lines):
    drains = False

class Careless(Lines):
    def __init__(self, pipeline, settings, observers):
        super().__init__(pipeline, {}, observers)

class JsonClient:
    async def recommend(self, address, request):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = {"history": {"item_ids": request.history.item_ids.tolist(),
            "timestamps_ms": request.history.timestamps_ms.tolist()}, "k": request.k,
            "model": request.model, "user_id": request.user_id,
            "history_handle": base64.b64encode(request.history_handle).decode()}
        if request.candidates is not None:
            data["candidates"] = request.candidates.item_ids.tolist()
        writer.write(json.dumps(data).encode() + b"\\n")
        line = await reader.readline()
        writer.close()
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return [item["item_id"] for item in answer["items"]]

class Base(ServerSuite):
    @pytest.fixture
    def registry(self):
        return Registry.of(*(
            ServerDescriptor(name=name.lower(), factory=f"test_subject:{name}")
            for name in ("Lines", "Abrupt", "Careless")
        ))

    @pytest.fixture
    def client(self):
        return JsonClient()

class TestLines(Base):
    protocol = "lines"

class TestAbrupt(Base):
    protocol = "abrupt"

class TestCareless(Base):
    protocol = "careless"
'''


def test_servers():
    assert failures(SERVER) == {
        "TestAbrupt": {"stopping_finishes_what_was_accepted"},
        "TestCareless": {"unknown_settings_are_refused"},
    }
