"""Triton's own backends: the wheel brings neither, so all but the engine step itself runs here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from gr_core.contracts import Artifact, ExportOptions
from gr_core.plugins.host import PluginHost
from gr_core.repository import ModelRepository
from gr_core.types import RecommendRequest
from gr_trt.triton.exporter import TritonExporter
from gr_trt.triton.loading import load_answers, load_features, load_model
from gr_trt.triton.requests import request_text

from .conftest import BUNDLES, RANK, RANKING, RETRIEVAL, RETRIEVE, Asker, Recommend, assert_same

ENSEMBLES = {RETRIEVAL: RETRIEVE, RANKING: RANK}
BACKENDS = ("onnxruntime", "tensorrt")

Export = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def export(exported: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a bundle for a backend once; plans are built for another machine."""
    done: dict[tuple[str, str], Path] = {}

    def export(name: str, backend: str) -> Path:
        if (name, backend) not in done:
            bundle = ModelRepository(BUNDLES).bundle(name)
            model = PluginHost.discover().registry.models[bundle.architecture].resolve()(bundle)
            out = tmp_path_factory.mktemp(f"{backend}-{name}")
            graphs = exported[name] / f"{ENSEMBLES[name]}-engine" / "1" / "artifact"
            extra: dict[str, Any] = {"backend": backend, "triton_name": f"{backend}-{name}"}
            if backend == "tensorrt":
                extra |= {"target": "sm89", "plan_cache_mib": 0, "workspace_mib": 16384}
            TritonExporter().export(
                Artifact("onnx", graphs), model, out, ExportOptions(extra=extra)
            )
            done[name, backend] = out
        return done[name, backend]

    return export


def config(path: Path) -> Any:
    """A configuration as Triton reads it."""
    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_engine_is_configured_as_its_graph_is(name: str, backend: str, export: Export) -> None:
    engine = config(export(name, backend) / f"{backend}-{ENSEMBLES[name]}-engine")
    graphs = export(name, "onnxruntime") / f"onnxruntime-{ENSEMBLES[name]}-engine" / "1"
    session = ort.InferenceSession(graphs / "model.onnx", providers=["CPUExecutionProvider"])
    assert engine.backend == backend
    assert engine.instance_group[0].Kind.Name(engine.instance_group[0].kind) == (
        "KIND_GPU" if backend == "tensorrt" else "KIND_CPU"
    )
    for configured, own in (
        (engine.input, session.get_inputs()),
        (engine.output, session.get_outputs()),
    ):
        shapes = {}
        for tensor in configured:
            dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
            shapes[tensor.name] = (np.dtype(triton_to_np_dtype(kind)).name, [-1, *dims])
        assert shapes == {
            value.name: (
                {"tensor(int64)": "int64", "tensor(float)": "float32"}[value.type],
                [size if isinstance(size, int) else -1 for size in value.shape],
            )
            for value in own
        }


@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_same_steps_give_the_platforms_answers(
    name: str,
    export: Export,
    requests: Mapping[str, Sequence[RecommendRequest]],
    recommend: Recommend,
) -> None:
    """Features, the graph with the tensors that are configured, answer."""
    out, ensemble = export(name, "onnxruntime"), f"onnxruntime-{ENSEMBLES[name]}"
    session = ort.InferenceSession(
        out / f"{ensemble}-engine" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    engine = config(out / f"{ensemble}-engine")
    folders = [out / f"{ensemble}-{step}" / "1" for step in ("features", "answer")]
    features = load_features(folders[0], load_model(folders[0]))
    answers = load_answers(folders[1], load_model(folders[1]))
    sent = [
        replace(
            request,
            model=name,
            k=3 + place,
            candidates=None if name == RETRIEVAL else request.candidates,
        )
        for place, request in enumerate(requests[name])
    ]
    rows = [features.row(request_text(request)) for request in sent]
    tensors = features.tensors(rows)
    feeds = {}
    for tensor in engine.input:
        array = tensors[tensor.name]
        assert [size in (-1, own) for size, own in zip(tensor.dims, array.shape[1:], strict=True)]
        feeds[tensor.name] = array[:, 0] if tensor.HasField("reshape") else array
    output = engine.output[0].name
    tensors[output] = session.run([output], feeds)[0]
    for request, text in zip(sent, answers.texts(tensors), strict=True):
        assert_same(json.loads(text), recommend(request))
    lengths = {features.tensors([row])["history_items"].shape[1] for row in rows}
    assert lengths <= {8, 16, 32, 64}, "padded so that like lengths make a batch"


def test_triton_takes_all_but_the_backends_that_are_not_there(
    export: Export, servers: ModuleType, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ENSEMBLES:
        for backend in BACKENDS:
            shutil.copytree(export(name, backend), repository, dirs_exist_ok=True)
    options = ("--model-control-mode=explicit", "--exit-on-error=false")
    with servers.tritonserver(repository, tmp_path, *options) as triton:
        asker = Asker(triton.grpc)
        for backend in BACKENDS:
            for ensemble in ENSEMBLES.values():
                with pytest.raises(asker.triton.InferenceServerException) as refused:
                    asker.client.load_model(f"{backend}-{ensemble}-engine")
                missing = f"unable to find backend library for backend '{backend}'"
                assert missing in str(refused.value)
        for step in ("features", "answer"):  # with their warm-ups
            asker.client.load_model(f"onnxruntime-{RETRIEVE}-{step}")
            assert asker.client.is_model_ready(f"onnxruntime-{RETRIEVE}-{step}")


def test_a_damaged_step_is_not_loaded_and_says_why(
    exported: Mapping[str, Path], servers: ModuleType, tmp_path: Path
) -> None:
    """Cut off, of another release, and without a file: the message of each, no traceback."""
    repository = tmp_path / "repository"
    shutil.copytree(exported[RANKING], repository)
    catalogue = repository / f"{RANK}-features" / "1" / "bundle" / "catalogue.jsonl"
    content = catalogue.read_bytes()
    catalogue.unlink()  # a file of its own instead of a link
    catalogue.write_bytes(content[:-5])
    step = repository / f"{RANK}-answer" / "1" / "step.json"
    step.write_text(step.read_text().replace('version": 1', 'version": 2'))
    (repository / f"{RANK}-engine" / "1" / "artifact" / "rank.onnx").unlink()
    wrong = {
        "features": "catalogue.jsonl: ",
        "answer": "step.json: not a step of this release of gr-trt",
        "engine": "rank.onnx: ONNX Runtime ",
    }
    options = ("--model-control-mode=explicit", "--exit-on-error=false")
    with servers.tritonserver(repository, tmp_path, *options) as triton:
        asker = Asker(triton.grpc)
        for name, message in wrong.items():
            with pytest.raises(asker.triton.InferenceServerException) as refused:
                asker.client.load_model(f"{RANK}-{name}")
            assert message in str(refused.value)
            assert "Traceback" not in str(refused.value)
