"""A float32 graph made ready for 8 bits: what is quantized must be a product with known weights.

Everything here leaves what the graph computes as it is, up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_MIN_SIDE = 16
"""Weights with fewer rows or columns (the last layers of heads) cost nothing and decide all."""
_MIN_TABLE = 1 << 16
"""Numbers of a table that is worth a scale for each row."""


def prepare(model: onnx.ModelProto, *, fuse_biases: bool) -> None:
    """Names all nodes, forgets inferred shapes, makes products of einsums, and, where
    ``fuse_biases``, one node of a product and its bias, so that both are computed in integers."""
    graph = model.graph
    # They hold for the weights before quantization transposes some, and are inferred again.
    del graph.value_info[:]
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    _replace_einsums(graph)
    if fuse_biases:
        _fuse_biases(graph)


def products(model: onnx.ModelProto, keep_float: Sequence[str] = ()) -> list[str]:
    """Names of the nodes that multiply with constant weights large enough to matter."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and (weight := weights.get(node.input[1])) is not None
        and weight.data_type == TensorProto.FLOAT
        and len(weight.dims) == 2
        and min(weight.dims) >= _MIN_SIDE
        and not any(part in node.name or part in weight.name for part in keep_float)
    ]


def quantize_tables(model: onnx.ModelProto) -> int:
    """Tables of which only rows are looked up become int8 with a scale a row; how many did.

    As integers, a cast and a product, which every runtime has.
    """
    graph = model.graph
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    tables = [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and int(np.prod(tensor.dims)) >= _MIN_TABLE
        and all(_looks_up(node, tensor.name) for node in users.get(tensor.name, ()))
    ]
    nodes = list(graph.node)
    for tensor in tables:
        table = numpy_helper.to_array(tensor)
        # A row of zeros (padding) has any scale.
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12) / 127
        small = np.round(table / scale).astype(np.int8)
        rows, scales = f"{tensor.name}_int8", f"{tensor.name}_scale"
        graph.initializer.extend(
            [
                numpy_helper.from_array(small, rows),
                numpy_helper.from_array(scale.astype(np.float32), scales),
            ]
        )
        for node in users[tensor.name]:
            name, index, output = node.name, node.input[1], node.output[0]
            at = next(i for i, other in enumerate(nodes) if other is node)
            nodes[at : at + 1] = [
                helper.make_node("Gather", [rows, index], [f"{name}_rows"], f"{name}_rows"),
                helper.make_node(
                    "Cast", [f"{name}_rows"], [f"{name}_cast"], f"{name}_cast", to=TensorProto.FLOAT
                ),
                helper.make_node("Gather", [scales, index], [f"{name}_scales"], f"{name}_scales"),
                helper.make_node("Mul", [f"{name}_cast", f"{name}_scales"], [output], name),
            ]
        graph.initializer.remove(tensor)
    _set_nodes(graph, nodes)
    return len(tables)


def quantize_early(model: onnx.ModelProto) -> None:
    """Rounds before numbers are moved about, not after: to the same bytes, and fewer of them.

    Embeddings that are looked up and joined for a product become tables of bytes.
    """
    graph = model.graph
    while _move_one(graph):
        pass
    used = {name for node in graph.node for name in node.input}
    used.update(output.name for output in graph.output)
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


_MOVES = {"Reshape": 1, "Unsqueeze": 1, "Squeeze": 1, "Transpose": 1, "Expand": 1, "Gather": 1}
"""Operators that move numbers, and how many of their first inputs hold these; Concat: all."""


def _move_one(graph: onnx.GraphProto) -> bool:
    """Moves one rounding before what it follows; False if none can be."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    # Whoever asks for a shape can ask the bytes.
    uses = Counter(name for node in graph.node if node.op_type != "Shape" for name in node.input)
    uses.update(output.name for output in graph.output)
    for place, node in enumerate(graph.node):
        if node.op_type != "QuantizeLinear" or any(a.name == "axis" for a in node.attribute):
            continue
        if any(name not in constants for name in node.input[1:3]) or len(node.input) != 3:
            continue
        source = node.input[0]
        if source in constants:
            _round(graph, constants, node, place)
            return True
        maker = makers.get(source)
        if maker is None or uses[source] != 1:
            continue
        count = len(maker.input) if maker.op_type == "Concat" else _MOVES.get(maker.op_type, 0)
        if not count or (maker.op_type == "Gather" and maker.input[0] not in constants):
            continue
        _swap(graph, maker, node, count)
        return True
    return False


def _round(
    graph: onnx.GraphProto, constants: dict[str, TensorProto], node: NodeProto, place: int
) -> None:
    """Replaces a rounded constant by the bytes."""
    values, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
    limits = np.iinfo(zero.dtype)
    small = np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(zero.dtype)
    graph.initializer.append(numpy_helper.from_array(small, node.output[0]))
    del graph.node[place]


def _swap(graph: onnx.GraphProto, maker: NodeProto, rounding: NodeProto, count: int) -> None:
    """Rounds the first ``count`` inputs of ``maker``, whose output then is what was rounded."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.name == rounding.name:
            continue
        if node.name != maker.name:
            if node.op_type == "Shape" and node.input[0] == rounding.input[0]:
                node.input[0] = rounding.output[0]
            nodes.append(node)
            continue
        for place in range(count):
            output = f"{rounding.output[0]}_{place}"
            given = [maker.input[place], *rounding.input[1:]]
            nodes.append(helper.make_node("QuantizeLinear", given, [output], output))
            maker.input[place] = output
        maker.output[0] = rounding.output[0]
        nodes.append(maker)
    _set_nodes(graph, nodes)


def _looks_up(node: NodeProto, table: str) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0


def _replace_einsums(graph: onnx.GraphProto) -> None:
    """Einsums that are products of matrices, as transpositions and products."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _product(node) if node.op_type == "Einsum" else [node]
    _set_nodes(graph, nodes)


def _product(node: NodeProto) -> list[NodeProto]:
    """The nodes for one einsum, or the einsum itself, if it is no product of matrices."""
    equation = node.attribute[0].s.decode().replace(" ", "")
    given, _, out = equation.partition("->")
    if len(node.input) != 2 or "." in equation or not out:
        return [node]
    a, b = given.split(",")
    batch = [x for x in out if x in a and x in b]
    inner = [x for x in a if x in b and x not in out]
    rows, columns = [x for x in a if x not in b], [x for x in b if x not in a]
    plain = all(len(set(axes)) == len(axes) for axes in (a, b, out))
    complete = sorted(out) == sorted([*batch, *rows, *columns])
    if not plain or not complete or [len(x) for x in (inner, rows, columns)] != [1, 1, 1]:
        return [node]
    nodes: list[NodeProto] = []

    def transposed(source: str, axes: str, wanted: str, output: str) -> str:
        if axes == wanted:
            return source
        permutation = [axes.index(x) for x in wanted]
        nodes.append(helper.make_node("Transpose", [source], [output], output, perm=permutation))
        return output

    left = transposed(node.input[0], a, "".join(batch + rows + inner), f"{node.name}_left")
    right = transposed(node.input[1], b, "".join(batch + inner + columns), f"{node.name}_right")
    made = "".join(batch + rows + columns)
    product = node.output[0] if made == out else f"{node.name}_product"
    nodes.append(helper.make_node("MatMul", [left, right], [product], f"{node.name}_matmul"))
    if made != out:
        permutation = [made.index(x) for x in out]
        nodes.append(
            helper.make_node("Transpose", [product], [node.output[0]], node.name, perm=permutation)
        )
    return nodes


def _fuse_biases(graph: onnx.GraphProto) -> None:
    """x W + b over any number of axes as one Gemm over two, the only product that takes a bias."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(output.name for output in graph.output)
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    nodes: list[NodeProto] = []
    fused: set[str] = set()
    for node in graph.node:
        if node.name in fused:
            continue
        add = adds.get(node.output[0]) if node.op_type == "MatMul" else None
        bias = "" if add is None else _bias(add, node, constants)
        if add is None or not bias or uses[node.output[0]] != 1:
            nodes.append(node)
            continue
        fused.add(add.name)
        nodes += _gemm(graph, constants, node, bias, add.output[0])
    _set_nodes(graph, nodes)


def _bias(add: NodeProto, product: NodeProto, constants: dict[str, TensorProto]) -> str:
    """Name of what ``add`` adds to a large constant product, if it is a number a column."""
    weight = constants.get(product.input[1])
    others = [name for name in add.input if name != product.output[0] and name in constants]
    if weight is None or len(weight.dims) != 2 or min(weight.dims) < _MIN_SIDE or not others:
        return ""
    return others[0] if list(constants[others[0]].dims) == [weight.dims[1]] else ""


def _gemm(
    graph: onnx.GraphProto,
    constants: dict[str, TensorProto],
    node: NodeProto,
    bias: str,
    output: str,
) -> list[NodeProto]:
    rows, columns = constants[node.input[1]].dims
    for constant, values in ((f"to_{rows}", [-1, rows]), (f"of_{columns}", [columns])):
        if constant not in constants:
            constants[constant] = numpy_helper.from_array(np.array(values, np.int64), constant)
            graph.initializer.append(constants[constant])
    name, given = node.name, node.input[0]
    flat, shape, target, made = (f"{name}_{p}" for p in ("flat", "shape", "target", "gemm"))
    return [
        helper.make_node("Reshape", [given, f"to_{rows}"], [flat], flat),
        helper.make_node("Gemm", [flat, node.input[1], bias], [made], made),
        helper.make_node("Shape", [given], [shape], shape, end=-1),
        helper.make_node("Concat", [shape, f"of_{columns}"], [target], target, axis=0),
        helper.make_node("Reshape", [made, target], [output], name),
    ]


def _set_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)
