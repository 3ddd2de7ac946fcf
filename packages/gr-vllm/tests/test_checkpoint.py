"""What is written is read; what is damaged is said to be, so that it is exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gr_core.contracts import Artifact, ExportOptions
from gr_core.errors import BundleError
from gr_vllm.checkpoint import CONFIG, MODEL_TYPE, WEIGHTS, Checkpoint
from gr_vllm.export.exporter import VllmExporter, convert

from .small_models import Ranks, Retrieves, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    model = small(tmp_path, time_buckets=5, positions=100, columns=2)
    options = ExportOptions("cpu", "int8", {})
    VllmExporter().export(Artifact("torch", model.bundle.path), model, out, options)
    return out


@pytest.mark.parametrize("kind", [Retrieves, Ranks])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_what_is_written_is_read(kind: Any, quantization: Any, tmp_path: Path):
    checkpoint, tensors = convert(small(tmp_path, kind), "float32", quantization)
    checkpoint.write(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    assert Checkpoint.read(tmp_path) == checkpoint


def test_vllm_is_told_what_it_sizes_its_memory_by(folder: Path):
    config = json.loads((folder / CONFIG).read_text())
    assert config["architectures"] == ["GrHSTUForRetrieval"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (8, 2)
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 2
    assert config["vocab_size"] == 51
    assert config["dtype"] == "bfloat16"


def change(folder: Path, *path: str, value: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    place = config
    for name in path[:-1]:
        place = place[name]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ([MODEL_TYPE, "format_version"], 0, "format_version is 0, this gr-vllm reads 1"),
        ([MODEL_TYPE], None, "not a model directory of gr-vllm"),
        ([MODEL_TYPE], 3, "not a model directory of gr-vllm"),
        ([MODEL_TYPE, "places"], None, "'places'"),
        ([MODEL_TYPE, "colour"], "red", "'colour'.*expected the fields"),
        ([MODEL_TYPE, "layers", "d_v"], None, "'d_v'"),
        (
            [MODEL_TYPE, "layers", "d_v"],
            6,
            r"attention_norm.bias is F32 \[1, 10\]; expected F32 \[1, 12\]",
        ),
        ([MODEL_TYPE, "layers", "gate"], "norm(u)", "layers.gate is 'norm"),
        ([MODEL_TYPE, "role"], "reading", "role is 'reading'; expected one of retrieval"),
        ([MODEL_TYPE, "quantization"], "fp4", "quantization is 'fp4'"),
        ([MODEL_TYPE, "quantization"], "none", "not as it was written"),
        ([MODEL_TYPE, "dtype"], "float32", "not as it was written"),
        ([MODEL_TYPE, "levels"], [3], "expected the fields"),
        (["hidden_size"], 9, "not as it was written"),
        (["architectures"], ["LlamaForCausalLM"], "not as it was written"),
        (["auto_map"], {"AutoConfig": "x.y"}, "not as it was written"),
    ],
)
def test_other_configurations_are_refused(folder: Path, path: list[str], value: Any, message: str):
    Checkpoint.read(folder)
    change(folder, *path, value=value)
    with pytest.raises(BundleError, match=message):
        Checkpoint.read(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("left", [0, 7, 0.5, -1])
def test_files_that_are_cut_short_are_refused(folder: Path, name: str, left: float):
    content = (folder / name).read_bytes()
    kept = int(len(content) * left) if left == 0.5 else int(left)
    (folder / name).write_bytes(content[:kept] if left != -1 else content[:-3])
    with pytest.raises(BundleError, match=name):
        Checkpoint.read(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_that_are_not_there(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        Checkpoint.read(folder)


def test_other_tensors_are_refused(folder: Path):
    # Copies: the file that they may lie in is written anew.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    name = "stack.layers.1.o_proj.weight_scale"
    for wrong, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"{name} is not there; expected F32"),
        (tensors | {"more": torch.zeros(1)}, r"more is F32 \[1\]; expected not there"),
        (tensors | {name: tensors[name].half()}, f"{name} is F16"),
        (tensors | {name: tensors[name][:-1]}, rf"{name} is F32 \[7, 1\]; expected F32 \[8, 1\]"),
    ):
        save_file(wrong, folder / WEIGHTS)
        with pytest.raises(BundleError, match=message):
            Checkpoint.read(folder)
