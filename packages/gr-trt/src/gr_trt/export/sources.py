"""What a folder of graphs is made of: torch modules with their inputs, outputs and examples.

Shapes: B batch, D width of a user's representation, I items and the padding row, S the k best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor as TorchTensor
from torch import nn

from gr_core.collate import collate
from gr_core.contracts import ArraySpec, EncodedRequest, TorchModel
from gr_core.errors import PlanError
from gr_core.stack import TokenSequence
from gr_core.steps import KEYS, PAST_KEYS, PAST_VALUES, USER, VALUES, Step, SteppedModel
from gr_core.types import Task
from gr_trt.ensemble import Role, Tensor

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """A graph to be made."""

    name: str
    role: Role
    tasks: tuple[Task, ...]
    module: nn.Module
    """Float32, on the CPU; returns one tensor or a tuple."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    examples: tuple[Arrays, ...]
    """Inputs of single requests, without padding."""


class TopK(nn.Module):
    """The items whose rows have the largest dot products with users, best first."""

    def __init__(self, table_ID: TorchTensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table_ID[1:].T.contiguous(), requires_grad=False)

    def forward(self, user: TorchTensor, k: TorchTensor) -> tuple[TorchTensor, TorchTensor]:
        """Scores (B, S) float32 and catalogue indices (B, S) int64, S being ``k``."""
        scores_BS, places_BS = torch.topk(user @ self.table, int(k), dim=-1)
        return scores_BS, places_BS + 1

    def graph(self, dtype: str, opset: int) -> ir.Model:
        """The same in ONNX, written down: torch cannot export a size that is an input."""
        table = tensor_adapters.TorchTensor(self.table.to(getattr(torch, dtype)), name="table")
        user = ir.Value(name="user", type=ir.TensorType(ir.DataType.FLOAT))
        k = ir.Value(name="k", type=ir.TensorType(ir.DataType.INT64))
        weights = ir.Value(name="table", type=ir.TensorType(table.dtype), const_value=table)
        tape = ir.tape.Tape()
        typed_BD = tape.op("Cast", [user], {"to": table.dtype.value})
        typed_BI = tape.op("MatMul", [typed_BD, weights])
        scores_BI = tape.op("Cast", [typed_BI], {"to": ir.DataType.FLOAT.value})
        one = tape.op("Constant", [], {"value_ints": [1]})
        count = tape.op("Reshape", [k, one])
        scores_BS, places_BS = tape.op_multi_out(
            "TopK", [scores_BI, count], {"axis": -1}, num_outputs=2
        )
        indices_BS = tape.op("Add", [places_BS, one])
        for value, name, kind in (
            (scores_BS, "scores", ir.DataType.FLOAT),
            (indices_BS, "indices", ir.DataType.INT64),
        ):
            value.name, value.type = name, ir.TensorType(kind)
        graph = ir.Graph(
            [user, k],
            [scores_BS, indices_BS],
            nodes=tape.nodes,
            initializers=[weights],
            opset_imports={"": opset},
            name="top_k",
        )
        return ir.Model(graph, ir_version=10)

    def scores_of(self, user: npt.NDArray[Any], indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scores (B, S) float32 of given items (B, S) for users (B, D)."""
        table_DI = self.table.float().numpy()
        return np.einsum("bd,dbs->bs", user, table_DI[:, indices - 1])


def sources(
    model: TorchModel,
    tasks: Sequence[Task],
    requests: Mapping[Task, Sequence[EncodedRequest]],
    *,
    steps: bool = True,
) -> Iterator[Source]:
    """All graphs of a model; those in steps where they are wanted and it offers them."""
    for task in tasks:
        yield _single_pass(model, task, requests[task])
    if steps and isinstance(model, SteppedModel):
        yield from _steps(model, tasks, requests)
    if Task.RETRIEVE in tasks:
        yield _top_k(model)


def _single_pass(model: TorchModel, task: Task, requests: Sequence[EncodedRequest]) -> Source:
    if task is Task.RETRIEVE:
        output = Tensor(USER, "float32", (model.item_table().shape[1],))
    else:
        output = Tensor("scores", "float32", ("candidate", len(model.heads)))
    return Source(
        name=task.value,
        role=Role.SINGLE_PASS,
        tasks=(task,),
        module=model.module(task),
        inputs=tuple(map(Tensor.of, model.inputs(task))),
        outputs=(output,),
        examples=tuple(request.arrays for request in requests),
    )


def _steps(
    model: SteppedModel, tasks: Sequence[Task], requests: Mapping[Task, Sequence[EncodedRequest]]
) -> Iterator[Source]:
    try:
        stacks = {task: model.stack(task) for task in tasks}
        prefills = {task: model.prefill_step(task) for task in tasks}
    except PlanError:
        return  # a model whose layers do not go in steps
    made: dict[int, Source] = {}  # tasks that share their layers share the prefill
    for task in sorted(tasks, key=lambda task: task is not Task.RETRIEVE):
        sequences = [model.sequence(request) for request in requests[task]]
        whole = [
            model.step_arrays(request, sequence, 0)
            for request, sequence in zip(requests[task], sequences, strict=True)
        ]
        step = prefills[task]
        if (one := made.get(id(stacks[task]))) is not None:
            made[id(stacks[task])] = replace(one, tasks=(*one.tasks, task))
        else:
            given = [{spec.name: arrays[spec.name] for spec in step.inputs} for arrays in whole]
            name = f"{task.value}_prefill"
            made[id(stacks[task])] = _step(name, Role.PREFILL, task, step, given)
        pasts = [_keys_and_values(step, arrays) for arrays in whole]
        decode = model.decode_step(task)
        yield _step(
            f"{task.value}_decode",
            Role.DECODE,
            task,
            decode,
            [
                _decode_example(model, decode, request, sequence, past, part)
                for part in (0.0, 0.5, 1.0)
                for request, sequence, past in zip(requests[task], sequences, pasts, strict=True)
            ],
        )
    yield from made.values()


def _step(name: str, role: Role, task: Task, step: Step, examples: Sequence[Arrays]) -> Source:
    return Source(
        name=name,
        role=role,
        tasks=(task,),
        module=step.module,
        inputs=tuple(map(Tensor.of, step.inputs)),
        outputs=tuple(map(Tensor.of, step.outputs)),
        examples=tuple(examples),
    )


def _keys_and_values(step: Step, arrays: Arrays) -> tuple[Any, Any]:
    """K and V of all tokens of one history, (layers, tokens, heads, columns)."""
    names = [spec.name for spec in step.outputs]
    found = run(step.module, collate(step.inputs, [EncodedRequest(Task.RANK, arrays, 0)]))
    tokens = _length(step.inputs, arrays, "token")
    return tuple(found[names.index(name)][0][:, :tokens] for name in (KEYS, VALUES))


def _decode_example(
    model: SteppedModel,
    step: Step,
    request: EncodedRequest,
    sequence: TokenSequence,
    past: tuple[Any, Any],
    part: float,
) -> Arrays:
    """The same request with a part of its history cached."""
    # Where the last token's output is the answer, it has to be given.
    last = sequence.history - (sequence.candidates == 0)
    start = max(0, min(int(part * sequence.history), sequence.reusable, last))
    arrays = dict(model.step_arrays(request, sequence, start))
    arrays[PAST_KEYS], arrays[PAST_VALUES] = (cached[:, :start] for cached in past)
    return {spec.name: arrays[spec.name] for spec in step.inputs}


def _top_k(model: TorchModel) -> Source:
    table_ID = model.item_table()
    width = table_ID.shape[1]
    rng = np.random.default_rng(0)
    k = Tensor("k", "int64", (), batched=False)
    return Source(
        name=Role.TOP_K.value,
        role=Role.TOP_K,
        tasks=(Task.RETRIEVE,),
        module=TopK(table_ID),
        inputs=(Tensor(USER, "float32", (width,)), k),
        outputs=(Tensor("scores", "float32", ("k",)), Tensor("indices", "int64", ("k",))),
        examples=tuple(
            {USER: rng.standard_normal(width, np.float32), "k": np.int64(min(7, len(table_ID) - 1))}  # type: ignore[dict-item]
            for _ in range(3)
        ),
    )


def _length(specs: Sequence[ArraySpec], arrays: Arrays, axis: str) -> int:
    for spec in specs:
        if axis in spec.axes:
            return int(arrays[spec.name].shape[spec.axes.index(axis)])
    raise AssertionError(f"no input has the axis {axis}")


@torch.inference_mode()
def run(module: nn.Module, feeds: Arrays) -> tuple[npt.NDArray[Any], ...]:
    """A module's outputs for batched arrays."""
    outputs = module(**{name: torch.from_numpy(np.asarray(a)) for name, a in feeds.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(output.numpy() for output in outputs)
