"""The exporter `tensorrt`: real plans, built without a GPU by TensorRT for RTX."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gr_core.contracts import Artifact, ExportOptions
from gr_core.errors import BundleError, GrError, PlanError
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.testing import ExporterSuite, installed
from gr_core.testing.tiny import write_tiny_bundle
from gr_trt.ensemble import Ensemble, Tensor
from gr_trt.tensorrt import plan_cache
from gr_trt.tensorrt.exporter import TensorRTExporter
from gr_trt.tensorrt.plan_file import read, read_facts, read_header

from .tiny_onnx import IR, MODEL, OPSET, TO_ONNX, TinyTorchModel, finished, one_graph, write_graphs

X = Tensor("x", "float32", ("history", 16))
Y = Tensor("y", "float32", ("history", 16))

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyTorchModel:
    return TinyTorchModel(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def source(model: TinyTorchModel, tmp_path: Path) -> Path:
    write_graphs(model, tmp_path / "onnx")
    return tmp_path / "onnx"


class TestExporter(ExporterSuite):
    """Graphs written by hand, plans for another machine."""

    exporter = "tensorrt"
    options = {"target": "sm89"}  # noqa: RUF012

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write_tiny_bundle(tmp_path)

    @pytest.fixture
    def registry(self) -> Registry:
        return Registry.of(MODEL, TO_ONNX, installed().exporters["tensorrt"])


def export(source: Path, model: TinyTorchModel, *, name: str = "out", **options: object) -> Path:
    out = source.parent / name
    out.mkdir()
    given = ExportOptions(extra={"target": "sm89", "batches": [1, 4], **options})
    made = TensorRTExporter().export(Artifact("onnx", source), model, out, given)
    assert (made.format, made.path) == ("tensorrt", out)
    return out


def refusal(source: Path, model: TinyTorchModel, **options: object) -> str:
    """Why it fails; nothing of it is left."""
    with pytest.raises(GrError) as error:
        export(source, model, **options)
    assert isinstance(error.value, (BundleError, PlanError))
    assert not [file for file in (source.parent / "out").iterdir() if file.suffix != ".json"]
    assert not list(plan_cache.folder().glob("*"))
    return str(error.value)


# ── Plans ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm120", "sm80,sm89", ["SM86", "sm120"]])
def test_plans_for_other_machines(
    target: str | Sequence[str], source: Path, model: TinyTorchModel
) -> None:
    out = export(source, model, target=target)
    targets = target.split(",") if isinstance(target, str) else [name.lower() for name in target]
    ensemble = Ensemble.read(out)
    given = Ensemble.read(source)
    assert [graph.file for graph in ensemble.graphs] == ["retrieve.plan", "rank.plan"]
    assert [replace(graph, file="") for graph in ensemble.graphs] == [
        replace(graph, file="") for graph in given.graphs
    ]
    notes = ensemble.notes["tensorrt"]
    assert (notes["library"], notes["targets"]) == ("tensorrt_rtx", targets)
    for graph in ensemble.graphs:
        content, facts = read(out / graph.file)
        assert list(facts.targets) == targets
        header = read_header(out / graph.file, content)
        assert (header.library, header.bytes) == ("tensorrt_rtx", len(content))
        assert facts.version.startswith(header.version.rsplit(".", 1)[0])
        assert [profile.batch for profile in facts.profiles] == [1, 4]
        assert all(profile.axes["history"].most == 256 for profile in facts.profiles)
        assert facts.network["layers"] > 10
        assert facts.layers, "what the plan consists of"
    assert {file.suffix for file in out.iterdir()} == {".plan", ".json"}


def test_plans_differ_by_target(source: Path, model: TinyTorchModel) -> None:
    one = export(source, model, name="one", target="sm80")
    other = export(source, model, name="other", target="sm120")
    assert (one / "rank.plan").read_bytes() != (other / "rank.plan").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "FLOAT"), ("float16", "HALF"), ("bfloat16", "BF16")]
)
def test_precision_is_the_graph_s(
    dtype: str, kind: str, model: TinyTorchModel, tmp_path: Path
) -> None:
    write_graphs(model, tmp_path / "onnx", dtype)
    out = export(tmp_path / "onnx", model)
    by_dtype = read_facts(out / "rank.plan").network["by_dtype"]
    assert by_dtype[kind] > 3
    assert Ensemble.read(out).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "name", "target"),
    [(TensorProto.INT8, "INT8", "sm80"), (TensorProto.FLOAT8E4M3FN, "FP8", "sm89")],
)
def test_quantized_graphs(
    kind: int, name: str, target: str, model: TinyTorchModel, tmp_path: Path
) -> None:
    source = tmp_path / "onnx"
    one_graph(source, model.bundle, quantized(kind), [X], [Y])
    out = export(source, model, target=target)
    facts = read_facts(out / "any.plan")
    assert facts.network["by_dtype"][name] >= 2
    assert facts.network["by_kind"]["QUANTIZE"] == 2


def quantized(kind: int) -> onnx.ModelProto:
    """A product of matrices, both rounded to 8 bits and back."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array(0.05, np.float32), "scale"),
        helper.make_tensor("zero", kind, (), [0]),
    ]
    nodes = []
    for name in ("x", "w"):
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_8"]),
            helper.make_node("DequantizeLinear", [f"{name}_8", "scale", "zero"], [f"{name}_f"]),
        ]
    nodes.append(helper.make_node("MatMul", ["x_f", "w_f"], ["y"]))
    return finished(graph(nodes, weights))


def graph(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto] = (),
    kind: int = TensorProto.FLOAT,
) -> onnx.GraphProto:
    """From ``x`` to ``y``, (batch, history, 16) both."""
    shape = ["batch", "history", 16]
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y"))
    return helper.make_graph(nodes, "any", [x], [y], weights)


def a_node(operator: str = "Relu", **more: Any) -> onnx.NodeProto:
    return helper.make_node(operator, ["x"], ["y"], name="the_node", **more)


def test_weights_beside_the_graph(model: TinyTorchModel, tmp_path: Path) -> None:
    source = tmp_path / "onnx"
    write_beside(source, model, seed=0)
    first = read_facts(export(source, model, name="first") / "any.plan")
    write_beside(source, model, seed=1)
    second = read_facts(export(source, model, name="second") / "any.plan")
    assert first.sha256 != second.sha256, "the cache knows weights that are outside of the graph"
    assert first.structure == second.structure
    (source / "weights").unlink()
    assert "weights with its weights is missing" in refusal_of_another(source, model)


def write_beside(source: Path, model: TinyTorchModel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    one_graph(source, model.bundle, finished(graph([product], [w])), [X], [Y])
    (source / "weights").unlink(missing_ok=True)
    onnx.save(
        onnx.load(source / "any.onnx"),
        source / "any.onnx",
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )


def refusal_of_another(source: Path, model: TinyTorchModel) -> str:
    with pytest.raises(GrError) as error:
        export(source, model, name="another")
    return str(error.value)


def test_limits_and_streaming(source: Path, model: TinyTorchModel) -> None:
    out = export(
        source,
        model,
        max_history=32,
        max_candidates=16,
        batches=[2],
        weight_streaming=True,
        sparse_weights=True,
        tf32=True,
    )
    facts = read_facts(out / "rank.plan")
    assert facts.weight_streaming
    (profile,) = facts.profiles
    most = {axis: r.most for axis, r in profile.axes.items()}
    assert most == {"batch": 2, "history": 32, "candidate": 16}


def test_profiles_are_made_to_fit_in_the_workspace(
    model: TinyTorchModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention over 1024 places: 32 requests of 4 MiB are more than 64 MiB."""
    source = tmp_path / "onnx"
    one_graph(source, model.bundle, attention(), [X], [Y])
    take_longer_histories(source, 1024)
    with caplog.at_level(logging.INFO):
        out = export(source, model, batches=[1, 32], workspace_mib=64)
    one, many = read_facts(out / "any.plan").profiles
    assert one.axes["history"].most == 1024
    assert many.batch * many.axes["history"].most ** 2 * 4 <= 64 * 2**20
    assert many.axes["history"].most >= many.axes["history"].typical == 8
    assert "is made to fit" in caplog.text


def take_longer_histories(source: Path, longest: int) -> None:
    ensemble = Ensemble.read(source)
    longer = replace(ensemble.axes["history"], maximum=longest)
    replace(ensemble, axes={**ensemble.axes, "history": longer}).write(source)


def attention() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "xt"], ["scores"]),
        helper.make_node("Sigmoid", ["scores"], ["weights"]),
        helper.make_node("MatMul", ["weights", "x"], ["y"]),
    ]
    return onnx.shape_inference.infer_shapes(finished(graph(nodes)))


# ── The cache of plans ────────────────────────────────────────────────────────────────────────


def test_a_plan_is_built_once(
    source: Path, model: TinyTorchModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = export(source, model, name="first")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        second = export(source, model, name="second")
    assert caplog.text.count("was built before") == 2
    assert contents(first).keys() == contents(second).keys()
    assert contents(first)["rank.plan"] == contents(second)["rank.plan"]
    assert contents(first)["rank.plan.json"] == contents(second)["rank.plan.json"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        export(source, model, name="third", max_history=64)
        export(source, model, name="fourth", target="sm86")
        export(source, model, name="fifth", tf32=True)
        export(source, model, name="sixth", plan_cache_mib=0)
    assert "was built before" not in caplog.text


def contents(folder: Path) -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("damage", ["truncated", "altered", "unknown", "other version"])
def test_what_is_damaged_is_built_anew(
    damage: str, source: Path, model: TinyTorchModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = export(source, model, name="first")
    for plan in plan_cache.folder().glob("*.plan"):
        beside = plan.with_name(plan.name + ".json")
        content = bytearray(plan.read_bytes())
        if damage == "truncated":
            plan.write_bytes(content[: len(content) // 2])
        elif damage == "altered":
            content[-1] ^= 1
            plan.write_bytes(content)
        elif damage == "unknown":
            beside.unlink()
        else:
            beside.write_text(json.dumps({**json.loads(beside.read_text()), "version": "1.7.0.9"}))
    with caplog.at_level(logging.WARNING):
        second = export(source, model, name="second")
    assert caplog.text.count("is built anew") == 2
    for file in ("rank.plan", "retrieve.plan"):
        read(second / file)
        assert read_facts(second / file).profiles == read_facts(first / file).profiles
    assert {len(list(plan_cache.folder().glob(f"*{end}"))) for end in (".plan", ".json")} == {2}


def test_the_cache_is_bounded(source: Path, model: TinyTorchModel) -> None:
    for number, history in enumerate((16, 32, 64)):
        export(source, model, name=f"{number}", max_history=history, plan_cache_mib=3)
    sizes = [file.stat().st_size for file in plan_cache.folder().glob("*.plan")]
    assert 1 <= len(sizes) < 6
    assert sum(sizes) <= 3 * 2**20


def test_a_cache_that_cannot_be_written(
    cache: Path, source: Path, model: TinyTorchModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    out = export(source, model)
    read(out / "rank.plan")
    assert "is not kept" in caplog.text


# ── What cannot be built ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (a_node("Det"), ("'the_node' (Det", "no such operator", "onnxruntime")),
        (
            helper.make_node("Fused", ["x"], ["y"], name="the_node", domain="com.example"),
            ("'the_node' (Fused", "there is no such operator", "plugin"),
        ),
        (
            helper.make_node("Add", ["x", "half"], ["y"], name="the_node"),
            ("'the_node' (Add", "types Float and Half", "put a Cast"),
        ),
    ],
    ids=["no operator of TensorRT", "no operator of ONNX", "mixed types"],
)
def test_a_node_that_cannot_be_read(
    node: onnx.NodeProto, words: Sequence[str], model: TinyTorchModel, tmp_path: Path
) -> None:
    half = numpy_helper.from_array(np.array(1, np.float16), "half")
    made = finished(graph([node], [half] if "half" in node.input else []))
    made.opset_import.append(helper.make_opsetid("com.example", 1))
    one_graph(tmp_path / "onnx", model.bundle, made, [X], [Y])
    message = refusal(tmp_path / "onnx", model)
    for word in ("any.onnx: node 0", "computes y", *words):
        assert word in message


@pytest.mark.parametrize(
    ("opset", "ir", "words"),
    [
        (99, IR, "made with opset 99; TensorRT reads opsets 9 to 24"),
        (6, IR, "made with opset 6"),
        (OPSET, 99, "made with IR version 99"),
    ],
)
def test_a_graph_of_another_time(
    opset: int, ir: int, words: str, model: TinyTorchModel, tmp_path: Path
) -> None:
    made = finished(graph([a_node()]), opset, ir)
    one_graph(tmp_path / "onnx", model.bundle, made, [X], [Y])
    assert words in refusal(tmp_path / "onnx", model)


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_graph_that_is_none(content: bytes | None, model: TinyTorchModel, tmp_path: Path) -> None:
    source = tmp_path / "onnx"
    one_graph(source, model.bundle, finished(graph([a_node()])), [X], [Y])
    if content is None:
        (source / "any.onnx").unlink()
    else:
        (source / "any.onnx").write_bytes(content)
    assert "export the model to onnx again" in refusal(source, model)


def test_an_axis_of_unknown_length(model: TinyTorchModel, tmp_path: Path) -> None:
    strange = [Tensor(tensor.name, "float32", ("session", 16)) for tensor in (X, Y)]
    one_graph(tmp_path / "onnx", model.bundle, finished(graph([a_node()])), *([t] for t in strange))
    assert "axis 'session'" in refusal(tmp_path / "onnx", model)


def test_a_workspace_that_is_too_small(model: TinyTorchModel, tmp_path: Path) -> None:
    one_graph(tmp_path / "onnx", model.bundle, attention(), [X], [Y])
    take_longer_histories(tmp_path / "onnx", 1024)
    message = refusal(tmp_path / "onnx", model, workspace_mib=18)
    for words in ("history 1024", "takes 4.0 MiB", "workspace_mib=18", "max_history"):
        assert words in message


@needs_no_gpu
def test_without_a_target_and_a_gpu(source: Path, model: TinyTorchModel) -> None:
    message = refusal(source, model, target="current")
    assert "no CUDA device" in message
    assert "--option target=sm89" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "sm90"}, "library=tensorrt"),
        ({"target": "sm999"}, "only for sm75, sm80"),
        ({"target": "current,sm89"}, "'current' cannot be built with others"),
        ({"target": ""}, "target is ''"),
        ({"library": "tensorrt"}, "tensorrt is not installed"),
        ({"library": "trt"}, "library is 'trt'"),
        ({"batches": [4, 1]}, "batches is [4, 1]"),
        ({"batches": []}, "batches is []"),
        ({"batches": "1"}, "batches is '1'"),
        ({"max_history": -1}, "max_history is -1"),
        ({"workspace_mib": 0}, "workspace_mib is 0"),
        ({"tf32": 1}, "tf32 is 1"),
        ({"refit": True}, "refit is true"),
        ({"no_such_option": 1}, "no option 'no_such_option'"),
    ],
)
def test_wrong_options(
    options: Mapping[str, object], words: str, source: Path, model: TinyTorchModel
) -> None:
    if options.get("library") == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        from gr_trt.tensorrt import library

        if "tensorrt" in library.installed():
            pytest.skip("tensorrt is installed here")
    assert words in refusal(source, model, **options)


# ── What is interrupted ───────────────────────────────────────────────────────────────────────


def test_a_build_can_be_interrupted(model: TinyTorchModel, tmp_path: Path) -> None:
    source, out = tmp_path / "onnx", tmp_path / "out"
    one_graph(source, model.bundle, long_chain(), [X], [Y])
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            export(source, model)
    finally:
        timer.cancel()
    assert not list(out.iterdir())
    assert not list(plan_cache.folder().glob("*"))
    assert "tensorrt-build" not in [thread.name for thread in threading.enumerate()]


def long_chain() -> onnx.ModelProto:
    """Takes a second or more to build."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for number in range(100):
        values = rng.normal(size=(16, 16)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"]))
        last = f"s{number}" if number < 99 else "y"
        nodes.append(helper.make_node("Softmax", [f"h{number}"], [last], axis=-1))
    return finished(graph(nodes, weights))


FULL_DISK = """
import resource, sys
from pathlib import Path
from gr_core.contracts import Artifact, ExportOptions
from gr_core.errors import GrError
from gr_core.repository import Bundle
from gr_core.repository.bundle import atomic_folder
from gr_core.testing.tiny import TinyModel
from gr_trt.tensorrt.exporter import TensorRTExporter

source, bundle, out = map(Path, sys.argv[1:])
model = TinyModel(Bundle.open(bundle))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_folder(out) as partial:
        options = ExportOptions(extra={"target": "sm89"})
        TensorRTExporter().export(Artifact("onnx", source), model, partial, options)
except GrError as error:
    print(error)
"""


def test_a_full_disk(source: Path, model: TinyTorchModel, cache: Path) -> None:
    """A process that may not write files of more than 100 kB, as a full disk would not let it."""
    out = source.parent / "folder" / "out"
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(model.bundle.path), str(out)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GR_CACHE_DIR": str(cache)},
    )
    assert "retrieve.plan: no room for" in found.stdout
    assert not list(out.parent.iterdir()), "nothing half-written"
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_int8_for_cpus_is_not_read(source: Path, model: TinyTorchModel) -> None:
    made = replace(Ensemble.read(source), dtype="int8", notes={"int8": {"activations": "uint8"}})
    made.write(source)
    assert "int8 is made for CPUs (activations uint8), which TensorRT" in refusal(source, model)
