"""Integers for the weights of the layers' projections, in the formats that vLLM reads.

``int8``: a scale for each row, and activations in int8 too, a scale for each token (W8A8, in the
format of compressed-tensors). ``awq`` and ``gptq``: 4 bits, a scale for each `GROUP` columns of a
row, and in AWQ the place of zero; activations stay as they are. All are rounded to nearest: the
methods that gave the formats their names choose scales on calibration data besides, which is not
done here.

Shapes: N outputs, K inputs of a projection, G = K / GROUP groups, P = 8 numbers in an int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Quantization = Literal["none", "int8", "awq", "gptq"]
FOUR_BITS: tuple[Quantization, ...] = ("awq", "gptq")
PROJECTIONS = ("uvqk_proj", "o_proj")
"""What is quantized; tables, norms and biases are not."""

GROUP = 32
MULTIPLE = 32
"""vLLM's kernel of 4 bits on CPUs takes widths that are multiples of it."""
_P = 8
_MAX8, _MAX4 = 127, 15
_MIDDLE4 = 8
_TINY = 1e-12

# Of 8 consecutive columns, the one that stands at each place of an int32, from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    """What config.json says of it under this name."""
    common = {"bits": 4, "group_size": GROUP, "lm_head": False}
    if quantization == "awq":
        return {"quant_method": "awq", "version": "gemm", "zero_point": True, **common}
    if quantization == "gptq":
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "desc_act": False,
            "sym": True,
            **common,
        }
    assert quantization == "int8"
    weights = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "strategy": "channel", "dynamic": False},
                "input_activations": {**weights, "strategy": "token", "dynamic": True},
            }
        },
    }


def shapes(
    quantization: Quantization, outputs: int, inputs: int
) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """The tensors that stand for a weight (N, K): safetensors' word for the dtype, and shape."""
    if quantization == "none":
        return {"weight": ("F32", (outputs, inputs))}
    if quantization == "int8":
        return {"weight": ("I8", (outputs, inputs)), "weight_scale": ("F32", (outputs, 1))}
    packed, groups = outputs // _P, inputs // GROUP
    common = {"scales": ("F32", (groups, outputs)), "qzeros": ("I32", (groups, packed))}
    if quantization == "awq":
        return {"qweight": ("I32", (inputs, packed)), **common}
    return {"qweight": ("I32", (inputs // _P, outputs)), **common}


def quantize(quantization: Quantization, weight_NK: Tensor) -> dict[str, Tensor]:
    """The tensors of `shapes`."""
    if quantization == "none":
        return {"weight": weight_NK}
    if quantization == "int8":
        scale_N1 = weight_NK.abs().amax(1, keepdim=True).clamp(min=_TINY) / _MAX8
        whole = (weight_NK / scale_N1).round().clamp(-_MAX8, _MAX8)
        return {"weight": whole.to(torch.int8), "weight_scale": scale_N1}
    group_GSN = weight_NK.T.reshape(-1, GROUP, len(weight_NK))
    if quantization == "awq":
        low_GN, high_GN = group_GSN.amin(1).clamp(max=0), group_GSN.amax(1).clamp(min=0)
        scale_GN = ((high_GN - low_GN) / _MAX4).clamp(min=_TINY)
        zero_GN = (-low_GN / scale_GN).round().clamp(0, _MAX4)
    else:
        scale_GN = (group_GSN.abs().amax(1) / (_MAX4 - _MIDDLE4)).clamp(min=_TINY)
        zero_GN = torch.full_like(scale_GN, _MIDDLE4)
    whole_KN = ((group_GSN / scale_GN[:, None]).round() + zero_GN[:, None]).flatten(0, 1)
    whole_KN = whole_KN.clamp(0, _MAX4).long()
    if quantization == "awq":
        return {
            "qweight": _packed(whole_KN, _AWQ_ORDER),
            "scales": scale_GN,
            "qzeros": _packed(zero_GN.long(), _AWQ_ORDER),
        }
    return {
        "qweight": _packed(whole_KN.T).T,
        "scales": scale_GN,
        # The format keeps what is one less, by an old mistake that all its readers know.
        "qzeros": _packed(zero_GN.long() - 1),
    }


def dequantize(quantization: Quantization, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight (N, K) that the tensors stand for, float32."""
    if quantization == "none":
        return tensors["weight"]
    if quantization == "int8":
        return tensors["weight"].float() * tensors["weight_scale"]
    scale_GN = tensors["scales"]
    if quantization == "awq":
        whole_KN = _unpacked(tensors["qweight"], _AWQ_ORDER)
        zero_GN = _unpacked(tensors["qzeros"], _AWQ_ORDER)
    else:
        whole_KN = _unpacked(tensors["qweight"].T).T
        zero_GN = _unpacked(tensors["qzeros"]) + 1
    group_GSN = whole_KN.view(-1, GROUP, whole_KN.shape[1])
    weight_GSN = (group_GSN - zero_GN[:, None]).float() * scale_GN[:, None]
    return weight_GSN.flatten(0, 1).T


def _packed(whole: Tensor, order: tuple[int, ...] = tuple(range(_P))) -> Tensor:
    """(R, C) of 4 bits as (R, C / 8) int32."""
    parts = whole.reshape(len(whole), -1, _P)
    bits = torch.zeros(parts.shape[:2], dtype=torch.int64)
    for place, column in enumerate(order):
        bits |= parts[..., column] << (4 * place)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def _unpacked(bits: Tensor, order: tuple[int, ...] = tuple(range(_P))) -> Tensor:
    """The inverse of `_packed`, int64."""
    columns = torch.empty(*bits.shape, _P, dtype=torch.int64)
    for place, column in enumerate(order):
        columns[..., column] = (bits.long() >> (4 * place)) & _MAX4
    return columns.flatten(1)
