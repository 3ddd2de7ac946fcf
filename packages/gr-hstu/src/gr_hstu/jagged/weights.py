"""The layers of the models as `gr_core.stack.Stack`; the weights are the modules' own."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor, nn

from gr_core.errors import PlanError
from gr_core.stack import Gate, LayerWeights, Stack
from gr_hstu.config import HSTUConfig
from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval
from gr_hstu.modules.hstu import HeadNorm, HSTULayer
from gr_hstu.modules.masks import NUM_GROUPS
from gr_hstu.modules.mtgr import MTGRLayer


def stack_of(module: HSTURetrieval | HSTURanking | MTGR) -> Stack:
    """Raises `PlanError` for the softmax variant, whose attention is not pointwise."""
    if isinstance(module, MTGR):
        return _mtgr_stack(module)
    return _hstu_stack(module.config, module.stack.layers)


def _hstu_stack(config: HSTUConfig, layers: nn.ModuleList) -> Stack:
    research = config.variant == "research"
    if config.attention_activation == "softmax":
        raise PlanError(
            "attention_activation 'softmax' normalizes each score over all others, padding among "
            "them; only models with pointwise attention ('silu') open their stack"
        )
    gate: Gate = "u,a,u*norm(a)"
    if research:
        gate = "u,norm(a),u*norm(a)" if config.concat_ua else "u*norm(a)"
    return Stack(
        d_model=config.d_model,
        num_heads=config.num_heads,
        d_qk=config.d_qk,
        d_v=config.d_v,
        alpha=config.scale,
        divisor=float(config.divisor),
        norm_eps=config.norm_eps,
        projection_silu=_projection_silu(config),
        gate=gate,
        head_norm=not research and config.group_norm,
        groups=1,
        layers=tuple(_hstu_layer(cast("HSTULayer", layer)) for layer in layers),
    )


def _projection_silu(config: HSTUConfig) -> Literal["none", "u", "all"]:
    if config.variant == "ranking":
        return "u"
    return "all" if config.projection_activation == "silu" else "none"


def _hstu_layer(layer: HSTULayer) -> LayerWeights:
    norm = layer.attention_norm
    if isinstance(norm, HeadNorm):
        # One scale and one shift a head, for each of its columns.
        columns = layer.config.d_v
        weight: Tensor | None = norm.weight.repeat_interleave(columns)
        bias: Tensor | None = norm.bias.repeat_interleave(columns)
    else:
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = norm.weight, norm.bias
    relative = layer.relative_bias
    return LayerWeights(
        input_norm_weight=_of_one_group(layer.input_norm.weight),
        input_norm_bias=_of_one_group(layer.input_norm.bias),
        uvqk_weight=_tensor(layer.uvqk.weight),
        uvqk_bias=_tensor(layer.uvqk.bias),
        attention_norm_weight=_of_one_group(weight),
        attention_norm_bias=_of_one_group(bias),
        output_weight=_tensor(layer.output.weight),
        output_bias=_tensor(layer.output.bias),
        position_bias=None if relative is None else _tensor(relative.position_weight),
        time_bias=None if relative is None else _tensor(relative.time_weight),
    )


def _mtgr_stack(module: MTGR) -> Stack:
    config = module.config
    return Stack(
        d_model=config.d_model,
        num_heads=config.num_heads,
        d_qk=config.qk_dim,
        d_v=config.v_dim,
        alpha=1.0,
        divisor=float(config.max_seq_len),
        norm_eps=config.norm_eps,
        projection_silu="all",
        gate="norm(a*u)",
        head_norm=False,
        groups=NUM_GROUPS,
        layers=tuple(_mtgr_layer(cast("MTGRLayer", layer)) for layer in module.stack.layers),
    )


def _mtgr_layer(layer: MTGRLayer) -> LayerWeights:
    return LayerWeights(
        input_norm_weight=_tensor(layer.input_norm.weight),
        input_norm_bias=_tensor(layer.input_norm.bias),
        uvqk_weight=_tensor(layer.uvqk.weight),
        uvqk_bias=_tensor(layer.uvqk.bias),
        attention_norm_weight=_tensor(layer.gate_norm.weight),
        attention_norm_bias=_tensor(layer.gate_norm.bias),
        output_weight=_tensor(layer.output.weight),
        output_bias=_tensor(layer.output.bias),
    )


def _tensor(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().contiguous()


def _of_one_group(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().contiguous()[None]
