"""Plans of the models of gr-hstu, and the engine `tensorrt` on their graphs.

Without a GPU the plans are built, not run: the engine then decides by their profiles what to run,
and ONNX Runtime runs it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import gr_hstu
from gr_core import Task
from gr_core.contracts import Artifact, EngineOptions, ExportOptions, Model
from gr_core.devices import Device, Machine
from gr_core.errors import FailedPrecondition
from gr_core.planner import plan
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.samples import for_task, sample_requests
from gr_core.testing import EngineSuite, ExporterSuite, installed
from gr_hstu.model import HSTUModel
from gr_hstu.testing import Users, a_request, encode, engine_of, load, write
from gr_kernels.cache.paged import PagedCache
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.export.exporter import OnnxExporter
from gr_trt.tensorrt.engine import TensorRTEngine
from gr_trt.tensorrt.exporter import TensorRTExporter
from gr_trt.tensorrt.options import TensorRTOptions
from gr_trt.tensorrt.plan_file import read
from gr_trt.tensorrt.profiles import Profile

BUNDLES = Path(gr_hstu.__file__).parent / "bundles"
SHIPPED = {"kuairand-retrieval": Task.RETRIEVE, "kuairand-ranking": Task.RANK}

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@dataclasses.dataclass
class Source:
    """A model and a folder of its graphs of one task."""

    model: HSTUModel
    task: Task
    graphs: Path


def source_of(bundle: Bundle, task: Task, folder: Path) -> Source:
    model = load(bundle)
    folder.mkdir(parents=True)
    options = ExportOptions(extra={"tasks": [task.value]})
    OnnxExporter().export(Artifact("torch", bundle.path), model, folder, options)
    return Source(model, task, folder)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Source]:
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: source_of(Bundle.open(BUNDLES / name / "1"), task, folder / name)
        for name, task in SHIPPED.items()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of random weights, with K and V that stay true when a history grows."""
    folder = tmp_path_factory.mktemp("small")
    return source_of(write(folder, "research"), Task.RANK, folder / "graphs")


def plans_of(source: Source, out: Path, **options: Any) -> Path:
    out.mkdir()
    given = ExportOptions(extra={"target": "sm89", **options})
    TensorRTExporter().export(Artifact("onnx", source.graphs), source.model, out, given)
    return out


# ── Plans ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("kuairand-retrieval", "sm80"),
        ("kuairand-retrieval", "sm120"),
        *((name, "sm89") for name in SHIPPED),
    ],
)
def test_plans_of_the_shipped_bundles(
    name: str, target: str, shipped: Mapping[str, Source], tmp_path: Path
) -> None:
    source = shipped[name]
    out = plans_of(source, tmp_path / "plans", target=target)
    ensemble, given = Ensemble.read(out), Ensemble.read(source.graphs)
    assert [graph.name for graph in ensemble.graphs] == [graph.name for graph in given.graphs]
    assert {Role.SINGLE_PASS, Role.PREFILL, Role.DECODE} <= {g.role for g in ensemble.graphs}
    assert (Role.TOP_K in {g.role for g in ensemble.graphs}) == (source.task is Task.RETRIEVE)
    for graph in ensemble.graphs:
        _, facts = read(out / graph.file)
        assert facts.targets == (target,)
        assert facts.layers
        one, many = facts.profiles
        assert (one.batch, many.batch) == (1, 32)
        for axis, r in one.axes.items():
            if axis in given.axes:
                lengths = given.axes[axis]
                assert (r.least, r.most) == (1, lengths.maximum)
                assert r.typical <= lengths.typical


def test_the_whole_chain(environment: Mapping[str, str], tmp_path: Path) -> None:
    """From the command line, for three kinds of GPU at once, in float16."""
    command = ["gr", "export", "kuairand-ranking", "--models", str(BUNDLES), "--format", "tensorrt"]
    options = ["--target", "sm80,sm89,sm120", "--precision", "float16", "--out", "plans"]
    made = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert "torch → onnx → tensorrt: wrote plans" in made.stdout
    out = tmp_path / "plans"
    ensemble = Ensemble.read(out)
    assert ensemble.dtype == "float16"
    assert ensemble.notes["tensorrt"]["targets"] == ["sm80", "sm89", "sm120"]
    for graph in ensemble.graphs:
        _, facts = read(out / graph.file)
        assert facts.network["by_dtype"]["HALF"] > 50
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


# ── What the planner makes of it ──────────────────────────────────────────────────────────────


@needs_no_gpu
def test_auto_goes_on_without_a_gpu(environment: Mapping[str, str], tmp_path: Path) -> None:
    command = ["gr", "plan", "kuairand-ranking", "--models", str(BUNDLES)]
    told = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    (entry,) = json.loads(told.stdout)
    assert entry["engine"] != "tensorrt"
    assert "not tensorrt: no CUDA device" in entry["reason"]
    chains = [c for c in entry["considered"] if c["chain"] == ["onnx", "tensorrt", "tensorrt"]]
    assert chains
    assert all("no CUDA device" in chain["verdict"] for chain in chains)
    explained = subprocess.run(
        [*command, "--explain"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "onnx → tensorrt → tensorrt (cuda, float16)" in explained.stdout
    refused = subprocess.run(
        [*command, "--strategy", "tensorrt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    assert "no CUDA device" in refused.stdout + refused.stderr


@needs_no_gpu
def test_a_gpu_that_torch_cannot_use() -> None:
    """The driver is there, this build of torch is for the CPU: the engine is passed over."""
    gpu = Machine((Device("cpu", "cpu"), Device("cuda:0", "NVIDIA L4")))
    chosen = plan(installed(), "mtgr", Task.RANK, on=gpu)
    assert chosen.engine.name != "tensorrt"
    assert "not tensorrt: this machine has no CUDA device that torch can use" in chosen.reason


# ── The engine, its graphs run by ONNX Runtime ────────────────────────────────────────────────


class OnnxRunner:
    """Implements `gr_trt.tensorrt.runner.Runner`; takes what a plan's profiles take."""

    def __init__(self, path: Path, profiles: tuple[Profile, ...]) -> None:
        self.profiles = profiles
        self._session = onnxruntime.InferenceSession(path)

    def start(self, profile: int, sizes: Mapping[str, int], arrays: Mapping[str, Any]) -> Done:
        for axis, size in sizes.items():
            assert self.profiles[profile].axes[axis].within(size), (axis, size)
        names = [output.name for output in self._session.get_outputs()]
        return Done(dict(zip(names, self._session.run(names, dict(arrays)), strict=True)))

    def close(self) -> None:
        self._session = None


@dataclasses.dataclass
class Done:
    """Implements `gr_trt.tensorrt.runner.Pending`."""

    outputs: Mapping[str, Any]

    def result(self) -> Mapping[str, Any]:
        return self.outputs


def engine_on(source: Source, plans: Path, cache: PagedCache | None = None) -> TensorRTEngine:
    def open_graph(
        folder: Path, graph: Graph, options: EngineOptions, own: TensorRTOptions
    ) -> OnnxRunner:
        _, facts = read(folder / graph.file)
        return OnnxRunner(source.graphs / f"{graph.name}.onnx", facts.profiles)

    engine = TensorRTEngine(open_graph)
    caches = {} if cache is None else {"user_kv": cache}
    options = EngineOptions(caches=caches)
    engine.load(Artifact("tensorrt", plans), source.model, [source.task], options)
    return engine


@pytest.mark.parametrize("name", SHIPPED)
def test_answers_in_the_sizes_of_profiles(
    name: str, shipped: Mapping[str, Source], tmp_path: Path
) -> None:
    source = shipped[name]
    engine = engine_on(source, plans_of(source, tmp_path / "plans", batches=[1, 4]))
    engine.warm_up()
    batch = [
        dataclasses.replace(
            source.model.encode(for_task(request, source.task), source.task).request, k=10
        )
        for request in sample_requests(source.model, 7)
    ]
    right = engine_of(source.model).infer(batch)
    for one, other in zip(engine.infer(batch), right, strict=True):
        scale = float(np.abs(other.scores).max())
        np.testing.assert_allclose(one.scores / scale, other.scores / scale, atol=1e-5)
        if source.task is Task.RETRIEVE:
            np.testing.assert_array_equal(one.indices, other.indices)


def test_reuse_under_fire(small: Source, tmp_path: Path) -> None:
    """In steps on cached K and V: users whose histories grow, change and are cut."""
    plans = plans_of(small, tmp_path / "plans", batches=[1, 3], max_candidates=16)
    cached = engine_on(small, plans, PagedCache(3 << 16))
    reference = engine_of(small.model)
    users = Users(seed=3, users=8)
    reused = 0
    for number in range(60):
        count = int(users.random.integers(1, 6))
        batch = [encode(small.model, small.task, users.request()) for _ in range(count)]
        found = cached.infer(batch)
        for one, other in zip(found, reference.infer(batch), strict=True):
            scale = max(float(np.abs(other.scores).max(initial=0)), 1e-6)
            np.testing.assert_allclose(
                one.scores / scale, other.scores / scale, atol=2e-5, err_msg=f"batch {number}"
            )
        reused += sum(result.tokens_reused for result in found)
    assert reused > 500
    cached.close()


@pytest.mark.parametrize("cached", [False, True], ids=["single pass", "in steps"])
def test_more_candidates_than_the_profiles(cached: bool, small: Source, tmp_path: Path) -> None:
    """They are scored in several runs, since none sees another."""
    plans = plans_of(small, tmp_path / "plans", max_candidates=16)
    batch = [
        encode(small.model, small.task, a_request(length=9, candidates=count, seed=count))
        for count in (50, 3, 17)
    ]
    engine = engine_on(small, plans, PagedCache(1 << 20) if cached else None)
    for found, right in zip(engine.infer(batch), engine_of(small.model).infer(batch), strict=True):
        assert found.scores.shape == right.scores.shape
        np.testing.assert_allclose(found.scores, right.scores, atol=1e-5)


def test_a_longer_history_than_the_profiles(small: Source, tmp_path: Path) -> None:
    engine = engine_on(small, plans_of(small, tmp_path / "plans", max_history=8))
    request = encode(small.model, small.task, a_request(length=9))
    with pytest.raises(FailedPrecondition) as error:
        engine.infer([request])
    for words in ("history 9", "rank.plan", "batch-32", "history 1 to 8", "max_history=9"):
        assert words in str(error.value)


class PlansAndGraphsExporter:
    """onnx → tensorrt, with the graphs beside their plans."""

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        given = dataclasses.replace(options, extra={"target": "sm89", **options.extra})
        made = TensorRTExporter().export(artifact, model, out_dir, given)
        for file in artifact.path.glob("*.onnx"):
            shutil.copy(file, out_dir)
        return made


def make_engine() -> TensorRTEngine:
    def open_graph(
        folder: Path, graph: Graph, options: EngineOptions, own: TensorRTOptions
    ) -> OnnxRunner:
        _, facts = read(folder / graph.file)
        return OnnxRunner(folder / f"{graph.name}.onnx", facts.profiles)

    return TensorRTEngine(open_graph)


@pytest.mark.slow
class TestInSizesOfProfiles(EngineSuite):
    """What `TestOnGpu` asks, as far as it is decided without a GPU."""

    engine = "tensorrt"
    dtype = "float32"

    @pytest.fixture(params=SHIPPED)
    def bundle(self, request: pytest.FixtureRequest) -> Bundle:
        return Bundle.open(BUNDLES / request.param / "1")

    @pytest.fixture
    def registry(self) -> Registry:
        known = installed()
        return Registry.of(
            *known.models.declared(),
            known.engines["torch"],
            known.exporters["onnx"],
            dataclasses.replace(
                known.exporters["tensorrt"], factory=f"{__name__}:PlansAndGraphsExporter"
            ),
            dataclasses.replace(
                known.engines["tensorrt"],
                factory=f"{__name__}:make_engine",
                devices=("cpu",),
                dtypes=("float32",),
                device_probe=None,
            ),
        )


# ── On a GPU ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
class TestExporterOnGpu(ExporterSuite):
    exporter = "tensorrt"

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write(tmp_path, "ranking")


class OnGpu(EngineSuite):
    engine = "tensorrt"
    device = "cuda"

    @pytest.fixture(params=SHIPPED)
    def bundle(self, request: pytest.FixtureRequest) -> Bundle:
        return Bundle.open(BUNDLES / request.param / "1")


@pytest.mark.gpu
class TestOnGpuInFloat32(OnGpu):
    dtype = "float32"


@pytest.mark.gpu
class TestOnGpuInFloat16(OnGpu):
    dtype = "float16"


@pytest.mark.gpu
class TestOnGpuInBfloat16(OnGpu):
    dtype = "bfloat16"


@pytest.mark.gpu
class TestOnGpuInInt8(OnGpu):
    dtype = "int8"


@pytest.mark.gpu
class TestOnGpuLaunchByLaunch(OnGpu):
    dtype = "float16"
    options = {"cuda_graphs": False, "contexts": 1}  # noqa: RUF012
