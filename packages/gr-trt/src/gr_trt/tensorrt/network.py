"""From an ONNX file to TensorRT's network, and what is said where it cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gr_core.errors import PlanError
from gr_trt.tensorrt.graphs import OnnxGraph
from gr_trt.tensorrt.library import Library
from gr_trt.tensorrt.messages import make_log

_REASONS = {
    "UNSUPPORTED_NODE": "TensorRT has no such operator, or not in this form",
    "UNSUPPORTED_NODE_ATTR": "an attribute has a value that TensorRT cannot compute with",
    "UNSUPPORTED_NODE_INPUT": "an input is of a kind that TensorRT cannot compute with",
    "UNSUPPORTED_NODE_DATATYPE": "TensorRT does not compute it in this data type",
    "UNSUPPORTED_NODE_DYNAMIC": "TensorRT wants a fixed size where the graph has a dynamic one",
    "UNSUPPORTED_NODE_SHAPE": "TensorRT cannot compute it in this shape",
    "UNSUPPORTED_GRAPH": "TensorRT cannot read the graph",
    "INVALID_NODE": "the node contradicts itself or its inputs",
}
_REMEDIES = {
    "UNSUPPORTED_NODE_DATATYPE": "export the model with another --dtype",
    "UNSUPPORTED_NODE_DYNAMIC": "give the axis a fixed size in the model",
    "INVALID_NODE": "networks are strongly typed: where its inputs differ in type, put a Cast "
    "before it in the model; otherwise export the model with another --option opset",
}
_REMEDY = (
    "replace the operation in the model by others, export with another --option opset, or run "
    "the graph with the engine onnxruntime"
)
_PLUGIN_REMEDY = (
    "the operator is not part of ONNX: export the model without it, or register a TensorRT "
    "plugin of that name before"
)


@dataclass(frozen=True, slots=True)
class Network:
    """A parsed graph; the parser owns its weights, so all of it lives until the build is over."""

    library: Library
    log: Any
    builder: Any
    definition: Any
    parser: Any

    @property
    def shape_inputs(self) -> frozenset[str]:
        """Inputs whose values are sizes, which TensorRT reads on the host."""
        inputs = (self.definition.get_input(i) for i in range(self.definition.num_inputs))
        return frozenset(tensor.name for tensor in inputs if tensor.is_shape_tensor)

    @property
    def inputs(self) -> frozenset[str]:
        """Those that the graph really uses."""
        count = self.definition.num_inputs
        return frozenset(self.definition.get_input(i).name for i in range(count))

    def summary(self) -> Mapping[str, Any]:
        """Layers by kind and by the type of what they compute, before anything is fused."""
        layers = [self.definition.get_layer(i) for i in range(self.definition.num_layers)]
        kinds = Counter(layer.type.name for layer in layers)
        types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs > 0)
        return {"layers": len(layers), "by_kind": dict(kinds), "by_dtype": dict(types)}


def parse(library: Library, graph: OnnxGraph) -> Network:
    """A strongly typed network: every layer computes in the type that the graph says.

    Raises `PlanError` that names the first node that cannot be read.
    """
    trt = library.module
    log = make_log(library)
    builder = trt.Builder(log)
    definition = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(str(graph.path)):
        raise PlanError(f"{graph.path.name}: {_why(parser, graph, log)}")
    if definition.num_outputs == 0:
        raise PlanError(f"{graph.path.name}: it has no outputs; export the model to onnx again")
    return Network(library, log, builder, definition, parser)


def _strongly_typed(trt: Any) -> int:
    """The flag of creation; where every network is typed so, it may be gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _why(parser: Any, graph: OnnxGraph, log: Any) -> str:
    if parser.num_errors == 0:
        return f"TensorRT cannot read it: {log.last_error()}; {_REMEDY}"
    error = parser.get_error(0)
    code = error.code().name
    detail = " ".join(error.desc().split())
    reason = _REASONS.get(code, "TensorRT cannot read it")
    if "Plugin not found" in detail:
        return f"{_node(error, graph)}: there is no such operator; {_PLUGIN_REMEDY}"
    if detail and detail != "false":
        reason = f"{reason}: {detail}"
    return f"{_node(error, graph)}: {reason}; {_REMEDIES.get(code, _REMEDY)}"


def _node(error: Any, graph: OnnxGraph) -> str:
    """Which node it is: its name, its operator, and what it computes."""
    index = error.node()
    operator, name = error.node_operator(), error.node_name()
    nodes = graph.model.graph.node
    if 0 <= index < len(nodes) and nodes[index].op_type == operator:
        made = ", ".join(nodes[index].output)
        return f"node {index}, {name!r} ({operator}, which computes {made})"
    if operator or name:
        return f"node {name!r} ({operator})"
    return "the graph"
