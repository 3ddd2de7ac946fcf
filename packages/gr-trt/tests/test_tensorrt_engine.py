"""The engine `tensorrt` without a GPU: real plans' profiles, graphs run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from gr_core import EngineDescriptor, ExporterDescriptor, Task
from gr_core.contracts import Artifact, EncodedRequest, EngineOptions, ExportOptions, Model
from gr_core.errors import BundleError, FailedPrecondition, GrError, PlanError
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.samples import for_task, sample_requests
from gr_core.testing import EngineSuite
from gr_core.testing.tiny import TASKS, TinyEngine, tiny_registry, write_tiny_bundle
from gr_trt.ensemble import FILE, Ensemble
from gr_trt.tensorrt.engine import TensorRTEngine
from gr_trt.tensorrt.exporter import TensorRTExporter
from gr_trt.tensorrt.plan_file import read_facts
from gr_trt.tensorrt.verify import verify

from .tiny_onnx import (
    MODEL,
    TO_ONNX,
    OnnxRunner,
    TinyTorchModel,
    open_onnx,
    tiny_graph,
    write_graphs,
)

BUILD = {"target": "sm89", "batches": [1, 4]}

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


class PlansAndGraphsExporter:
    """onnx → tensorrt, with the graphs beside their plans for `OnnxRunner`."""

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        made = TensorRTExporter().export(
            artifact, model, out_dir, replace(options, extra={**BUILD, **options.extra})
        )
        for file in artifact.path.glob("*.onnx"):
            (out_dir / file.name).write_bytes(file.read_bytes())
        return made


def make_engine() -> TensorRTEngine:
    return TensorRTEngine(open_onnx)


class TestEngineOnItsProfiles(EngineSuite):
    """Batches are split, padded and rounded as on a GPU; answers are those of the model."""

    engine = "tensorrt"
    dtype = "float32"

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write_tiny_bundle(tmp_path)

    @pytest.fixture
    def registry(self) -> Registry:
        return Registry.of(
            MODEL,
            TO_ONNX,
            ExporterDescriptor(
                name="plans",
                factory=f"{__name__}:PlansAndGraphsExporter",
                source="onnx",
                target="tensorrt",
                tasks=TASKS,
            ),
            EngineDescriptor(
                name="tensorrt",
                factory=f"{__name__}:make_engine",
                formats=("tensorrt",),
                tasks=TASKS,
                devices=("cpu",),
                dtypes=("float32",),
            ),
            *(offer.descriptor for offer in tiny_registry().offers if offer.kind == "engines"),
        )


# ── A folder of plans of the tiny model ───────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyTorchModel:
    return TinyTorchModel(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def plans(model: TinyTorchModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base = tmp_path_factory.mktemp("plans")
    write_graphs(model, base / "onnx")
    (base / "tensorrt").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_CACHE_DIR", str(base / "cache"))
        return PlansAndGraphsExporter().export(
            Artifact("onnx", base / "onnx"), model, base / "tensorrt", ExportOptions()
        )


@pytest.fixture
def copied(plans: Artifact, tmp_path: Path) -> Artifact:
    """The same in a folder that a test may spoil."""
    for file in plans.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return Artifact("tensorrt", tmp_path)


def rank_requests(lengths: Sequence[tuple[int, int]]) -> list[EncodedRequest]:
    """Requests with given numbers of behaviours and candidates."""
    requests = []
    for number, (behaviours, candidates) in enumerate(lengths):
        rng = np.random.default_rng(number)
        arrays = {
            "items": rng.integers(1, 51, behaviours),
            "length": np.array(behaviours),
            "candidates": rng.integers(1, 51, candidates),
        }
        requests.append(EncodedRequest(Task.RANK, arrays, behaviours + candidates))
    return requests


def test_a_large_batch_is_computed_in_parts(model: TinyTorchModel, plans: Artifact) -> None:
    opened = []

    def remember(*given: object) -> object:
        opened.append(open_onnx(*given))  # type: ignore[arg-type]
        return opened[-1]

    engine = TensorRTEngine(remember)  # type: ignore[arg-type]
    engine.load(plans, model, [Task.RANK], EngineOptions())
    batch = rank_requests([(n % 80, 1 + n % 60) for n in range(0, 130, 13)])
    results = engine.infer(batch)
    shapes = opened[0].shapes
    assert sum(shape["batch"] for shape in shapes) >= len(batch)
    assert max(shape["batch"] for shape in shapes) == 4
    reference = TinyEngine()
    reference.load(Artifact("numpy", plans.path), model, [Task.RANK], EngineOptions())
    for request, result in zip(batch, results, strict=True):
        (right,) = reference.infer([request])
        np.testing.assert_allclose(result.scores, right.scores, rtol=1e-4, atol=1e-4)
    engine.close()


def test_shapes_repeat(model: TinyTorchModel, plans: Artifact) -> None:
    opened = []

    def remember(*given: object) -> object:
        opened.append(open_onnx(*given))  # type: ignore[arg-type]
        return opened[-1]

    engine = TensorRTEngine(remember)  # type: ignore[arg-type]
    engine.load(plans, model, [Task.RANK], EngineOptions())
    for length in range(65, 73):
        engine.infer(rank_requests([(length, 33)]))
    assert opened[0].shapes == [{"batch": 1, "history": 72, "candidate": 36}] * 8


def test_a_request_beyond_the_profiles(model: TinyTorchModel, plans: Artifact) -> None:
    engine = make_engine()
    engine.load(plans, model, [Task.RANK], EngineOptions())
    with pytest.raises(FailedPrecondition) as error:
        engine.infer(rank_requests([(5, 5), (257, 5)]))
    for words in ("history 257", "rank.plan", "batch-4", "history 1 to 256", "max_history=257"):
        assert words in str(error.value)
    assert engine.infer(rank_requests([(256, 60)]))[0].scores.shape == (60, 2)


def test_more_candidates_than_the_profiles(plans: Artifact, model: TinyTorchModel) -> None:
    """That no candidate sees another is not known of every model."""
    engine = make_engine()
    engine.load(plans, model, [Task.RANK], EngineOptions())
    with pytest.raises(FailedPrecondition, match=r"candidate 61 .* --option max_candidates=61"):
        engine.infer(rank_requests([(5, 61)]))


# ── What it refuses to load ───────────────────────────────────────────────────────────────────


def refusal(artifact: Artifact, model: TinyTorchModel, **options: object) -> str:
    engine = TensorRTEngine()
    with pytest.raises(GrError) as error:
        engine.load(artifact, model, [Task.RANK], EngineOptions("cuda", **options))  # type: ignore[arg-type]
    assert not engine.health().ok
    assert isinstance(error.value, (BundleError, PlanError))
    return str(error.value)


@needs_no_gpu
def test_a_machine_without_a_gpu(model: TinyTorchModel, plans: Artifact) -> None:
    assert "no CUDA device" in refusal(plans, model)


def test_a_truncated_plan(model: TinyTorchModel, copied: Artifact) -> None:
    plan = copied.path / "rank.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "truncated" in refusal(copied, model)
    plan.write_bytes(b"vtrt")
    assert "truncated after 4 bytes" in refusal(copied, model)
    plan.write_bytes(b"")
    assert "not a plan" in refusal(copied, model)


def test_an_altered_plan(model: TinyTorchModel, copied: Artifact) -> None:
    plan = copied.path / "rank.plan"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    assert "SHA-256 differs" in refusal(copied, model)


def test_something_else_than_a_plan(model: TinyTorchModel, copied: Artifact) -> None:
    graph = (copied.path / "rank.onnx").read_bytes()
    (copied.path / "rank.plan").write_bytes(graph)
    assert "not a plan of TensorRT" in refusal(copied, model)


def test_a_plan_that_is_missing(model: TinyTorchModel, copied: Artifact) -> None:
    (copied.path / "rank.plan").unlink()
    assert "rank.plan: No such file" in refusal(copied, model)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"magic": "gr-trt plan"}'])
def test_a_plan_that_nothing_is_known_of(
    content: str | None, model: TinyTorchModel, copied: Artifact
) -> None:
    beside = copied.path / "rank.plan.json"
    if content is None:
        beside.unlink()
    else:
        beside.write_text(content)
    assert "rank.plan.json: " in refusal(copied, model)


def test_plans_of_other_weights(model: TinyTorchModel, plans: Artifact, tmp_path: Path) -> None:
    other = TinyTorchModel(write_tiny_bundle(tmp_path, version="2"))
    assert "export the model again" in refusal(plans, other)


def test_plans_of_another_precision(model: TinyTorchModel, plans: Artifact) -> None:
    assert "made in float32, asked for int8" in refusal(plans, model, dtype="int8")


def test_a_task_without_a_plan(model: TinyTorchModel, copied: Artifact) -> None:
    ensemble = Ensemble.read(copied.path)
    replace(ensemble, graphs=ensemble.graphs[:1]).write(copied.path)
    assert "has no graph single_pass for rank, only retrieve" in refusal(copied, model)


def test_an_ensemble_that_is_damaged(model: TinyTorchModel, copied: Artifact) -> None:
    (copied.path / FILE).write_text("{")
    assert "export the model again" in refusal(copied, model)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"contexts": 0}, "contexts is 0"),
        ({"cuda_graphs": 2}, "cuda_graphs is 2"),
        ({"weight_budget_mib": -1}, "weight_budget_mib is -1"),
        ({"library": "trt"}, "library is 'trt'"),
        ({"kontexts": 1}, "no option 'kontexts'"),
    ],
)
def test_wrong_options(
    extra: dict[str, object], words: str, model: TinyTorchModel, plans: Artifact
) -> None:
    assert words in refusal(plans, model, extra=extra)


# ── A plan and the GPU that it is for ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "given", "words"),
    [
        ({}, {"capability": "sm90"}, "built for sm89, this GPU is sm90"),
        ({}, {"version": "1.7.2.1"}, "plans are for one version alone"),
        ({}, {"library": "tensorrt", "version": "11.0.0.1"}, "not by tensorrt"),
        ({"platform": "win32-amd64"}, {}, "was built for win32-amd64"),
        ({"device": "NVIDIA L4"}, {"capability": "sm120"}, "on NVIDIA L4 for sm89"),
    ],
)
def test_a_plan_of_another_machine(
    change: dict[str, str], given: dict[str, str], words: str, plans: Artifact
) -> None:
    from gr_trt.tensorrt.plan_file import check

    path = plans.path / "rank.plan"
    facts = replace(read_facts(path), **change)
    here = {"library": facts.library, "version": facts.version, "capability": "sm89", **given}
    with pytest.raises(BundleError, match=words):
        check(path, facts, **here)
    check(path, read_facts(path), facts.library, facts.version, "sm89")


def test_samples_are_scored(model: TinyTorchModel, plans: Artifact) -> None:
    """What `warm_up` asks, and what it asks with."""
    engine = make_engine()
    assert not engine.health().ok
    engine.load(plans, model, list(TASKS), EngineOptions())
    engine.warm_up()
    assert engine.health().ok
    for task in TASKS:
        (sample,) = sample_requests(model, 1)
        request = replace(model.encode(for_task(sample, task), task).request, k=3)
        (result,) = engine.infer([request])
        assert np.isfinite(result.scores).all()
    engine.close()
    engine.close()
    assert not engine.health().ok


# ── Plans against torch, as the exporter compares them on a GPU ───────────────────────────────


def test_plans_that_agree_with_torch(model: TinyTorchModel, plans: Artifact) -> None:
    opened: list[OnnxRunner] = []

    def remember(*given: Any) -> OnnxRunner:
        opened.append(open_onnx(*given))
        return opened[-1]

    verify(plans.path, Ensemble.read(plans.path), model, "cpu", remember)
    assert [max(shape["batch"] for shape in runner.shapes) for runner in opened] == [4, 4]


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_plans_that_do_not_are_not_given_away(
    factor: float, model: TinyTorchModel, copied: Artifact
) -> None:
    spoiled = model.vectors * np.float32(factor)
    onnx.save(tiny_graph(spoiled, Task.RANK), copied.path / "rank.onnx")
    with pytest.raises(GrError, match=r"rank\.plan: its answers differ from torch by"):
        verify(copied.path, Ensemble.read(copied.path), model, "cpu", open_onnx)
