"""The models of gr-hstu as ONNX graphs, and the engine `onnxruntime` on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gr_core import Task
from gr_core.artifacts import materialize
from gr_core.contracts import (
    Artifact,
    Cache,
    EngineOptions,
    ExportOptions,
    InferenceResult,
)
from gr_core.errors import BundleError, GrError, PlanError
from gr_core.parity import TOLERANCE
from gr_core.planner import plan
from gr_core.repository import Bundle
from gr_core.repository.bundle import atomic_folder
from gr_core.testing import EngineSuite, ExporterSuite, PluginSuite
from gr_core.testing.suite import installed
from gr_hstu.model import HSTUModel
from gr_hstu.testing import CASES, CONFIGS, KINDS, Users, a_request, encode, load, write
from gr_kernels.cache.paged import PagedCache
from gr_trt.ensemble import Ensemble, Role
from gr_trt.export.exporter import OnnxExporter
from gr_trt.onnx_runtime.engine import OnnxRuntimeEngine


class TestPlugin(PluginSuite):
    plugin = "trt"


@pytest.fixture(params=KINDS)
def any_bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return write(tmp_path, request.param)


class TestExporter(ExporterSuite):
    exporter = "onnx"
    artifacts = "trt"
    options = {"steps": False}  # noqa: RUF012

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write(tmp_path, "ranking")


class TestEngineInFloat32(EngineSuite):
    engine = "onnxruntime"
    artifacts = "trt"
    dtype = "float32"

    @pytest.fixture
    def bundle(self, any_bundle: Bundle) -> Bundle:
        return any_bundle


class TestEngineInFloat16(EngineSuite):
    engine = "onnxruntime"
    artifacts = "trt"
    dtype = "float16"

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write(tmp_path, "ranking")


# ── Graphs ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float32 graphs of each kind of model, as the engine gets them."""
    made = {}
    for kind in KINDS:
        model = load(write(tmp_path_factory.mktemp(kind), kind))
        chosen = plan(installed(), model.bundle.architecture, Task.RANK, strategy="onnxruntime")
        made[kind] = materialize(chosen, model, None, {}).path
    return made


def export(model: HSTUModel, out: Path, dtype: str = "float32", **extra: Any) -> Ensemble:
    options = ExportOptions(dtype=dtype, extra=extra)
    OnnxExporter().export(Artifact("torch", model.bundle.path), model, out, options)
    return Ensemble.read(out)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, HSTUModel]:
    return {kind: load(write(tmp_path / "models", kind)) for kind in KINDS}


def engine_of(
    model: HSTUModel, folder: Path, cache: Cache | None = None, **options: Any
) -> OnnxRuntimeEngine:
    engine = OnnxRuntimeEngine()
    caches = {"user_kv": cache} if cache is not None else {}
    extra = options.pop("extra", {})
    given = EngineOptions(caches=caches, extra=extra, **options)
    engine.load(Artifact("onnx", folder), model, model.tasks, given)
    return engine


def test_a_folder_has_every_graph(folders: dict[str, Path]) -> None:
    found = {
        kind: {(g.role, task) for g in Ensemble.read(folder).graphs for task in g.tasks}
        for kind, folder in folders.items()
    }
    of_ranking = {(role, Task.RANK) for role in (Role.SINGLE_PASS, Role.PREFILL, Role.DECODE)}
    of_retrieval = {(role, Task.RETRIEVE) for role in Role}
    assert found == {
        "research": of_ranking | of_retrieval,
        "ranking": of_ranking,
        "mtgr": of_ranking,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_say_what_they_are(
    folders: dict[str, Path], models: dict[str, HSTUModel], kind: str
) -> None:
    ensemble = Ensemble.read(folders[kind])
    model = models[kind]
    assert ensemble.identity == model.bundle.identity.hex()
    assert ensemble.axes["history"].maximum == model.schema.max_history
    for graph in ensemble.graphs:
        proto = onnx.load(str(folders[kind] / graph.file))
        onnx.checker.check_model(proto, full_check=True)
        facts = {entry.key: entry.value for entry in proto.metadata_props}
        assert facts["gr.architecture"] == model.bundle.architecture
        assert (facts["gr.version"], facts["gr.role"]) == ("1", graph.role.value)
        assert json.loads(facts["gr.tasks"]) == [task.value for task in graph.tasks]
        assert json.loads(facts["gr.features"]) == json.loads(json.dumps(model.bundle.features))
        assert json.loads(facts["gr.parity"])["max_error"] <= 1e-5
        assert proto.ir_version == ensemble.ir_version
        assert proto.opset_import[0].version == ensemble.opset
        for values, tensors in (
            (proto.graph.input, graph.inputs),
            (proto.graph.output, graph.outputs),
        ):
            shapes = {
                v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
                for v in values
            }
            lead = {t.name: ["batch"] if t.batched else [] for t in tensors}
            assert shapes == {t.name: [*lead[t.name], *t.axes] for t in tensors}
        assert graph.parity is not None
        assert len(graph.parity.shapes) > 1
        assert graph.parity.max_error <= 1e-5


@pytest.mark.parametrize(
    ("kind", "dtype", "steps"), [("research", "float16", False), ("mtgr", "bfloat16", True)]
)
def test_other_precisions(
    folders: dict[str, Path],
    models: dict[str, HSTUModel],
    tmp_path: Path,
    kind: str,
    dtype: str,
    steps: bool,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    task = "retrieve" if kind == "research" else "rank"
    ensemble = export(models[kind], out, dtype, tasks=[task], steps=steps)
    narrow, wide = ((folder / f"{task}.onnx").stat().st_size for folder in (out, folders[kind]))
    assert narrow < wide
    for graph in ensemble.graphs:
        assert graph.parity is not None
        assert 0 < graph.parity.max_error <= TOLERANCE[dtype]


def test_large_weights_lie_once_beside_the_graphs(
    folders: dict[str, Path], models: dict[str, HSTUModel], tmp_path: Path
) -> None:
    model = models["ranking"]
    out = tmp_path / "out"
    out.mkdir()
    export(model, out, inline_bytes=0)
    inline = sum(file.stat().st_size for file in folders["ranking"].glob("*.onnx"))
    beside = sum(file.stat().st_size for file in out.iterdir())
    assert (out / "weights.bin").stat().st_size > 10_000
    assert beside < 0.6 * inline
    batch = [encode(model, Task.RANK, a_request(seed=i, length=3 * i)) for i in range(4)]
    one, other = (engine_of(model, folder).infer(batch) for folder in (out, folders["ranking"]))
    assert_close(one, other)


def test_a_graph_that_fails_parity_is_not_left_behind(
    models: dict[str, HSTUModel], tmp_path: Path
) -> None:
    """Here float16 overflows."""
    model = models["ranking"]
    module = model.module(Task.RANK)
    module.item_mlp.hidden.weight.data.mul_(1e6)
    module.heads.output.weight.data.mul_(1e6)
    out = tmp_path / "out"
    with (
        pytest.raises(GrError, match="rank: the graph in float16 differs from torch by"),
        atomic_folder(out) as partial,
    ):
        export(model, partial, "float16")
    assert not out.exists()
    assert not list(tmp_path.glob(".out*")), "nothing half done is left behind"


def test_a_full_disk(run, environment: Mapping[str, str], tmp_path: Path) -> None:
    """Here files of more than 100 KiB are too large."""
    write(tmp_path, "ranking")
    export = "gr export ranking --models . --format onnx --out graphs"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {**environment, "TMPDIR": str(scratch)}
    shown = run("bash", "-c", f"ulimit -f 100; {export}", env=env, status=2)
    assert shown.stderr == (
        "gr: graphs: no room (File too large); free some, or write to another disk; "
        "nothing half-written is left\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranking", "scratch"]
    assert not list(scratch.glob("gr-*"))


@pytest.mark.parametrize(
    ("dtype", "extra", "message"),
    [
        ("float64", {}, "dtype is 'float64'; expected one of float32"),
        ("float32", {"opset": 7}, "opset is 7; expected 18 to 23"),
        ("float32", {"tasks": ["retrieve"]}, "ranking can only rank"),
        ("float32", {"tasks": "rank"}, "tasks is 'rank'; expected a list"),
        ("float32", {"colour": 1}, "no option 'colour'; there are: opset, tasks"),
    ],
)
def test_what_an_export_cannot_do(
    models: dict[str, HSTUModel],
    tmp_path: Path,
    dtype: str,
    extra: dict[str, Any],
    message: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(PlanError, match=message):
        export(models["ranking"], out, dtype, **extra)
    assert not list(out.iterdir())


def test_a_model_that_does_not_go_in_steps_runs_in_one_pass(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIGS["research"],
        attention_activation="softmax",  # type: ignore[call-arg]
    )
    bundle = write(tmp_path, "research", config=config.to_dict(), tasks=[Task.RETRIEVE])
    model = load(bundle)
    out = tmp_path / "out"
    out.mkdir()
    ensemble = export(model, out)
    assert {graph.role for graph in ensemble.graphs} == {Role.SINGLE_PASS, Role.TOP_K}
    batch = [encode(model, Task.RETRIEVE, a_request(seed=i, length=7 * i)) for i in range(4)]
    from gr_hstu.testing import engine_of as torch_engine

    right = torch_engine(model).infer(batch)
    assert_close(engine_of(model, out).infer(batch), right)


# ── The engine ────────────────────────────────────────────────────────────────────────────────


def assert_close(
    found: Sequence[InferenceResult], right: Sequence[InferenceResult], where: str = ""
) -> None:
    for one, other in zip(found, right, strict=True):
        scale = max(float(np.abs(other.scores).max(initial=0)), 1e-6)
        np.testing.assert_allclose(
            one.scores / scale, other.scores / scale, atol=2e-5, err_msg=where
        )


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_reuse_under_fire(
    folders: dict[str, Path], models: dict[str, HSTUModel], kind: str, task: Task
) -> None:
    """Users whose histories grow, change and are cut, behind a tiny cache, and without any."""
    folder = folders[kind]
    model = models[kind]
    fresh = engine_of(model, folder)
    cache = PagedCache(3 << 16)
    cached = engine_of(model, folder, cache)
    users = Users(seed=3, users=12)
    reused = 0
    for number in range(120):
        count = int(users.random.integers(1, 5))
        batch = [encode(model, task, users.request()) for _ in range(count)]
        found = cached.infer(batch)
        assert_close(found, fresh.infer(batch), f"batch {number} of {kind}")
        reused += sum(result.tokens_reused for result in found)
    assert reused > 300
    assert cache.statistics().evictions > 10
    assert cache.statistics().bytes <= 3 << 16
    cached.close()
    assert cache.statistics().bytes == 0
    fresh.close()


@pytest.mark.parametrize("kind", KINDS)
def test_many_candidates_are_scored_in_several_runs(
    folders: dict[str, Path], models: dict[str, HSTUModel], kind: str
) -> None:
    """More scores than the workspace holds: the history once, then candidates piece by piece."""
    model = models[kind]
    candidates = [1000 + i % 60 for i in range(3000)]
    batch = [encode(model, Task.RANK, a_request(length=24, candidates=candidates))]
    whole = engine_of(model, folders[kind]).infer(batch)
    small = engine_of(model, folders[kind], extra={"workspace_bytes": 1 << 20})
    assert_close(small.infer(batch), whole)
    cached = engine_of(
        model, folders[kind], PagedCache(1 << 22), extra={"workspace_bytes": 1 << 20}
    )
    assert_close(cached.infer(batch), whole)
    again = cached.infer(batch)
    assert again[0].tokens_reused > 20
    assert_close(again, whole)


def test_reuse_can_be_left_off(folders: dict[str, Path], models: dict[str, HSTUModel]) -> None:
    model = models["ranking"]
    cache = PagedCache(1 << 20)
    engine = engine_of(model, folders["ranking"], cache, extra={"reuse": False})
    engine.infer([encode(model, Task.RANK, a_request(length=20))])
    assert cache.statistics().bytes == 0


def test_graphs_of_another_model_are_refused(
    folders: dict[str, Path], models: dict[str, HSTUModel]
) -> None:
    with pytest.raises(BundleError, match="made of mtgr/1 with other files than ranking/1"):
        engine_of(models["ranking"], folders["mtgr"])
    with pytest.raises(BundleError, match="made in float32, asked for float16"):
        engine_of(models["mtgr"], folders["mtgr"], dtype="float16")


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_graphs_are_refused(
    folders: dict[str, Path], models: dict[str, HSTUModel], tmp_path: Path, damage: str
) -> None:
    folder = folders["ranking"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = tmp_path / "rank_decode.onnx"
    if damage == "cut":
        graph.write_bytes(graph.read_bytes()[:1000])
    elif damage == "gone":
        graph.unlink()
    else:
        graph.write_bytes((tmp_path / "rank.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"rank_decode\.onnx: .* export the model again"):
        engine_of(models["ranking"], tmp_path)


def test_a_provider_that_is_not_there(
    folders: dict[str, Path], models: dict[str, HSTUModel]
) -> None:
    with pytest.raises(PlanError, match=r"provider is .NoSuchProvider.; onnxruntime .* has .*CPU"):
        engine_of(models["mtgr"], folders["mtgr"], extra={"provider": "NoSuchProvider"})
