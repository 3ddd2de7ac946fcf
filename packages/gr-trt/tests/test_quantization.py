"""Graphs in 8 bits: what is rewritten before, what becomes bytes, and what stays exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gr_core.errors import PlanError
from gr_trt.options import own_options
from gr_trt.quantization import QuantizationOptions
from gr_trt.quantization.graphs import prepare, products, quantize_early, quantize_tables
from gr_trt.quantization.quantize import quantize

ort = pytest.importorskip("onnxruntime")

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
ITEMS, WIDTH, HIDDEN = 5000, 32, 48


def constant(name: str, values: Array) -> TensorProto:
    return numpy_helper.from_array(values, name)


def node(kind: str, given: str, made: str, **attributes: Any) -> onnx.NodeProto:
    # Without a name, as exporters may leave it.
    return helper.make_node(kind, given.split(), made.split(), **attributes)


def drawn() -> onnx.ModelProto:
    """Items looked up, joined with those of a second table, two layers, scores among tokens."""
    normal = RNG.standard_normal
    initializers = [
        constant("items", normal((ITEMS, WIDTH)).astype(np.float32)),
        constant("kinds", normal((7, WIDTH)).astype(np.float32)),
        constant("W", (normal((2 * WIDTH, HIDDEN)) / 8).astype(np.float32)),
        constant("b", normal(HIDDEN).astype(np.float32)),
        constant("V", (normal((HIDDEN, WIDTH)) / 7).astype(np.float32)),
        constant("head", (normal((WIDTH, 2)) / 6).astype(np.float32)),
    ]
    nodes = [
        node("Gather", "items ids", "rows"),
        node("Gather", "kinds kind", "kind_rows"),
        node("Concat", "rows kind_rows", "joined", axis=-1),
        node("MatMul", "joined W", "product"),
        node("Add", "product b", "hidden"),
        node("Sigmoid", "hidden", "gate"),
        node("Mul", "hidden gate", "silu"),
        node("MatMul", "silu V", "tokens"),
        node("Einsum", "tokens tokens", "pairs", equation="btd,bsd->bts"),
        node("Einsum", "pairs tokens", "mixed", equation="bts,bsd->btd"),
        node("Add", "mixed rows", "residual"),
        node("MatMul", "residual head", "scores"),
    ]
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "token"])
        for name in ("ids", "kind")
    ]
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "token", 2])
    graph = helper.make_graph(nodes, "small", ids, [scores], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


DRAWN = drawn()


def small_model() -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(DRAWN)
    return copy


def feeds(batch: int, tokens: int) -> dict[str, Array]:
    return {
        "ids": RNG.integers(0, ITEMS, (batch, tokens)),
        "kind": RNG.integers(0, 7, (batch, tokens)),
    }


def scores_of(model: onnx.ModelProto | Path, given: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    (scores,) = ort.InferenceSession(source, options).run(None, given)
    return np.asarray(scores)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def error(scores: Array, right: Array) -> float:
    return float(np.abs(scores - right).max() / np.abs(right).max())


@pytest.fixture(params=["uint8", "int8"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    model = small_model()
    prepare(model, fuse_biases=request.param == "uint8")
    out = tmp_path / "int8.onnx"
    quantize(
        model,
        out,
        products(model),
        [feeds(1, n) for n in (3, 9, 20)],
        activations=request.param,
        external_data=False,
    )
    return request.param, out


@pytest.mark.parametrize("fuse_biases", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (3, 12)])
def test_preparing_changes_no_score(fuse_biases: bool, batch: int, tokens: int) -> None:
    model, prepared = small_model(), small_model()
    prepare(prepared, fuse_biases=fuse_biases)
    onnx.checker.check_model(prepared)
    assert kinds(prepared)["Einsum"] == 0
    assert kinds(prepared)["Gemm"] == fuse_biases
    assert all(node.name for node in prepared.graph.node)
    given = feeds(batch, tokens)
    assert error(scores_of(prepared, given), scores_of(model, given)) < 1e-5


@pytest.mark.parametrize(
    ("equation", "stays"),
    [
        ("bthk,bshk->bhts", False),
        ("bhts,bshv->bthv", False),
        ("td,sd->ts", False),
        ("btd,btd->bt", True),
        ("bts,bsd->bd", True),
        ("bt,bs->bts", True),
    ],
)
def test_einsums_that_are_products_of_matrices(equation: str, stays: bool) -> None:
    sizes = {"b": 2, "t": 3, "s": 4, "h": 2, "k": 5, "d": 5, "v": 6}
    given, out = equation.split("->")
    arrays = [
        RNG.standard_normal([sizes[axis] for axis in axes]).astype(np.float32)
        for axes in given.split(",")
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in zip("xy", arrays, strict=True)
    ]
    made = helper.make_tensor_value_info("z", TensorProto.FLOAT, [sizes[axis] for axis in out])
    graph = helper.make_graph([node("Einsum", "x y", "z", equation=equation)], "e", inputs, [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    prepare(model, fuse_biases=False)
    assert (kinds(model)["Einsum"] == 1) is stays
    found = scores_of(model, dict(zip("xy", arrays, strict=True)))
    np.testing.assert_allclose(found, np.einsum(equation, *arrays), rtol=1e-4, atol=1e-5)


def test_what_is_a_product() -> None:
    model = small_model()
    prepare(model, fuse_biases=False)
    # Those of two activations and the narrow last one stay as they are.
    weights = {n.name: n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    assert [weights[name] for name in products(model)] == ["W", "V"]
    assert [weights[name] for name in products(model, keep_float=["V"])] == ["W"]


def test_int8_is_close_at_any_shape(quantized: tuple[str, Path]) -> None:
    activations, file = quantized
    model, made = small_model(), onnx.load(str(file))
    types = {t.data_type for t in made.graph.initializer if t.name.endswith("_quantized")}
    # TensorRT takes no integer bias and no zero point; a CPU is faster with both.
    assert (TensorProto.INT32 in types) is (activations == "uint8")
    if activations == "int8":
        points = [t for t in made.graph.initializer if t.name.endswith("zero_point")]
        assert points
        assert not any(numpy_helper.to_array(point).any() for point in points)
    for batch, tokens in ((1, 1), (1, 20), (4, 7)):
        given = feeds(batch, tokens)
        assert error(scores_of(file, given), scores_of(model, given)) < 0.1


def test_weights_have_a_scale_a_column(quantized: tuple[str, Path]) -> None:
    made = onnx.load(str(quantized[1]))
    scales = {t.name: t for t in made.graph.initializer}
    assert list(scales["W_scale"].dims) == [HIDDEN]
    assert scales["W_quantized"].data_type == TensorProto.INT8


def test_rounding_early_makes_the_same_bytes(quantized: tuple[str, Path]) -> None:
    _, file = quantized
    late, early = onnx.load(str(file)), onnx.load(str(file))
    quantize_early(early)
    onnx.checker.check_model(early)
    rounded = [n.input[0] for n in early.graph.node if n.op_type == "QuantizeLinear"]
    assert rounded == ["rows", "silu"], "of what is joined, the table is bytes already"
    floats = {t.name for t in early.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert "kinds" not in floats
    assert "items" in floats, "it is looked up for the residual too"
    given = feeds(3, 11)
    np.testing.assert_array_equal(scores_of(early, given), scores_of(late, given))


def test_tables_of_bytes() -> None:
    model, small = small_model(), small_model()
    assert quantize_tables(small) == 1
    onnx.checker.check_model(small)
    sizes = {t.name: t for t in small.graph.initializer}
    assert "items" not in sizes
    assert sizes["items_int8"].data_type == TensorProto.INT8
    assert small.ByteSize() < 0.45 * model.ByteSize()
    given = feeds(2, 9)
    assert error(scores_of(small, given), scores_of(model, given)) < 0.02


def test_a_table_that_is_multiplied_with_stays() -> None:
    table = RNG.standard_normal((ITEMS, WIDTH)).astype(np.float32)
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("user", TensorProto.FLOAT, [ITEMS]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("rows", "sum")
    ]
    nodes = [node("Gather", "table ids", "rows"), node("MatMul", "user table", "sum")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [constant("table", table)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert quantize_tables(model) == 0
    assert [t.name for t in model.graph.initializer] == ["table"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations is 'int4'; expected one of auto, uint8, int8"),
        ({"calibration": 3}, "calibration is 3; expected a path"),
        ({"calibration_requests": 0}, "calibration_requests is 0; expected 1 to 4096"),
        ({"keep_float": "head"}, "keep_float is 'head'; expected a list of names"),
        ({"quantize_top_k": 1}, "quantize_top_k is 1; expected true or false"),
        ({"min_overlap": 90}, "min_overlap is 90; expected 0 to 1"),
        ({"max_loss": True}, "max_loss is True; expected 0 to 1"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        own_options(QuantizationOptions, options, "exporter onnx")
