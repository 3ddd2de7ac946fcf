"""ensemble.json: read as written, refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gr_core.errors import BundleError
from gr_core.types import Task
from gr_trt.ensemble import FILE, Ensemble, Graph, GraphParity, Lengths, Role, Tensor

ENSEMBLE = Ensemble(
    model="m",
    version="3",
    architecture="hstu",
    identity="00ff",
    dtype="float16",
    opset=20,
    ir_version=10,
    heads=("click",),
    catalogue_size=5,
    graphs=(
        Graph(
            name="rank",
            file="rank.onnx",
            role=Role.SINGLE_PASS,
            tasks=(Task.RANK,),
            inputs=(Tensor("items", "int64", ("history", 2)), Tensor("k", "int64", (), 0, False)),
            outputs=(Tensor("scores", "float32", ("candidate", 1)),),
            parity=GraphParity(("batch=1 history=3",), 1e-6, 1e-4, "onnxruntime 1"),
        ),
    ),
    axes={"history": Lengths(1, 20, 64)},
    notes={"int8": {"overlap": 0.99}},
)


def test_it_is_read_as_written(tmp_path: Path) -> None:
    ENSEMBLE.write(tmp_path)
    assert Ensemble.read(tmp_path) == ENSEMBLE
    assert ENSEMBLE.graph(Role.SINGLE_PASS, Task.RANK) == ENSEMBLE.graphs[0]
    assert ENSEMBLE.graph(Role.SINGLE_PASS, Task.RETRIEVE) is None
    assert ENSEMBLE.graph(Role.DECODE, Task.RANK) is None


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("opset"), "opset"),
        (without("format_version"), "format_version"),
        (lambda data: data.update(format_version=2), "format_version is 2, expected 1"),
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data["graphs"][0].update(role="drawing"), "drawing"),
        (lambda data: data["graphs"][0].update(tasks=["sing"]), "sing"),
        (lambda data: data["graphs"][0].update(file="../rank.onnx"), "not in the folder itself"),
        (lambda data: data.update(graphs=None), "not an ensemble of graphs"),
    ],
)
def test_what_is_no_ensemble_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    ENSEMBLE.write(tmp_path)
    data = json.loads((tmp_path / FILE).read_text())
    damage(data)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as caught:
        Ensemble.read(tmp_path)
    assert "export the model again" in str(caught.value)


def test_a_file_that_is_not_there_or_cut(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file or directory; export the model again"):
        Ensemble.read(tmp_path)
    ENSEMBLE.write(tmp_path)
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text()[:-20])
    with pytest.raises(BundleError, match="not an ensemble of graphs"):
        Ensemble.read(tmp_path)
