"""The tiny model of `gr_core.testing.tiny` as ONNX graphs written by hand, and a runtime for them.

Shapes: B requests, H behaviours, C candidates, D the width of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from gr_core import ExporterDescriptor, ModelDescriptor, Task
from gr_core.contracts import Artifact, EngineOptions, ExportOptions, Model
from gr_core.repository import Bundle
from gr_core.testing.tiny import ARCHITECTURE, DECAY, TASKS, TinyModel
from gr_trt.ensemble import Ensemble, Graph, Lengths, Role, Tensor
from gr_trt.tensorrt.options import TensorRTOptions
from gr_trt.tensorrt.profiles import Profile

ITEMS = Tensor("items", "int64", ("history",))
LENGTH = Tensor("length", "int64", ())
CANDIDATES = Tensor("candidates", "int64", ("candidate",))
KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
OPSET = 20
IR = 10


class TinyTorchModel(TinyModel):
    """Implements `gr_core.contracts.TorchModel`."""

    def module(self, task: Task) -> Any:
        return TinyModule(torch.from_numpy(self.vectors))

    def item_table(self) -> Any:
        return torch.from_numpy(self.vectors)


class TinyModule(torch.nn.Module):
    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(
        self, items: torch.Tensor, length: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> torch.Tensor:
        ages_BH = length[:, None] - 1 - torch.arange(items.shape[1])
        weights_BH = torch.where(ages_BH >= 0, DECAY ** ages_BH.clamp(min=0), 0.0)
        users_BD = torch.einsum("bh,bhd->bd", weights_BH.float(), self.vectors[items])
        if candidates is None:
            return users_BD
        scores_BC = torch.einsum("bcd,bd->bc", self.vectors[candidates], users_BD)
        return torch.stack([scores_BC, scores_BC / 2], dim=2)


class TinyOnnxExporter:
    """numpy → onnx."""

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        assert isinstance(model, TinyTorchModel)
        write_graphs(model, out_dir, options.dtype)
        return Artifact("onnx", out_dir)


MODEL = ModelDescriptor(
    name=ARCHITECTURE, factory=f"{__name__}:TinyTorchModel", tasks=TASKS, formats=("numpy",)
)
TO_ONNX = ExporterDescriptor(
    name="tiny-onnx",
    factory=f"{__name__}:TinyOnnxExporter",
    source="numpy",
    target="onnx",
    tasks=TASKS,
)


def tiny_graph(vectors: np.ndarray, task: Task, dtype: str = "float32") -> onnx.ModelProto:
    """``items`` (B, H), ``length`` (B,) and ``candidates`` (B, C) to ``user`` or ``scores``."""
    kind = KINDS[dtype]
    rank = task is Task.RANK
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "at_1": np.array([1]),
        "at_2": np.array([2]),
        "decay": np.array(DECAY, np.float32),
        "nothing": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Shape", ["items"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["H"]),
        helper.make_node("Range", ["zero", "H", "one"], ["places"]),
        helper.make_node("Unsqueeze", ["length", "at_1"], ["length_B1"]),
        helper.make_node("Sub", ["length_B1", "one"], ["last_B1"]),
        helper.make_node("Sub", ["last_B1", "places"], ["age_BH"]),
        helper.make_node("Cast", ["age_BH"], ["years_BH"], to=TensorProto.FLOAT),
        helper.make_node("Max", ["years_BH", "nothing"], ["after_BH"]),
        helper.make_node("Pow", ["decay", "after_BH"], ["power_BH"]),
        helper.make_node("Less", ["age_BH", "zero"], ["padding_BH"]),
        helper.make_node("Where", ["padding_BH", "nothing", "power_BH"], ["weight_BH"]),
        helper.make_node("Cast", ["weight_BH"], ["half_BH"], to=kind),
        helper.make_node("Unsqueeze", ["half_BH", "at_1"], ["half_B1H"]),
        helper.make_node("Gather", ["vectors", "items"], ["item_BHD"], name="look_up"),
        helper.make_node("MatMul", ["half_B1H", "item_BHD"], ["user_B1D"], name="sum_up"),
    ]
    if rank:
        nodes += [
            helper.make_node("Gather", ["vectors", "candidates"], ["candidate_BCD"]),
            helper.make_node("Transpose", ["user_B1D"], ["user_BD1"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["candidate_BCD", "user_BD1"], ["score_BC1"], name="score"),
            helper.make_node("Add", ["score_BC1", "score_BC1"], ["double_BC1"]),
            helper.make_node("Concat", ["double_BC1", "score_BC1"], ["both"], axis=2),
            helper.make_node("Mul", ["both", "half"], ["halved"]),
            helper.make_node("Cast", ["halved"], ["scores"], to=TensorProto.FLOAT),
        ]
    else:
        nodes += [
            helper.make_node("Squeeze", ["user_B1D", "at_1"], ["user_BD"]),
            helper.make_node("Cast", ["user_BD"], ["user"], to=TensorProto.FLOAT),
        ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    weights.append(_in(vectors, "vectors", kind))
    if rank:
        weights.append(_in(np.array(0.5, np.float32), "half", kind))
    inputs = [ITEMS, LENGTH, CANDIDATES] if rank else [ITEMS, LENGTH]
    width = 2 if rank else vectors.shape[1]
    out = ("scores", ["batch", "candidate", width]) if rank else ("user", ["batch", width])
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        task.value,
        [
            helper.make_tensor_value_info(t.name, TensorProto.INT64, ["batch", *t.axes])
            for t in inputs
        ],
        [helper.make_tensor_value_info(out[0], TensorProto.FLOAT, out[1])],
        [weight for weight in weights if weight.name in used],
    )
    return finished(graph)


def finished(graph: onnx.GraphProto, opset: int = OPSET, ir: int = IR) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def _in(array: np.ndarray, name: str, kind: int) -> onnx.TensorProto:
    if kind == TensorProto.BFLOAT16:
        return helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())
    return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def write_graphs(model: TinyModel, folder: Path, dtype: str = "float32") -> Ensemble:
    """Both tasks of the tiny model as a folder of the format ``onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = []
    for task in TASKS:
        rank = task is Task.RANK
        onnx.save(
            onnx.shape_inference.infer_shapes(tiny_graph(model.vectors, task, dtype)),
            folder / f"{task.value}.onnx",
        )
        out = (
            Tensor("scores", "float32", ("candidate", 2))
            if rank
            else Tensor("user", "float32", (model.vectors.shape[1],))
        )
        graphs.append(
            Graph(
                name=task.value,
                file=f"{task.value}.onnx",
                role=Role.SINGLE_PASS,
                tasks=(task,),
                inputs=(ITEMS, LENGTH, CANDIDATES) if rank else (ITEMS, LENGTH),
                outputs=(out,),
            )
        )
    ensemble = ensemble_of(model.bundle, graphs, dtype, len(model.catalogue))
    ensemble.write(folder)
    return ensemble


def ensemble_of(
    bundle: Bundle, graphs: Sequence[Graph], dtype: str = "float32", items: int = 50
) -> Ensemble:
    return Ensemble(
        model=bundle.name,
        version=bundle.version,
        architecture=bundle.architecture,
        identity=bundle.identity.hex(),
        dtype=dtype,
        opset=OPSET,
        ir_version=IR,
        heads=("first", "second"),
        catalogue_size=items,
        graphs=tuple(graphs),
        axes={"history": Lengths(1, 8, 256), "candidate": Lengths(1, 4, 60)},
    )


def one_graph(
    folder: Path,
    bundle: Bundle,
    graph: onnx.ModelProto,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """A folder with any graph."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, folder / "any.onnx")
    described = Graph(
        "any", "any.onnx", Role.SINGLE_PASS, (Task.RANK,), tuple(inputs), tuple(outputs)
    )
    ensemble_of(bundle, [described]).write(folder)


class OnnxRunner:
    """Implements `gr_trt.tensorrt.runner.Runner` with ONNX Runtime on the graph beside a plan.

    It takes what the plan's profiles take and nothing else, and it is late: what was started is
    computed when its result is asked for.
    """

    def __init__(self, path: Path, profiles: Sequence[Profile]) -> None:
        self.profiles = profiles
        self.shapes: list[Mapping[str, int]] = []
        self._session = onnxruntime.InferenceSession(path)

    def start(
        self, profile: int, sizes: Mapping[str, int], arrays: Mapping[str, np.ndarray]
    ) -> OnnxPending:
        for axis, size in sizes.items():
            assert self.profiles[profile].axes[axis].within(size), (axis, size)
        self.shapes.append(dict(sizes))
        return OnnxPending(self._session, dict(arrays))

    def close(self) -> None:
        self._session = None


@dataclasses.dataclass
class OnnxPending:
    session: onnxruntime.InferenceSession
    arrays: Mapping[str, np.ndarray]

    def result(self) -> Mapping[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, self.arrays), strict=True))


def open_onnx(
    folder: Path, graph: Graph, options: EngineOptions, own: TensorRTOptions
) -> OnnxRunner:
    """In place of `gr_trt.tensorrt.engine.open_plan`: the same checks but those of the GPU."""
    from gr_trt.tensorrt import plan_file

    _, facts = plan_file.read(folder / graph.file)
    return OnnxRunner(folder / f"{graph.name}.onnx", facts.profiles)
