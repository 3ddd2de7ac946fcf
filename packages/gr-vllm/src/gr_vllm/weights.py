"""The tensors of a model directory: what they are called, and whether a file has them.

Shapes: D model width, H heads, K columns of Q and K per head, V columns of U and V per head, F =
H·V, G groups of tokens, m parts of the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from gr_core.errors import BundleError
from gr_vllm.quantization import shapes

if TYPE_CHECKING:
    from gr_vllm.checkpoint import Checkpoint, Layers

Spec = tuple[str, tuple[int, ...]]
"""safetensors' word for the dtype, and the shape."""

_FLOAT = "F32"


def specs(checkpoint: Checkpoint) -> Mapping[str, Spec]:
    """Of all tensors of a checkpoint, by name."""
    width = checkpoint.layers.d_model
    found: dict[str, Spec] = {
        f"tokens.tables.{i}.weight": (_FLOAT, (rows, width))
        for i, rows in enumerate(checkpoint.tables)
    }
    if checkpoint.places:
        found["tokens.places.weight"] = (_FLOAT, (checkpoint.places, width))
    if checkpoint.answers:
        found["lm_head.weight"] = (_FLOAT, (checkpoint.answers, width))
    for name, spec in _layer(checkpoint).items():
        for i in range(checkpoint.layers.num_layers):
            found[f"stack.layers.{i}.{name}"] = spec
    return found


def projections(layers: Layers) -> Mapping[str, tuple[int, int]]:
    """Outputs and inputs of a layer's projections."""
    keyed, gated = layers.num_heads * layers.d_qk, layers.num_heads * layers.d_v
    return {
        "uvqk_proj": (2 * (keyed + gated), layers.d_model),
        "o_proj": (layers.d_model, layers.parts * gated),
    }


def _layer(checkpoint: Checkpoint) -> Mapping[str, Spec]:
    layers = checkpoint.layers
    found: dict[str, Spec] = {}
    biased = {"uvqk_proj": layers.projection_bias, "o_proj": layers.output_bias}
    for name, (outputs, inputs) in projections(layers).items():
        for part, spec in shapes(checkpoint.quantization, outputs, inputs).items():
            found[f"{name}.{part}"] = spec
        if biased[name]:
            found[f"{name}.bias"] = (_FLOAT, (outputs,))
    if layers.norms:
        gated = layers.num_heads * layers.d_v
        for name, width in (("input_norm", layers.d_model), ("attention_norm", gated)):
            for part in ("weight", "bias"):
                found[f"{name}.{part}"] = (_FLOAT, (layers.groups, width))
    if layers.positions:
        found["relative_bias.position"] = (_FLOAT, (2 * layers.positions - 1,))
    if layers.time_buckets:
        found["relative_bias.time"] = (_FLOAT, (layers.time_buckets,))
    return found


def check(file: Path, checkpoint: Checkpoint) -> None:
    """Raises `BundleError` for a file that is truncated, or has other tensors. Reads no weights."""
    expected = specs(checkpoint)
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            of_file = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in found.items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{file}: cannot be read: {error}; export the bundle again") from None
    for name in sorted(expected.keys() | of_file.keys()):
        one, other = of_file.get(name), expected.get(name)
        if one != other:
            raise BundleError(
                f"{file}: {name} is {_said(one)}; expected {_said(other)}; export the bundle again"
            )


def _said(spec: Spec | None) -> str:
    return "not there" if spec is None else f"{spec[0]} {list(spec[1])}"
