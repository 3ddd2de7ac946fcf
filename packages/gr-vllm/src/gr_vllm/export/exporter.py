"""The exporter ``vllm``: a model's layers and tables as a model directory for vLLM.

Shapes: D model width, H heads, V columns of U and V per head, m parts of the gate.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gr_core.contracts import Artifact, ExportOptions, Model
from gr_core.errors import PlanError
from gr_core.generation import GenerativeModel
from gr_core.stack import Stack, StackModel
from gr_core.tokens import Readout, TokenModel, TokenTables
from gr_core.types import Task
from gr_vllm.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    Checkpoint,
    Dtype,
    Layers,
    Role,
    Tokens,
)
from gr_vllm.engine.options import VllmOptions
from gr_vllm.export.histories import longest_history
from gr_vllm.export.options import ExportSettings, check_widths
from gr_vllm.export.verify import TASKS, verify
from gr_vllm.quantization import PROJECTIONS, Quantization, quantize

logger = logging.getLogger(__name__)

ENGINE_OPTIONS = frozenset(field.name for field in fields(VllmOptions))
"""A chain and its engine get the same options; each refuses only what neither knows."""
_QUANTIZED = tuple(f".{name}.weight" for name in PROJECTIONS)


class VllmExporter:
    """torch → vllm; options are those of `ExportSettings`.

    Weights that are not quantized stay in float32; vLLM casts them as it loads.
    """

    def export(
        self, artifact: Artifact, model: Model, out_dir: Path, options: ExportOptions
    ) -> Artifact:
        settings = ExportSettings.of(options.extra, foreign=ENGINE_OPTIONS)
        dtype, quantization = settings.precision(options.dtype)
        if not isinstance(model, StackModel):
            raise PlanError(f"exporter vllm: {type(model).__name__} does not open its stack")
        checkpoint, tensors = convert(model, dtype, quantization)
        try:
            save_file(tensors, out_dir / WEIGHTS)
            checkpoint.write(out_dir)
            difference = verify(out_dir, model)
        except BaseException:
            for name in (WEIGHTS, CONFIG):
                (out_dir / name).unlink(missing_ok=True)
            raise
        logger.info(
            "%s/%s: %s with prompts of %s, %d tensors, quantization %s; differs by %.2g",
            checkpoint.name,
            checkpoint.version,
            checkpoint.role,
            checkpoint.tokens,
            len(tensors),
            checkpoint.quantization,
            difference,
        )
        return Artifact("vllm", out_dir)


def convert(
    model: StackModel, dtype: Dtype = "float32", quantization: Quantization = "none"
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """What a model directory says and holds. Raises `PlanError` where vLLM cannot run a model."""
    role = _role(model)
    task = TASKS[role]
    stack = model.stack(task)
    tables: TokenTables | None = None
    readout: Readout | None = None
    if role != "ranking":
        if not isinstance(model, TokenModel):
            raise PlanError(
                f"exporter vllm: {type(model).__name__} retrieves, but does not open the ends of "
                "its stack (gr_core.tokens.TokenModel)"
            )
        tables, readout = model.token_tables(), model.readout()
    history = longest_history(model, task)
    if role == "ranking" and not history.candidates:
        raise PlanError(
            f"exporter vllm: {model.bundle.name} ranks by the last token of the history; expected "
            "the task retrieve among its tasks, which vLLM then ranks with"
        )
    layers = _layers(stack)
    if tables is not None and layers.groups > 1:
        raise PlanError(
            f"exporter vllm: {model.bundle.name} has {layers.groups} groups of norms; expected 1 "
            "where tokens are sums of table rows"
        )
    timed = layers.time_buckets > 0
    tokens: Tokens = "rows"
    if tables is not None:
        tokens = "ids" if len(tables.tables) == 1 and not timed else "columns"
    bundle = model.bundle
    checkpoint = Checkpoint(
        format_version=FORMAT_VERSION,
        role=role,
        tokens=tokens,
        name=bundle.name,
        version=bundle.version,
        identity=bundle.identity.hex(),
        dtype=dtype,
        quantization=quantization,
        layers=layers,
        tables=() if tables is None else tuple(len(table) for table in tables.tables),
        places=0 if tables is None or tables.places is None else len(tables.places),
        answers=0 if readout is None else len(readout.table),
        readout_norm="none" if readout is None else readout.norm,
        readout_eps=0.0 if readout is None else readout.eps,
        levels=(
            tuple((level.start, level.stop) for level in model.levels)
            if isinstance(model, GenerativeModel) and role == "generation"
            else ()
        ),
        max_history=history.tokens,
        causal=history.causal,
    )
    check_widths(checkpoint)
    tensors = {n: t.detach().float() for n, t in _stack_tensors(stack).items()}
    for name in [n for n in tensors if n.endswith(_QUANTIZED)]:
        prefix = name.removesuffix("weight")
        parts = quantize(quantization, tensors.pop(name))
        tensors |= {f"{prefix}{part}": t for part, t in parts.items()}
    if tables is not None:
        tensors |= {f"tokens.tables.{i}.weight": t for i, t in enumerate(tables.tables)}
        if tables.places is not None:
            tensors["tokens.places.weight"] = tables.places
    if readout is not None:
        tensors["lm_head.weight"] = readout.table
    return checkpoint, {name: t.detach().contiguous() for name, t in tensors.items()}


def _role(model: Model) -> Role:
    if Task.GENERATE in model.tasks:
        return "generation"
    return "retrieval" if Task.RETRIEVE in model.tasks else "ranking"


def _layers(stack: Stack) -> Layers:
    first = stack.layers[0]
    position, time = first.position_bias, first.time_bias
    return Layers(
        d_model=stack.d_model,
        num_layers=len(stack.layers),
        num_heads=stack.num_heads,
        d_qk=stack.d_qk,
        d_v=stack.d_v,
        alpha=stack.alpha,
        divisor=stack.divisor,
        norm_eps=stack.norm_eps,
        projection_silu=stack.projection_silu,
        gate=stack.gate,
        head_norm=stack.head_norm,
        groups=stack.groups,
        norms=first.input_norm_weight is not None,
        projection_bias=first.uvqk_bias is not None,
        output_bias=first.output_bias is not None,
        positions=0 if position is None else (len(position) + 1) // 2,
        time_buckets=0 if time is None else len(time),
    )


def _stack_tensors(stack: Stack) -> dict[str, Tensor]:
    parts = _layers(stack).parts
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(stack.layers):
        # Head by head instead of part by part, so that ranks take slices.
        output = layer.output_weight.unflatten(1, (parts, stack.num_heads, stack.d_v))
        named = {
            "input_norm.weight": layer.input_norm_weight,
            "input_norm.bias": layer.input_norm_bias,
            "uvqk_proj.weight": layer.uvqk_weight,
            "uvqk_proj.bias": layer.uvqk_bias,
            "attention_norm.weight": layer.attention_norm_weight,
            "attention_norm.bias": layer.attention_norm_bias,
            "o_proj.weight": output.transpose(1, 2).flatten(1),
            "o_proj.bias": layer.output_bias,
            "relative_bias.position": layer.position_bias,
            "relative_bias.time": layer.time_bias,
        }
        tensors |= {f"stack.layers.{i}.{n}": t for n, t in named.items() if t is not None}
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    return tensors
