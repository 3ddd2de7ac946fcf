"""int8 of the shipped models and of others: quality is measured, and guarded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gr_core import Task
from gr_core.contracts import Artifact, EngineOptions, ExportOptions
from gr_core.errors import GrError, InvalidRequest, PlanError
from gr_core.labelled import EVALUATION, labelled_requests
from gr_core.repository import ModelRepository
from gr_core.samples import SAMPLES, for_task, sample_requests
from gr_hstu.model import HSTUModel
from gr_hstu.testing import load, write
from gr_trt.ensemble import Ensemble, Role
from gr_trt.export.exporter import OnnxExporter
from gr_trt.onnx_runtime.engine import OnnxRuntimeEngine
from gr_trt.quantization import QuantizationOptions, check_quality, quantize_ensemble


def exported(model: HSTUModel, out: Path, **extra: object) -> Path:
    out.mkdir()
    artifact = Artifact("torch", model.bundle.path)
    OnnxExporter().export(artifact, model, out, ExportOptions(extra=extra))
    return out


@pytest.fixture(scope="module")
def shipped() -> Iterator[HSTUModel]:
    model = load(ModelRepository("package:gr_hstu/bundles").bundle("kuairand-retrieval"))
    yield model
    model.close()


@pytest.fixture(scope="module")
def graphs(shipped: HSTUModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, for retrieval."""
    return exported(shipped, tmp_path_factory.mktemp("graphs") / "float32", tasks=["retrieve"])


def test_the_shipped_model_answers_as_before(
    shipped: HSTUModel, graphs: Path, tmp_path: Path
) -> None:
    made = quantize_ensemble(graphs, tmp_path, shipped, QuantizationOptions())
    assert Ensemble.read(tmp_path) == made
    assert made.dtype == "int8"
    for graph in made.graphs:
        facts, sizes = made.notes["int8"]["graphs"][graph.name], []
        for folder in (tmp_path, graphs):
            sizes.append((folder / graph.file).stat().st_size)
        assert graph.parity is not None
        if graph.role is Role.TOP_K:
            assert (facts["products"], graph.parity.max_error < 1e-4) == (0, True)
        else:
            assert facts["products"] >= 4, "two layers of two"
            assert facts["tables"] == 1
            assert 0.001 < graph.parity.max_error < 0.1
            assert sizes[0] < 0.4 * sizes[1]
            metadata = onnx.load(str(tmp_path / graph.file)).metadata_props
            assert {"gr.dtype": "int8", "gr.model": "kuairand-retrieval"}.items() <= {
                entry.key: entry.value for entry in metadata
            }.items()
    quality = made.notes["int8"]["quality"]["retrieve"]
    assert quality["labelled"]
    assert quality["requests"] == len(labelled_requests(shipped))
    assert quality["overlap"] > 0.95
    before, after = (quality[dtype]["ndcg@10"] for dtype in ("float32", "int8"))
    assert 0.05 < before < 0.08
    assert after == pytest.approx(before, abs=0.004)


def test_known_prefixes_are_reused_in_int8(
    shipped: HSTUModel, graphs: Path, tmp_path: Path
) -> None:
    """A decode takes K and V of the quantized prefill; their ranges are found apart."""
    ort = pytest.importorskip("onnxruntime")
    made = quantize_ensemble(graphs, tmp_path, shipped, QuantizationOptions())
    prefill, decode = (made.graph(role, Task.RETRIEVE) for role in (Role.PREFILL, Role.DECODE))
    assert prefill is not None
    assert decode is not None
    (request,) = (
        shipped.encode(for_task(one, Task.RETRIEVE), Task.RETRIEVE).request
        for one in sample_requests(shipped, 1)
    )
    sequence = shipped.sequence(request)
    past = 30
    assert sequence.history > past

    def run(graph_file: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(str(tmp_path / graph_file))
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))

    whole = {n: np.asarray(a)[None] for n, a in shipped.step_arrays(request, sequence, 0).items()}
    first = run(prefill.file, {tensor.name: whole[tensor.name] for tensor in prefill.inputs})
    rest = {n: np.asarray(a)[None] for n, a in shipped.step_arrays(request, sequence, past).items()}
    rest |= {f"past_{name}": first[name][:, :, :past] for name in ("keys", "values")}
    second = run(decode.file, {tensor.name: rest[tensor.name] for tensor in decode.inputs})
    difference = np.abs(first["user"] - second["user"]).max() / np.abs(first["user"]).max()
    assert difference < 0.05


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_error": 0.001}, "max_error"),
        ({"min_overlap": 1.0, "quantize_top_k": True}, "min_overlap"),
    ],
)
def test_quality_under_a_bound_is_refused(
    shipped: HSTUModel, graphs: Path, tmp_path: Path, bounds: dict[str, float], message: str
) -> None:
    with pytest.raises(GrError, match=message) as caught:
        quantize_ensemble(graphs, tmp_path, shipped, QuantizationOptions(**bounds))  # type: ignore[arg-type]
    assert "keep_float" in str(caught.value)


def test_a_loss_on_labelled_requests_is_refused(
    shipped: HSTUModel, graphs: Path, tmp_path: Path
) -> None:
    after = tmp_path / "after"
    shutil.copytree(graphs, after)
    ensemble = replace(Ensemble.read(graphs), dtype="int8")
    ensemble.write(after)
    same = check_quality(graphs, after, shipped, QuantizationOptions())["retrieve"]
    assert (same["overlap"], same["float32"]) == (1.0, same["int8"])

    top_k = ensemble.graph(Role.TOP_K, Task.RETRIEVE)
    assert top_k is not None
    model = onnx.load(str(after / top_k.file))
    table = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    noise = np.random.default_rng(0).standard_normal(tuple(table.dims)).astype(np.float32)
    right = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(right + right.std() * noise, table.name))
    onnx.save(model, str(after / top_k.file))
    with pytest.raises(GrError, match="min_overlap"):
        check_quality(graphs, after, shipped, QuantizationOptions())
    with pytest.raises(GrError, match=r"ndcg@10 falls from 0\.\d+ to 0\.\d+ in int8"):
        check_quality(graphs, after, shipped, QuantizationOptions(min_overlap=0.0))


def test_only_graphs_in_float32_are_quantized(
    shipped: HSTUModel, graphs: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(graphs, half)
    replace(Ensemble.read(graphs), dtype="float16").write(half)
    with pytest.raises(PlanError, match="is in float16; expected float32"):
        quantize_ensemble(half, tmp_path / "out", shipped, QuantizationOptions())


def test_calibration_from_a_file(shipped: HSTUModel, graphs: Path, tmp_path: Path) -> None:
    samples = shipped.bundle.path / SAMPLES
    for name, path in (("list", samples), ("labelled", shipped.bundle.path / EVALUATION)):
        out = tmp_path / name
        out.mkdir()
        options = QuantizationOptions(calibration=str(path), calibration_requests=5)
        made = quantize_ensemble(graphs, out, shipped, options)
        assert made.notes["int8"]["calibration"].startswith("5 requests")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"history": 3, "relevant": [1]}) + "\n")
    with pytest.raises(InvalidRequest, match=r"wrong\.jsonl:1\.history"):
        quantize_ensemble(graphs, tmp_path, shipped, QuantizationOptions(calibration=str(wrong)))


def test_a_model_without_labels_whose_weights_lie_beside_its_graphs(tmp_path: Path) -> None:
    """For a GPU: symmetric, with float biases; the graphs go on sharing one file of weights."""
    model = load(write(tmp_path / "models", "ranking"))
    out = tmp_path / "int8"
    out.mkdir()
    bounds = {"inline_bytes": 0, "max_error": 0.2, "min_overlap": 0.7}
    options = ExportOptions(dtype="int8", extra={**bounds, "target": "sm89"})
    OnnxExporter().export(Artifact("torch", model.bundle.path), model, out, options)
    made = Ensemble.read(out)
    quality = made.notes["int8"]["quality"]["rank"]
    assert made.notes["int8"]["activations"] == "int8"
    assert (quality["labelled"], quality["requests"]) == (False, 64)
    assert {path.name for path in out.iterdir()} == {
        "ensemble.json",
        "weights.bin",
        *(graph.file for graph in made.graphs),
    }
    assert (out / "weights.bin").stat().st_size > 0
    engine = OnnxRuntimeEngine()
    engine.load(Artifact("onnx", out), model, [Task.RANK], EngineOptions(dtype="int8"))
    requests = [
        model.encode(for_task(one, Task.RANK), Task.RANK).request
        for one in sample_requests(model, 5)
    ]
    assert all(np.isfinite(result.scores).all() for result in engine.infer(requests))
    engine.close()
