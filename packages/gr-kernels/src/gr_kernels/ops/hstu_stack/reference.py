"""The op `hstu_stack` in torch: the definition, and what runs where no native kernel does.

No padding, and no mask over all pairs: the projections take the tokens of all segments at once,
the attention goes segment by segment, see `gr_kernels.ops.hstu_attention.blocked`.

Shapes: T tokens of all segments, R rows of them that are wanted, S keys of one segment, n rows of
one segment, D model width, H heads, K columns of Q and K per head, V columns of U and V per head,
W = H·(K + V), G groups, F normalized width, L layers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gr_core.contracts import Arrivals
from gr_core.stack import LayerWeights, Stack
from gr_kernels.ops.hstu_attention.blocked import attend
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment
from gr_kernels.ops.hstu_stack.time_buckets import LOG_BUCKET_WIDTH

_Scalar = TypeVar("_Scalar", bound=np.generic)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The last is for finding the others' errors."""


class TorchStack:
    """Implements `HSTUStack`: projections and attention in ``dtype``, the residual in float32.

    With float64, everything is. What a row gives depends on its segment's mates as far as rounding:
    torch may order a sum otherwise where a matrix has another size. A block holds (L, BLOCK_TOKENS,
    W) numbers: layer after layer, the rows of K and V of its tokens.
    """

    def __init__(
        self, stack: Stack, dtype: str = "float32", *, threads: int = 1, isa: str = "torch"
    ) -> None:
        """Raises `ValueError` for a dtype that is none of `DTYPES`.

        torch has one number of threads for the whole process and an instruction set of its own
        choice, so ``threads`` and ``isa`` change nothing.
        """
        del threads, isa
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        self._dtype = DTYPES[dtype]
        self._name = f"torch-{dtype}"
        self._stack = stack
        self._layers = [_Layer.of(weights, stack, self._dtype) for weights in stack.layers]
        self._block_shape = (
            len(stack.layers),
            BLOCK_TOKENS,
            stack.num_heads * (stack.d_qk + stack.d_v),
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def block_bytes(self) -> int:
        return math.prod(self._block_shape) * self._dtype.itemsize

    @torch.inference_mode()
    def run(
        self, x_TD: Tensor, segments: Sequence[Segment], arrivals: Arrivals | None = None
    ) -> None:
        """See `HSTUStack.run`; ``x_TD`` may also be float64."""
        assert arrivals is None, "blocks on the CPU are always there"
        tokens = sum(segment.new + segment.candidates for segment in segments)
        if x_TD.shape != (tokens, self._stack.d_model):
            raise ValueError(
                f"x has the shape {tuple(x_TD.shape)}; the segments and the stack say "
                f"{(tokens, self._stack.d_model)}"
            )
        if not tokens:
            return
        places = []
        start = 0
        for segment in segments:
            places.append(_Place(segment, start, self._blocks(segment)))
            start = places[-1].stop
        groups_T = None
        if self._stack.groups > 1:
            parts = [_given(segment.groups, "groups") for segment in segments]
            groups_T = torch.from_numpy(np.concatenate(parts)).long()
        wide = torch.promote_types(x_TD.dtype, self._dtype)
        residual_TD = x_TD.to(wide)
        for number, layer in enumerate(self._layers):
            is_last = number == len(self._layers) - 1
            self._run_layer(number, layer, residual_TD, places, groups_T, is_last)
        if residual_TD is not x_TD:
            x_TD.copy_(residual_TD)

    def close(self) -> None:
        self._layers = []

    def _run_layer(
        self,
        number: int,
        layer: _Layer,
        x_TD: Tensor,
        places: Sequence[_Place],
        groups_T: Tensor | None,
        is_last: bool,
    ) -> None:
        stack = self._stack
        heads = stack.num_heads
        normed_TD = layer.input_norm(x_TD, groups_T).to(self._dtype)
        kv_TW = F.linear(normed_TD, layer.kv_weight, layer.kv_bias)
        row_R = torch.cat([torch.arange(*place.rows(is_last)) for place in places])
        if len(row_R) < len(x_TD):
            normed_TD = normed_TD[row_R]
            groups_T = None if groups_T is None else groups_T[row_R]
        qu_RW = F.linear(normed_TD, layer.qu_weight, layer.qu_bias)
        q_RF, u_RF = torch.split(qu_RW, [heads * stack.d_qk, heads * stack.d_v], dim=1)
        if stack.projection_silu == "all":
            F.silu(kv_TW, inplace=True)
            F.silu(q_RF, inplace=True)
        if stack.projection_silu != "none":
            F.silu(u_RF, inplace=True)
        # All K and V of new tokens, before any segment may read another's.
        for place in places:
            place.store(number, kv_TW)
        q_RHK = torch.unflatten(q_RF * stack.alpha, 1, (heads, -1))
        attended = []
        row = 0
        for place in places:
            first, end = place.rows(is_last)
            q_nHK = q_RHK[row : row + end - first]
            attended.append(self._attend(number, layer, place, first - place.start, q_nHK, kv_TW))
            row += end - first
        a_RF = torch.cat(attended).flatten(1).div_(stack.divisor)
        output_RD = F.linear(
            self._gate(layer, u_RF, a_RF, groups_T), layer.output_weight, layer.output_bias
        )
        if len(row_R) < len(x_TD):
            x_TD.index_add_(0, row_R, output_RD.to(x_TD.dtype))
        else:
            x_TD += output_RD

    def _attend(
        self, number: int, layer: _Layer, place: _Place, first: int, q_nHK: Tensor, kv_TW: Tensor
    ) -> Tensor:
        """Attention of a segment's rows from its row ``first`` on: (n, H, V)."""
        segment, heads = place.segment, self._stack.num_heads
        k_SF, v_SF = torch.split(
            place.keys(number, kv_TW),
            [heads * self._stack.d_qk, heads * self._stack.d_v],
            dim=1,
        )
        rows = slice(first, first + len(q_nHK))
        return attend(
            q_nHK,
            torch.unflatten(k_SF, 1, (heads, -1)),
            torch.unflatten(v_SF, 1, (heads, -1)),
            segment.low[rows],
            segment.high[rows],
            segment.cached + np.arange(rows.start, rows.stop, dtype=np.int32),
            _Bias.of(layer, segment, first, self._dtype),
        )

    def _gate(self, layer: _Layer, u_RF: Tensor, a_RF: Tensor, groups_R: Tensor | None) -> Tensor:
        if self._stack.gate == "norm(a*u)":
            return layer.attention_norm(a_RF * u_RF, groups_R)
        normed_RF = layer.attention_norm(a_RF, groups_R)
        if self._stack.gate == "u*norm(a)":
            return u_RF * normed_RF
        second_RF = a_RF if self._stack.gate == "u,a,u*norm(a)" else normed_RF
        return torch.cat([u_RF, second_RF, u_RF * normed_RF], dim=1)

    def _blocks(self, segment: Segment) -> Sequence[Tensor]:
        """The segment's blocks as tensors, valid while the caller holds them."""
        count = -(-(segment.cached + segment.new) // BLOCK_TOKENS)
        if len(segment.blocks) < count:
            raise ValueError(
                f"{segment.cached + segment.new} tokens need {count} blocks; "
                f"there are {len(segment.blocks)}"
            )
        memory = ctypes.c_uint8 * self.block_bytes
        return [
            torch.frombuffer(memory.from_address(address), dtype=self._dtype).view(
                self._block_shape
            )
            for address in segment.blocks[:count].tolist()
        ]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a segment's rows and its K and V are."""

    segment: Segment
    start: int
    blocks: Sequence[Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.segment.new + self.segment.candidates

    def rows(self, is_last: bool) -> tuple[int, int]:
        """First and end of the rows that a layer has to give."""
        segment = self.segment
        if not is_last or segment.rows is Rows.ALL:
            return self.start, self.stop
        first = self.start + segment.new
        if segment.rows is Rows.CANDIDATES_AND_LAST and segment.new:
            first -= 1
        return first, self.stop

    def store(self, layer: int, kv_TW: Tensor) -> None:
        """Writes K and V of the segment's new tokens."""
        token, end = self.segment.cached, self.segment.cached + self.segment.new
        row = self.start
        while token < end:
            offset = token % BLOCK_TOKENS
            count = min(BLOCK_TOKENS - offset, end - token)
            block = self.blocks[token // BLOCK_TOKENS]
            block[layer, offset : offset + count] = kv_TW[row : row + count]
            token += count
            row += count

    def keys(self, layer: int, kv_TW: Tensor) -> Tensor:
        """K and V of the cached and the new tokens, then of the candidates: (S, W)."""
        here_W = kv_TW[self.start : self.stop]
        cached = self.segment.cached
        if not cached:
            return here_W
        before = [block[layer] for block in self.blocks[: -(-cached // BLOCK_TOKENS)]]
        last = cached - (len(before) - 1) * BLOCK_TOKENS
        return torch.cat([*before[:-1], before[-1][:last], here_W])


@dataclass(frozen=True, slots=True)
class _Norm:
    """LayerNorm with scale and shift per group, over all columns or those of each head."""

    weight_GF: Tensor | None
    bias_GF: Tensor | None
    parts: int
    eps: float

    def __call__(self, x_TF: Tensor, groups_T: Tensor | None) -> Tensor:
        if self.parts == 1 and groups_T is None:
            weight_F, bias_F = (None if p is None else p[0] for p in (self.weight_GF, self.bias_GF))
            return F.layer_norm(x_TF, x_TF.shape[1:], weight_F, bias_F, self.eps)
        x_TPF = torch.unflatten(x_TF, 1, (self.parts, -1))
        normed_TF = F.layer_norm(x_TPF, x_TPF.shape[2:], eps=self.eps).flatten(1)
        if self.weight_GF is not None:
            normed_TF = normed_TF * _of_group(self.weight_GF, groups_T)
        if self.bias_GF is not None:
            normed_TF = normed_TF + _of_group(self.bias_GF, groups_T)
        return normed_TF


def _of_group(parameter_GF: Tensor, groups_T: Tensor | None) -> Tensor:
    return parameter_GF[0] if groups_T is None else parameter_GF[groups_T]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights in the dtype that they are used in; those of K beside V, and of Q beside U."""

    input_norm: _Norm
    kv_weight: Tensor
    kv_bias: Tensor | None
    qu_weight: Tensor
    qu_bias: Tensor | None
    attention_norm: _Norm
    output_weight: Tensor
    output_bias: Tensor | None
    position_bias: Tensor | None
    time_bias: Tensor | None

    @staticmethod
    def of(weights: LayerWeights, stack: Stack, dtype: torch.dtype) -> _Layer:
        wide = torch.promote_types(dtype, torch.float32)
        f, k = stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk

        def pairs(parameter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if parameter is None:
                return None, None
            u, v, q, k_ = torch.split(parameter.to(dtype), [f, f, k, k])
            return torch.cat([k_, v]), torch.cat([q, u])

        kv_weight, qu_weight = pairs(weights.uvqk_weight)
        kv_bias, qu_bias = pairs(weights.uvqk_bias)
        assert kv_weight is not None
        assert qu_weight is not None
        return _Layer(
            input_norm=_Norm(
                _to(weights.input_norm_weight, wide),
                _to(weights.input_norm_bias, wide),
                1,
                stack.norm_eps,
            ),
            kv_weight=kv_weight,
            kv_bias=kv_bias,
            qu_weight=qu_weight,
            qu_bias=qu_bias,
            attention_norm=_Norm(
                _to(weights.attention_norm_weight, dtype),
                _to(weights.attention_norm_bias, dtype),
                stack.num_heads if stack.head_norm else 1,
                stack.norm_eps,
            ),
            output_weight=weights.output_weight.to(dtype),
            output_bias=_to(weights.output_bias, dtype),
            position_bias=_to(weights.position_bias, wide),
            time_bias=_to(weights.time_bias, wide),
        )


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


@dataclass(frozen=True, slots=True)
class _Bias:
    """Implements `PairBias` for the rows of a segment from ``first`` on.

    A candidate's position is N, whichever it is: candidates are alternatives.
    """

    layer: _Layer
    segment: Segment
    first: int
    dtype: torch.dtype

    @staticmethod
    def of(layer: _Layer, segment: Segment, first: int, dtype: torch.dtype) -> _Bias | None:
        if layer.position_bias is None and layer.time_bias is None:
            return None
        return _Bias(layer, segment, first, dtype)

    def block(self, queries: slice, keys: slice) -> Tensor:
        return self._at(
            np.arange(queries.start, queries.stop)[:, None], np.arange(keys.start, keys.stop)
        )

    def pairs(self, query_R: Tensor, key_R: Tensor) -> Tensor:
        return self._at(query_R.numpy(), key_R.numpy())

    def _at(self, query: npt.NDArray[np.int64], key: npt.NDArray[np.int64]) -> Tensor:
        """Of pairs of a row and a key, in the shape to which the two broadcast."""
        segment, total = self.segment, None
        history = segment.cached + segment.new
        row = query + self.first
        if self.layer.position_bias is not None:
            # j - i + P - 1, in a table of 2·P - 1.
            position = np.minimum(row + segment.cached, history)
            middle = len(self.layer.position_bias) // 2
            index = np.minimum(key, history) - position + middle
            total = self.layer.position_bias[torch.from_numpy(index)]
        if self.layer.time_bias is not None:
            times = _given(segment.times, "times")
            elapsed = _given(segment.next_times, "next_times")[row] - times[key]
            seconds = torch.from_numpy(np.maximum(np.abs(elapsed), 1)).float()
            bucket = (seconds.log() / LOG_BUCKET_WIDTH).long()
            bucket.clamp_(max=len(self.layer.time_bias) - 1)
            of_time = self.layer.time_bias[bucket]
            total = of_time if total is None else total + of_time
        assert total is not None
        return total.to(self.dtype)


def _given(array: npt.NDArray[_Scalar] | None, name: str) -> npt.NDArray[_Scalar]:
    if array is None:
        raise ValueError(f"a segment has no {name}; the stack needs them")
    return array
