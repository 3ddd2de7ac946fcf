"""What is exported is read back, computed, and compared; what vLLM cannot run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_core import Task
from gr_core.contracts import Artifact, ExportOptions
from gr_core.errors import GrError, PlanError
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.testing import ExporterSuite
from gr_core.testing.tiny import TinyModel, write_tiny_bundle
from gr_core.tokens import Readout
from gr_vllm.checkpoint import CONFIG, WEIGHTS, Checkpoint
from gr_vllm.export.exporter import VllmExporter, convert
from gr_vllm.export.verify import verify
from gr_vllm.plugin import gr_register_exporters

from .small_models import ITEMS, PLACES, Ranks, Retrieves, SmallModel, registry, small


def export(
    model: Any, folder: Path, dtype: str = "float32", device: str = "cpu", **extra: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    options = ExportOptions(device, dtype, extra)
    VllmExporter().export(Artifact("torch", model.bundle.path), model, folder, options)
    return folder


class TestExporter(ExporterSuite):
    exporter = "vllm"
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return write_tiny_bundle(tmp_path, items=ITEMS)

    @pytest.fixture
    def registry(self) -> Registry:
        (descriptor,) = gr_register_exporters()
        return registry(descriptor)


GATES = ("u*norm(a)", "u,norm(a),u*norm(a)", "u,a,u*norm(a)", "norm(a*u)")
SHAPES: dict[str, dict[str, Any]] = {
    **{gate: {"gate": gate, "head_norm": i % 2 == 1} for i, gate in enumerate(GATES)},
    "bare": {"norms": False, "biases": False, "projection_silu": "none", "places": False},
    "biased": {"positions": PLACES, "time_buckets": 12},
    "by position": {"positions": PLACES, "projection_silu": "u"},
    "by time": {"time_buckets": 30, "columns": 2},
    "two columns": {"columns": 2, "readout": "layer"},
    "groups": {"groups": 3, "head_norm": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Retrieves, Ranks])
def test_every_shape_of_stack(kind: type[SmallModel], shape: str, tmp_path: Path):
    if kind is Retrieves and shape == "groups":
        with pytest.raises(PlanError, match="3 groups of norms"):
            convert(small(tmp_path, kind, **SHAPES[shape]))
        return
    model = small(tmp_path, kind, **SHAPES[shape])
    folder = export(model, tmp_path / "out")
    assert verify(folder, model) < 1e-5
    checkpoint = Checkpoint.read(folder)
    assert checkpoint.causal
    assert checkpoint.role == ("retrieval" if kind is Retrieves else "ranking")


def test_tokens_are_sent_as_they_need_to_be(tmp_path: Path):
    def tokens(kind: type[SmallModel], **shape: Any) -> str:
        return convert(small(tmp_path, kind, **shape))[0].tokens

    assert tokens(Retrieves) == "ids"
    assert tokens(Retrieves, positions=PLACES) == "ids"
    assert tokens(Retrieves, columns=2) == "columns"
    assert tokens(Retrieves, time_buckets=9) == "columns"
    assert tokens(Ranks) == "rows"


def test_a_model_whose_tokens_see_later_ones_says_so(tmp_path: Path):
    folder = export(small(tmp_path, Ranks, sees_later=True), tmp_path / "out")
    assert not Checkpoint.read(folder).causal


class _WrongTables(Retrieves):
    def token_tables(self) -> Any:
        tables = super().token_tables()
        return type(tables)(tuple(1.01 * table for table in tables.tables), tables.places)


class _WrongReadout(Retrieves):
    def readout(self) -> Readout:
        return Readout(self.item_table(), "none", 0.0)


class _WrongOrder(Retrieves):
    """Its tokens are the history backwards."""

    def token_ids(self, sequence: Any) -> Any:
        return super().token_ids(sequence)[::-1]

    def embed(self, requests: Any, sequences: Any, starts: Any) -> Any:
        self.token_ids = super().token_ids  # type: ignore[method-assign]
        try:
            return super().embed(requests, sequences, starts)
        finally:
            del self.token_ids


@pytest.mark.parametrize("wrong", [_WrongTables, _WrongReadout, _WrongOrder])
def test_what_differs_from_the_model_is_not_exported(wrong: type[SmallModel], tmp_path: Path):
    model = small(tmp_path, wrong)
    with pytest.raises(GrError, match="differs from the model by"):
        export(model, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_weights_on_disk_are_what_is_compared(tmp_path: Path):
    """Not those in memory: one number changed afterwards shows."""
    from safetensors.torch import save_file

    model = small(tmp_path)
    folder = export(model, tmp_path / "out")
    tensors = load_file(folder / WEIGHTS)
    tensors["stack.layers.1.o_proj.weight"][0, 0] += 1.0
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(GrError, match="differs from the model by"):
        verify(folder, model)


def test_models_that_vllm_cannot_run_are_refused(tmp_path: Path):
    bundle = write_tiny_bundle(tmp_path, items=ITEMS)
    with pytest.raises(PlanError, match="TinyModel does not open its stack"):
        export(TinyModel(bundle), tmp_path / "out")
    closed = small(tmp_path, Ranks)
    closed.tasks = (Task.RETRIEVE,)
    with pytest.raises(PlanError, match="does not open the ends of its stack"):
        export(closed, tmp_path / "out")
    by_last = small(tmp_path, Retrieves)
    by_last.tasks = (Task.RANK,)
    with pytest.raises(PlanError, match="ranks by the last token of the history"):
        export(by_last, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "extra", "message"),
    [
        ("float64", {}, "dtype is 'float64'; expected one of float32"),
        ("float32", {"quantization": "fp8"}, "quantization is 'fp8'; expected one of none, int8"),
        ("float32", {"quantization": "awq"}, "awq', but dtype is 'float32'"),
        ("int8", {"quantization": "gptq"}, "'gptq', but dtype is 'int8'"),
        ("bfloat16", {"quantization": "gptq"}, "multiples of 32, but uvqk_proj of tiny has 8 in"),
        ("float32", {"quantisation": "int8"}, "no option 'quantisation'; there are: .*quantizat"),
    ],
)
def test_options_that_cannot_be(dtype: str, extra: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(PlanError, match=message):
        export(small(tmp_path), tmp_path / "out", dtype, **extra)
    assert not any((tmp_path / "out").iterdir())


def test_options_of_the_engine_are_let_through(tmp_path: Path):
    export(small(tmp_path), tmp_path / "out", tensor_parallel_size=2, quantization="none")


WIDE = {"d_model": 32, "d_qk": 16, "d_v": 16}


@pytest.mark.parametrize(
    ("dtype", "quantization", "computed", "kept"),
    [
        ("int8", "", "bfloat16", "int8"),
        ("float32", "int8", "float32", "int8"),
        ("bfloat16", "awq", "bfloat16", "awq"),
        ("float16", "gptq", "float16", "gptq"),
        ("bfloat16", "", "bfloat16", "none"),
    ],
)
@pytest.mark.parametrize("kind", [Retrieves, Ranks])
def test_quantized_weights(
    kind: type[SmallModel], dtype: str, quantization: str, computed: str, kept: str, tmp_path: Path
):
    model = small(tmp_path, kind, **WIDE)
    extra = {"quantization": quantization} if quantization else {}
    folder = export(model, tmp_path / "out", dtype, **extra)
    checkpoint = Checkpoint.read(folder)
    assert (checkpoint.dtype, checkpoint.quantization) == (computed, kept)
    tensors = load_file(folder / WEIGHTS)
    whole = {name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point}
    assert all("_proj." in name for name in whole)
    assert bool(whole) == (kept != "none")
    assert ("quantization_config" in (folder / CONFIG).read_text()) == (kept != "none")


def test_weights_are_float32_whatever_is_computed_in(tmp_path: Path):
    """vLLM casts them, so that nothing is rounded twice."""
    folder = export(small(tmp_path), tmp_path / "out", "bfloat16")
    tensors = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert np.isfinite(sum(float(tensor.sum()) for tensor in tensors.values()))
