"""What a model directory means, in plain torch: the layers straight from its two files.

Slow and simple, to compare with. Keys and values go through pages, as they do in vLLM.

Shapes: N tokens of the history, T tokens of a sequence or of a part of it, W ids of a token, D
model width, H heads, K columns of Q and K per head, V columns of U and V per head, F = H·V, G
groups of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from gr_vllm.checkpoint import WEIGHTS, Checkpoint
from gr_vllm.quantization import dequantize
from gr_vllm.weights import projections
from gr_vllm.worker.bias import RelativeBias, pairs_of
from gr_vllm.worker.kernels import PAGE_TOKENS
from gr_vllm.worker.step import Pages
from gr_vllm.worker.torch_attention import TorchPagedAttention


@dataclass(frozen=True, slots=True)
class TokensIn:
    """The stack's input for one sequence, its candidates included, and what else layers need."""

    x_TD: Tensor
    low_T: Tensor
    """int32."""
    high_T: Tensor
    groups_T: Tensor | None = None
    """int64."""
    times_T: Tensor | None = None
    """int32 seconds."""
    next_times_T: Tensor | None = None


class Reader:
    """A model directory in float32. Raises `BundleError` for what is not one."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.read(folder)
        self._tensors = load_file(folder / WEIGHTS)

    def embed(self, ids_TW: Tensor) -> Tensor:
        """(T, D), of the first tokens of a sequence."""
        x_TD = sum(
            (self._tensors[f"tokens.tables.{i}.weight"][ids_T] for i, ids_T in enumerate(ids_TW.T)),
            torch.zeros(()),
        )
        if self.checkpoint.places:
            places = torch.arange(len(ids_TW)).clamp(max=self.checkpoint.places - 1)
            x_TD = x_TD + self._tensors["tokens.places.weight"][places]
        return x_TD

    def scores(self, x_RD: Tensor) -> Tensor:
        """Of all answers; in generation, log-probabilities within each level, 0 elsewhere."""
        norm, eps = self.checkpoint.readout_norm, self.checkpoint.readout_eps
        if norm == "l2":
            x_RD = F.normalize(x_RD, dim=-1, eps=eps)
        elif norm == "layer":
            x_RD = F.layer_norm(x_RD, x_RD.shape[-1:], eps=eps)
        scores_RA = x_RD @ self._tensors["lm_head.weight"].T
        if self.checkpoint.role != "generation":
            return scores_RA
        found_RA = torch.zeros_like(scores_RA)
        for start, stop in self.checkpoint.levels:
            found_RA[:, start:stop] = scores_RA[:, start:stop].log_softmax(-1)
        return found_RA

    def run(self, tokens: TokensIn, ends: Sequence[int]) -> Tensor:
        """The stack's output (T, D); the tokens up to each of ``ends`` in a pass of their own."""
        count = -(-len(tokens.x_TD) // PAGE_TOKENS)
        layers = [self._layer(i, count) for i in range(self.checkpoint.layers.num_layers)]
        parts = []
        start = 0
        for end in ends:
            parts.append(self._pass(layers, tokens, start, end, count))
            start = end
        assert start == len(tokens.x_TD), ends
        return torch.cat(parts)

    def _pass(
        self, layers: Sequence[_Layer], tokens: TokensIn, start: int, end: int, count: int
    ) -> Tensor:
        new = slice(start, end)
        pages = Pages(
            block_table=torch.arange(count, dtype=torch.int32)[None],
            slots_T=torch.arange(start, end),
            query_offsets=torch.tensor([0, end - start], dtype=torch.int32),
            key_counts=torch.tensor([end], dtype=torch.int32),
        )
        config = self.checkpoint.layers
        pairs = None
        if config.positions or config.time_buckets:
            times = [] if tokens.times_T is None else [tokens.times_T[:end]]
            next_times_T = None if tokens.next_times_T is None else tokens.next_times_T[new]
            pairs = pairs_of(pages, config.positions, config.time_buckets, next_times_T, times)
        groups_T = None if tokens.groups_T is None else tokens.groups_T[new]
        x_TD = tokens.x_TD[new]
        for layer in layers:
            bias = None if pairs is None else layer.bias(pairs)
            x_TD = layer(x_TD, pages, tokens.low_T[new], tokens.high_T[new], groups_T, bias)
        return x_TD

    def _layer(self, number: int, pages: int) -> _Layer:
        prefix = f"stack.layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        for name in projections(self.checkpoint.layers):
            kept = {n.removeprefix(f"{name}."): t for n, t in own.items() if n.startswith(name)}
            own[f"{name}.weight"] = dequantize(self.checkpoint.quantization, kept)
        return _Layer(self.checkpoint, own, pages)


class _Layer:
    """One layer and its pages."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, Tensor], pages: int) -> None:
        config = checkpoint.layers
        self._config, self._tensors = config, tensors
        self._attention = TorchPagedAttention(
            config.num_heads, config.d_qk, config.d_v, torch.float32, config.alpha, config.divisor
        )
        self._pages = torch.zeros(pages, self._attention.page_bytes, dtype=torch.uint8)
        self.bias = RelativeBias(config.positions, config.time_buckets)
        for name, table in self.bias.named_parameters():
            table.data = tensors[f"relative_bias.{name}"]

    def __call__(
        self,
        x_TD: Tensor,
        pages: Pages,
        low_T: Tensor,
        high_T: Tensor,
        groups_T: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        config = self._config
        keyed, gated = config.num_heads * config.d_qk, config.num_heads * config.d_v
        projected = self._linear("uvqk_proj", self._norm("input_norm", x_TD, groups_T, 1))
        if config.projection_silu == "all":
            projected = F.silu(projected)
        u_TF, v_TF, q_TF, k_TF = projected.split_with_sizes([gated, gated, keyed, keyed], dim=1)
        if config.projection_silu == "u":
            u_TF = F.silu(u_TF)
        q_THK, k_THK, v_THV = (_by_head(x, config.num_heads) for x in (q_TF, k_TF, v_TF))
        a_TF = self._attention(
            q_THK,
            k_THK,
            v_THV,
            self._pages,
            pages.block_table,
            pages.slots_T,
            pages.query_offsets,
            pages.key_counts,
            low_T,
            high_T,
            bias,
        ).flatten(1)
        return x_TD + self._linear("o_proj", self._gate(u_TF, a_TF, groups_T))

    def _gate(self, u_TF: Tensor, a_TF: Tensor, groups_T: Tensor | None) -> Tensor:
        heads = self._config.num_heads if self._config.head_norm else 1
        if self._config.gate == "norm(a*u)":
            return self._norm("attention_norm", a_TF * u_TF, groups_T, heads)
        normed_TF = self._norm("attention_norm", a_TF, groups_T, heads)
        if self._config.gate == "u*norm(a)":
            return u_TF * normed_TF
        second_TF = a_TF if self._config.gate == "u,a,u*norm(a)" else normed_TF
        by_head = [
            _by_head(part, self._config.num_heads) for part in (u_TF, second_TF, u_TF * normed_TF)
        ]
        return torch.cat(by_head, dim=2).flatten(1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x_TF: Tensor, groups_T: Tensor | None, heads: int) -> Tensor:
        parts = _by_head(x_TF, heads)
        normed_TF = F.layer_norm(parts, parts.shape[-1:], eps=self._config.norm_eps).flatten(1)
        if not self._config.norms:
            return normed_TF
        scale_GF, shift_GF = (self._tensors[f"{name}.{part}"] for part in ("weight", "bias"))
        group = 0 if groups_T is None else groups_T
        return normed_TF * scale_GF[group] + shift_GF[group]


def _by_head(x_TF: Tensor, heads: int) -> Tensor:
    return x_TF.reshape(len(x_TF), heads, x_TF.shape[1] // heads)
