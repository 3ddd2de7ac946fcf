"""Repositories for Triton: what is written, what is refused, how versions come together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from gr_core import Task
from gr_core.contracts import Artifact, ExportOptions
from gr_core.errors import BundleError, PlanError
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.steps import USER
from gr_core.testing import ExporterSuite
from gr_core.testing.tiny import TinyModel, tiny_registry, write_tiny_bundle
from gr_trt.ensemble import Ensemble, Graph, Role, Tensor
from gr_trt.triton.cli import triton
from gr_trt.triton.exporter import TritonExporter
from gr_trt.triton.files import external_files
from gr_trt.triton.graphs import fitted
from gr_trt.triton.layout import Step

from .tiny_onnx import TinyTorchModel, finished, write_graphs

GRAPH_BACKENDS = ("onnxruntime", "tensorrt")
FOR_ANOTHER = {"target": "sm89", "plan_cache_mib": 0}
"""Plans that are built without a GPU."""


def top_k(model: TinyModel, folder: Path) -> Graph:
    """``user`` (B, D) and ``k`` to scores and indices (B, K), written by hand."""
    table = numpy_helper.from_array(np.ascontiguousarray(model.vectors[1:].T), "table")
    shapes = [numpy_helper.from_array(np.array([1]), "one")]
    nodes = [
        helper.make_node("MatMul", [USER, "table"], ["all"]),
        helper.make_node("Reshape", ["k", "one"], ["wanted"]),
        helper.make_node("TopK", ["all", "wanted"], ["scores", "places"], axis=-1),
        helper.make_node("Add", ["places", "one"], ["indices"]),
    ]
    width = model.vectors.shape[1]
    graph = helper.make_graph(
        nodes,
        "top_k",
        [
            helper.make_tensor_value_info(USER, TensorProto.FLOAT, ["batch", width]),
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "found"]),
            helper.make_tensor_value_info("indices", TensorProto.INT64, ["batch", "found"]),
        ],
        [table, *shapes],
    )
    onnx.save(finished(graph), folder / "top_k.onnx")
    return Graph(
        name="top_k",
        file="top_k.onnx",
        role=Role.TOP_K,
        tasks=(Task.RETRIEVE,),
        inputs=(Tensor(USER, "float32", (width,)), Tensor("k", "int64", (), batched=False)),
        outputs=(Tensor("scores", "float32", ("k",)), Tensor("indices", "int64", ("k",))),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundles", version="3")


@pytest.fixture
def model(bundle: Bundle) -> TinyTorchModel:
    return TinyTorchModel(bundle)


@pytest.fixture
def graphs(model: TinyTorchModel, tmp_path: Path) -> Path:
    return with_graphs(model, tmp_path / "graphs")


def with_graphs(model: TinyModel, folder: Path) -> Path:
    ensemble = write_graphs(model, folder)
    replace(ensemble, graphs=(*ensemble.graphs, top_k(model, folder))).write(folder)
    return folder


def export(
    graphs: Path, model: TinyModel, out: Path, backend: str = "onnxruntime", **extra: Any
) -> Path:
    out.mkdir(parents=True)
    if backend == "tensorrt":
        extra = FOR_ANOTHER | extra
    given = ExportOptions(extra={"backend": backend, **extra})
    TritonExporter().export(Artifact("onnx", graphs), model, out, given)
    return out


def config_of(folder: Path) -> str:
    return (folder / "config.pbtxt").read_text()


# ── What is written ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_a_repository_is_complete(
    graphs: Path, model: TinyTorchModel, tmp_path: Path, backend: str
) -> None:
    if backend == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
    out = export(graphs, model, tmp_path / "out", backend)
    tasks = [f"tiny-{task}" for task in ("rank", "retrieve")]
    steps = ("", "-answer", "-engine", "-features", "-v3")
    assert sorted(p.name for p in out.iterdir()) == sorted(t + s for t in tasks for s in steps)
    file = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}[backend]
    for task in tasks:
        assert (out / f"{task}-engine" / "3" / file).stat().st_size > 0
        for step in ("features", "answer"):
            folder = out / f"{task}-{step}" / "3"
            assert "TritonPythonModel" in (folder / "model.py").read_text()
            copied = Bundle.open(folder / "bundle")
            copied.check_files()
            assert copied.identity == model.bundle.identity
            assert Step.read(folder).task.value == task.removeprefix("tiny-")
        report = json.loads((out / task / "3" / "report.json").read_text())
        assert report["parity"]["max_error"] <= report["parity"]["tolerance"] == 1e-4
        assert report["identity"] == model.bundle.identity.hex()
        for path in out.rglob("config.pbtxt"):
            for named in re.findall(r'input_data_file: "(.*)"', path.read_text()):
                assert (path.parent / "warmup" / named).stat().st_size > 0
    # Nothing leads out of the repository, so that it can be copied anywhere.
    for path in out.rglob("*"):
        assert not path.is_symlink()
        if path.suffix in (".json", ".pbtxt", ".py"):
            assert str(tmp_path) not in path.read_text()


def test_options_reach_the_configuration(
    graphs: Path, model: TinyTorchModel, tmp_path: Path
) -> None:
    out = export(
        graphs,
        model,
        tmp_path / "out",
        triton_name="shop",
        triton_version=12,
        triton_batch=16,
        preferred_batches=[4, 16],
        queue_delay_us=750,
        queue_size=99,
        queue_timeout_ms=40,
        instances=3,
        step_instances=2,
        execution_env="/opt/environment.tar.gz",
    )
    engine = config_of(out / "shop-rank-engine")
    for line in (
        'backend: "onnxruntime"',
        "max_batch_size: 16",
        "  preferred_batch_size: 4\n  preferred_batch_size: 16\n",
        "max_queue_delay_microseconds: 750",
        "timeout_action: REJECT",
        "default_timeout_microseconds: 40000",
        "allow_timeout_override: true",
        "max_queue_size: 99",
        "count: 3",
        "kind: KIND_CPU",
        "all {",
        'input_data_file: "items"',
    ):
        assert line in engine, engine
    assert "EXECUTION_ENV_PATH" not in engine
    features = config_of(out / "shop-rank-features")
    assert 'key: "EXECUTION_ENV_PATH"' in features
    assert 'string_value: "/opt/environment.tar.gz"' in features
    assert "count: 2" in features
    assert "model_version: 12" in config_of(out / "shop-rank")
    assert (out / "shop-rank-v12" / "12").is_dir()


def test_queues_have_no_policy_unless_it_is_asked_for(
    graphs: Path, model: TinyTorchModel, tmp_path: Path
) -> None:
    out = export(graphs, model, tmp_path / "out")
    assert not [
        p
        for p in out.rglob("config.pbtxt")
        if "policy" in p.read_text().replace("version_policy", "")
    ]
    bounded = export(graphs, model, tmp_path / "bounded", queue_size=5)
    text = config_of(bounded / "tiny-rank-answer")
    assert "max_queue_size: 5" in text
    assert "timeout" not in text


def test_a_plan_has_one_profile_for_all_batches(
    graphs: Path, model: TinyTorchModel, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = export(graphs, model, tmp_path / "out", "tensorrt", triton_batch=6, max_candidates=21)
    built = Ensemble.read(out / "tiny-rank-engine" / "3")
    (profile,) = built.notes["tensorrt"]["graphs"]["rank"]["profiles"]
    assert profile["axes"]["batch"] == [1, 6, 6]
    assert Step.read(out / "tiny-rank-features" / "3").longest == {"history": 256, "candidate": 21}
    assert "kind: KIND_GPU" in config_of(out / "tiny-rank-engine")
    several = export(graphs, model, tmp_path / "several", "tensorrt", batches=[1, 32])
    assert 'profile: "1"' in config_of(several / "tiny-rank-engine")
    with pytest.raises(PlanError, match="at most 8 requests, option triton_batch is 32"):
        export(graphs, model, tmp_path / "fewer", "tensorrt", batches=[1, 8])


def test_weights_beside_a_graph_come_along(
    graphs: Path, model: TinyTorchModel, tmp_path: Path
) -> None:
    graph = onnx.load(graphs / "rank.onnx")
    onnx.save(
        graph,
        graphs / "rank.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=1000,
    )
    assert external_files(graphs / "rank.onnx") == ["w.bin"]
    out = export(graphs, model, tmp_path / "out")
    assert (out / "tiny-rank-engine" / "3" / "w.bin").stat().st_size > 0
    assert not (out / "tiny-retrieve-engine" / "3" / "w.bin").exists()


def test_weights_outside_of_the_folder_are_refused(
    graphs: Path, model: TinyTorchModel, tmp_path: Path
) -> None:
    graph = onnx.load(graphs / "rank.onnx")
    for tensor in graph.graph.initializer:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")
    (graphs / "rank.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match="weights outside of its folder"):
        export(graphs, model, tmp_path / "out")


@pytest.mark.parametrize(("axes", "like"), [(("history", 0), "items"), ((0,), "length")])
def test_an_input_without_elements_is_made_inside(
    graphs: Path, model: TinyTorchModel, tmp_path: Path, axes: tuple[Any, ...], like: str
) -> None:
    ensemble = Ensemble.read(graphs)
    graph = ensemble.graph(Role.SINGLE_PASS, Task.RANK)
    assert graph is not None
    given = onnx.load(graphs / graph.file)
    shape = ["batch", *axes]
    given.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.INT64, shape))
    # Its elements are summed up, of which there are none, and added to the scores.
    for value in given.graph.node:
        for i, name in enumerate(value.output):
            if name == "scores":
                value.output[i] = "scores_before"
    given.graph.node.extend(
        [
            helper.make_node("ReduceSum", ["extra"], ["nothing_at_all"], keepdims=0),
            helper.make_node("Cast", ["nothing_at_all"], ["nothing_yet"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["scores_before", "nothing_yet"], ["scores"]),
        ]
    )
    del given.graph.value_info[:]
    onnx.save(given, graphs / graph.file)
    extra = replace(graph, inputs=(*graph.inputs, Tensor("extra", "int64", axes)))
    replace(ensemble, graphs=(extra,)).write(graphs)
    (tmp_path / "fitted").mkdir()
    fit = fitted(graphs, tmp_path / "fitted", [Task.RANK])
    assert [t.name for t in fit.graphs[0].inputs] == ["items", "length", "candidates"]
    feeds: dict[str, Any] = {
        "items": np.array([[3, 4, 0], [5, 0, 0]]),
        "length": np.array([2, 1]),
        "candidates": np.array([[1, 2], [3, 4]]),
    }
    empty = np.zeros((2, *(3 if a == "history" else a for a in axes)), np.int64)
    both = []
    for folder, more in ((graphs, {"extra": empty}), (tmp_path / "fitted", {})):
        session = ort.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
        assert {value.name for value in session.get_inputs()} == {*feeds, *more}
        both.append(session.run(["scores"], {**feeds, **more})[0])
    np.testing.assert_array_equal(*both)


# ── What is refused ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"colour": "red"}, "exporter triton-repository has no option 'colour'; there are: "),
        ({"backend": "pytorch"}, "backend is 'pytorch'; expected one of python, onnxruntime, "),
        ({"triton_name": "../x"}, "triton_name is '../x'; expected letters"),
        ({"triton_batch": 0}, "triton_batch is 0; expected 1 to 4096"),
        ({"triton_batch": True}, "triton_batch is True; expected 1 to 4096"),
        ({"preferred_batches": [64]}, "preferred_batches is 64; expected 1 to 32"),
        ({"preferred_batches": 8}, r"preferred_batches is 8; expected a list such as \[8, 32\]"),
        ({"queue_delay_us": -1}, "queue_delay_us is -1; expected 0 to"),
        ({"queue_timeout_ms": 0.5}, "queue_timeout_ms is 0.5; expected 0 to"),
        ({"execution_env": 3}, "execution_env is 3; expected a path"),
    ],
)
def test_a_wrong_option_is_explained(
    graphs: Path, model: TinyTorchModel, tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        export(graphs, model, tmp_path / "out", **extra)
    assert not any((tmp_path / "out").iterdir())


def test_a_folder_that_is_not_empty(graphs: Path, model: TinyTorchModel, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(BundleError, match="is not empty; export into a new folder"):
        TritonExporter().export(Artifact("onnx", graphs), model, tmp_path, ExportOptions())


def test_a_task_without_a_graph(graphs: Path, model: TinyTorchModel, tmp_path: Path) -> None:
    ensemble = Ensemble.read(graphs)
    kept = tuple(replace(g, role=Role.DECODE) for g in ensemble.graphs if Task.RANK in g.tasks)
    replace(ensemble, graphs=kept).write(graphs)
    with pytest.raises(PlanError, match=r"tiny/3 has no graph that computes rank .* rank \(decode"):
        export(graphs, model, tmp_path / "out")


def test_a_version_that_is_no_number(tmp_path: Path) -> None:
    model = TinyTorchModel(write_tiny_bundle(tmp_path / "bundles", version="2026-11"))
    graphs = with_graphs(model, tmp_path / "graphs")
    with pytest.raises(PlanError, match=r"'2026-11' is not a number .* option triton_version"):
        export(graphs, model, tmp_path / "out")
    out = export(graphs, model, tmp_path / "named", triton_version=4)
    assert (out / "tiny-rank-engine" / "4" / "model.onnx").is_file()


def test_a_graph_that_answers_otherwise_is_not_left(
    graphs: Path, model: TinyTorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is damaged on its way into the repository."""
    from gr_trt.triton import graphs as fitting

    def damaged(source: Path, out_dir: Path, tasks: Any) -> Any:
        out_dir.mkdir(exist_ok=True)
        ensemble = fitted(source, out_dir, tasks)
        graph = onnx.load(out_dir / "rank.onnx")
        (vectors,) = [t for t in graph.graph.initializer if t.name == "vectors"]
        other = np.roll(numpy_helper.to_array(vectors), 1, axis=0)
        vectors.CopyFrom(numpy_helper.from_array(other, "vectors"))
        onnx.save(graph, out_dir / "rank.onnx")
        return ensemble

    assert fitting.fitted is fitted
    monkeypatch.setattr("gr_trt.triton.exporter.fitted", damaged)
    with pytest.raises(BundleError, match="answers differ from those of the graphs"):
        export(graphs, model, tmp_path / "out")


# ── Several versions ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def repository(graphs: Path, model: TinyTorchModel, tmp_path: Path) -> Path:
    return export(graphs, model, tmp_path / "repository")


def another(tmp_path: Path, version: str, **extra: Any) -> Path:
    model = TinyTorchModel(write_tiny_bundle(tmp_path / f"bundles-{version}", version=version))
    graphs = with_graphs(model, tmp_path / f"graphs-{version}")
    return export(graphs, model, tmp_path / f"exported-{version}", **extra)


def run_add(exported: Path, repository: Path) -> str:
    """What `gr triton add` prints; raises what it raises."""
    done = CliRunner().invoke(
        triton, ["add", str(exported), str(repository)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


def versions(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit())


def test_a_second_version_is_added(repository: Path, tmp_path: Path) -> None:
    printed = run_add(another(tmp_path, "4"), repository)
    assert printed.splitlines()[-2:] == ["tiny-rank/4", "tiny-retrieve/4"]
    for step in ("features", "engine", "answer"):
        assert versions(repository / f"tiny-rank-{step}") == ["3", "4"]
    assert versions(repository / "tiny-rank") == ["4"]
    assert config_of(repository / "tiny-rank").count("model_version: 4") == 3
    for version in ("3", "4"):
        pinned = repository / f"tiny-rank-v{version}"
        assert versions(pinned) == [version]
        assert config_of(pinned).count(f"model_version: {version}") == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing is left over"
    assert all(re.fullmatch(r"[\w.-]+", p.name) for p in repository.iterdir())


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_does_not_fit_is_refused_and_nothing_changed(repository: Path, tmp_path: Path) -> None:
    before = state(repository)
    for exported, message in (
        (another(tmp_path, "3"), "has version 3 already"),
        (another(tmp_path, "2"), "leads to version 3, newer than what is to be added"),
        (another(tmp_path, "5", queue_size=7), "the new version has 'default_queue_policy {'"),
        (another(tmp_path, "6", triton_batch=8), "option triton_name"),
        (tmp_path / "nothing", "no such folder"),
        (tmp_path / "bundles", "not a repository for Triton"),
    ):
        with pytest.raises(BundleError, match=message):
            run_add(exported, repository)
        assert state(repository) == before


def test_another_model_joins(repository: Path, tmp_path: Path) -> None:
    before = state(repository)
    run_add(another(tmp_path, "4", triton_name="other"), repository)
    after = state(repository)
    assert before.items() <= after.items()
    assert (repository / "other-rank" / "4").is_dir()


def test_the_bundle_takes_its_room_once(repository: Path) -> None:
    weights = [
        repository / f"tiny-rank-{step}" / "3" / "bundle" / "model.safetensors"
        for step in ("features", "answer")
    ]
    assert len({path.stat().st_ino for path in weights}) == 1
    copied = repository.parent / "copied"
    shutil.copytree(repository, copied)
    assert state(copied) == state(repository)


# ── Conformance ───────────────────────────────────────────────────────────────────────────────


class TestExporter(ExporterSuite):
    exporter = "triton-repository"
    options: ClassVar[Mapping[str, Any]] = {"backend": "onnxruntime"}

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write_tiny_bundle(tmp_path / "bundles")

    @pytest.fixture
    def registry(self) -> Registry:
        ours = PluginHost.discover().registry.exporters[self.exporter]
        return Registry.of(ours, *(offer.descriptor for offer in tiny_registry().offers))

    @pytest.fixture
    def source(self, model: TinyModel, tmp_path: Path) -> Artifact:
        return Artifact("onnx", with_graphs(model, tmp_path / "graphs"))
