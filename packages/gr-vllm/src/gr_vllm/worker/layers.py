"""HSTU layers on vLLM's parallel and quantized linear layers.

Y = X + output(gate(U, a)), a = attention(Q, K, V), U, V, Q, K = uvqk(norm(X)): the terms of
`gr_core.stack.Stack`. Heads are spread over tensor-parallel ranks.

Shapes: T tokens, D model width, H heads of this rank, V columns of U and V per head, F = H·V, m
parts that the gate concatenates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from gr_vllm.checkpoint import Layers
from gr_vllm.worker.attention import HSTUAttention
from gr_vllm.worker.bias import Pairs, RelativeBias, pairs_of
from gr_vllm.worker.norms import GroupedNorm
from gr_vllm.worker.step import Step


class HSTULayer(nn.Module):
    def __init__(
        self, layers: Layers, quantization: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        assert layers.num_heads % ranks == 0, (layers.num_heads, ranks)
        self._config = layers
        heads = layers.num_heads // ranks
        self._heads = heads
        qk, width = layers.num_heads * layers.d_qk, layers.num_heads * layers.d_v
        self._widths = [width // ranks, width // ranks, qk // ranks, qk // ranks]
        self.input_norm = GroupedNorm(
            layers.d_model, layers.groups, layers.norm_eps, affine=layers.norms, split=False
        )
        self.uvqk_proj = MergedColumnParallelLinear(
            layers.d_model,
            [width, width, qk, qk],
            bias=layers.projection_bias,
            quant_config=quantization,
            prefix=f"{prefix}.uvqk_proj",
            return_bias=False,
        )
        self.attn = HSTUAttention(layers, heads, f"{prefix}.attn")
        self.attention_norm = GroupedNorm(
            width,
            layers.groups,
            layers.norm_eps,
            affine=layers.norms,
            heads=layers.num_heads if layers.head_norm else 0,
            split=True,
        )
        self.o_proj = RowParallelLinear(
            layers.parts * width,
            layers.d_model,
            bias=layers.output_bias,
            quant_config=quantization,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        biased = layers.positions or layers.time_buckets
        self.relative_bias = RelativeBias(layers.positions, layers.time_buckets) if biased else None

    def forward(self, x_TD: Tensor, step: Step, pairs: Pairs | None) -> Tensor:
        normed_TD = self.input_norm(x_TD, step.groups_T)
        u_TF, v_TF, q_TF, k_TF = self._activated(self.uvqk_proj(normed_TD))
        bias = None
        if self.relative_bias is not None and pairs is not None:
            bias = self.relative_bias(pairs)
        a_TF = self.attn(q_TF, k_TF, v_TF, step, bias)
        return x_TD + self.o_proj(self._gate(u_TF, a_TF, step.groups_T))

    def _activated(self, uvqk: Tensor) -> tuple[Tensor, ...]:
        silu = self._config.projection_silu
        if silu == "all":
            return F.silu(uvqk, inplace=True).split_with_sizes(self._widths, dim=1)
        u_TF, *others = uvqk.split_with_sizes(self._widths, dim=1)
        return (F.silu(u_TF) if silu == "u" else u_TF, *others)

    def _gate(self, u_TF: Tensor, a_TF: Tensor, groups_T: Tensor | None) -> Tensor:
        gate = self._config.gate
        if gate == "norm(a*u)":
            return self.attention_norm(a_TF * u_TF, groups_T)
        normed_TF = self.attention_norm(a_TF, groups_T)
        if gate == "u*norm(a)":
            return u_TF * normed_TF
        second_TF = a_TF if gate == "u,a,u*norm(a)" else normed_TF
        parts = [u_TF, second_TF, u_TF * normed_TF]
        by_head = (len(u_TF), self._heads, self._config.d_v)
        # Head by head, so that a rank's columns of the output projection lie together.
        return torch.stack([p.view(by_head) for p in parts], 2).flatten(1)


class HSTUStack(nn.Module):
    def __init__(
        self, layers: Layers, quantization: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self._positions, self._time_buckets = layers.positions, layers.time_buckets
        self.layers = nn.ModuleList(
            HSTULayer(layers, quantization, f"{prefix}.layers.{i}")
            for i in range(layers.num_layers)
        )

    @property
    def attention(self) -> HSTUAttention:
        """Of the first layer, which speaks for all."""
        first = self.layers[0]
        assert isinstance(first, HSTULayer)
        return first.attn

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        pairs = None
        if (self._positions or self._time_buckets) and step.pages is not None:
            times = self.attention.keep_times(step) if self._time_buckets else []
            pairs = pairs_of(
                step.pages, self._positions, self._time_buckets, step.next_times_T, times
            )
        for layer in self.layers:
            x_TD = layer(x_TD, step, pairs)
        return x_TD
