"""The op `hstu_stack` on a GPU: projection, attention and output as kernels of their own.

Nothing waits for the device. Small batches, the ones of returning users, are replayed from CUDA
graphs, one a layer, so that K and V that are still being copied can arrive layer by layer.

A block holds for one layer after another K (H, 32, K), then V (H, 32, V), in the dtype of the
stack; see `gr_kernels.ops.hstu_attention.on_device.CachedKeys`.

Shapes: T tokens of all segments, R rows of them that are wanted, B segments, D model width, H
heads, K columns of Q and K per head, V columns of U and V per head, F = H·V, W = H·(2·V + 2·K), Y
columns that the output projection reads, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gr_core.contracts import Arrivals
from gr_core.errors import PlanError
from gr_core.stack import LayerWeights, Stack
from gr_kernels.choice import choose
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.hstu_attention.on_device import CachedKeys, DeviceAttention, TableBias
from gr_kernels.ops.hstu_stack.batch_arrays import Sizes, fill, layout, sizes_of, views
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Segment
from gr_kernels.ops.hstu_stack.time_buckets import thresholds
from gr_kernels.tuning import power_of_two

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPH_QUERIES = 64
"""By which graphs choose their tiles: one user may have all the tokens, or many a few each."""
_STORED_AT_ONCE = 8
"""Tokens of a program that stores K and V: 16 bytes a thread, for heads of bfloat16."""
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step and returns what repeats it, see `gr_kernels.cuda.graphs.Recorder`."""


class Ops:
    """Which implementation of the parts of a layer runs, by size; chosen once for each."""

    def __init__(self, dtype: str, heads: tuple[int, int], kernels: Sequence[str]) -> None:
        """``heads`` are the columns of Q and V of a head; ``kernels`` names what is asked for."""
        self._dtype = dtype
        self._kernels = kernels
        self._d_qk, self._d_v = heads

    @functools.cache  # noqa: B019 - as long as the stack
    def _chosen(self, op: str, sizes: tuple[tuple[str, int], ...]) -> Any:
        kernel = choose(op, self._dtype, device="cuda", sizes=dict(sizes), kernels=self._kernels)
        return kernel.resolve()

    def attention(self, most_queries: int, *, biased: bool) -> DeviceAttention:
        d_qk, d_v = (power_of_two(d, least=16) for d in (self._d_qk, self._d_v))
        queries = power_of_two(most_queries, least=16, most=4096)
        sizes = [("d_qk", d_qk), ("d_v", d_v), ("queries", queries)]
        if biased:
            sizes.append(("biased", 1))
        chosen: DeviceAttention = self._chosen("hstu_cached_attention", tuple(sizes))
        return chosen

    def projection(self, rows: int, columns: int, width: int) -> Callable[..., Tensor]:
        chosen: Callable[..., Tensor] = self._chosen(
            "hstu_projection", _dense_sizes(rows, columns, width)
        )
        return chosen

    def output(self, rows: int, columns: int, width: int) -> Callable[..., None]:
        chosen: Callable[..., None] = self._chosen(
            "hstu_output", _dense_sizes(rows, columns, width)
        )
        return chosen


def _dense_sizes(rows: int, columns: int, width: int) -> tuple[tuple[str, int], ...]:
    return (
        ("rows", power_of_two(rows, least=16, most=65536)),
        ("columns", columns),
        ("width", width),
    )


class CudaStack:
    """Implements `HSTUStack` for tokens and blocks on a CUDA device.

    ``run`` launches on the current stream and returns at once; x, and what is in the blocks, is
    ready when that stream is. Projections, keys, values and activations are in ``dtype``, sums,
    norms and the residual in float32.
    """

    def __init__(
        self,
        stack: Stack,
        dtype: str = "float32",
        *,
        threads: int = 1,
        isa: str = "auto",
        device: str = "cuda",
        kernels: Sequence[str] = (),
        ops: Ops | None = None,
    ) -> None:
        """``kernels`` names implementations of the layers' parts, see `gr_kernels.choice`.

        ``threads`` and ``isa`` are of CPUs and change nothing. Raises `PlanError` without Triton.
        """
        del threads, isa
        if dtype not in DTYPES:
            raise PlanError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if find_spec("triton") is None:
            raise PlanError(
                "the op hstu_stack needs Triton on CUDA; pip install gr-kernels[triton]"
            )
        from gr_kernels.ops.hstu_stack import triton_kernels

        self._kernels = triton_kernels
        self._stack = stack
        self._dtype = DTYPES[dtype]
        self.device = torch.device(device)
        self._ops = ops or Ops(dtype, (stack.d_qk, stack.d_v), kernels)
        self._layers = [
            _Layer.of(weights, stack, self._dtype, self.device) for weights in stack.layers
        ]
        self._thresholds: Tensor | None = None
        time_bias = stack.layers[0].time_bias
        if time_bias is not None:
            limits = torch.from_numpy(thresholds(len(time_bias)))
            self._thresholds = limits.to(self.device)
        per_token = stack.num_heads * (stack.d_qk + stack.d_v) * self._dtype.itemsize
        self._layer_bytes = BLOCK_TOKENS * per_token
        self._graphs: list[_Graph] = []
        self.prepared = False
        """Whether graphs were recorded."""

    @property
    def name(self) -> str:
        return f"cuda-{str(self._dtype).removeprefix('torch.')}"

    @property
    def block_bytes(self) -> int:
        return self._layer_bytes * len(self._layers)

    def run(
        self, x_TD: Tensor, segments: Sequence[Segment], arrivals: Arrivals | None = None
    ) -> None:
        """See `HSTUStack.run`. ``arrivals`` are of blocks that are still being copied."""
        if not self._layers:
            raise ValueError("the stack is closed")
        sizes = sizes_of(segments, self._stack) if segments else Sizes(0, 0, 0, 0, 0)
        if x_TD.shape != (sizes.tokens, self._stack.d_model) or x_TD.dtype != torch.float32:
            raise ValueError(
                f"x is {x_TD.dtype} {tuple(x_TD.shape)}; the segments and the stack say float32 "
                f"{(sizes.tokens, self._stack.d_model)}"
            )
        if not sizes.tokens:
            return
        with device_of(x_TD):
            graph = next((g for g in self._graphs if g.sizes.hold(sizes)), None)
            if graph is not None:
                graph.run(x_TD, segments, arrivals)
            else:
                self._run(x_TD, segments, sizes, arrivals)

    def record(self, tokens: Sequence[int], segments: int, blocks: int, record: Record) -> None:
        """Records batches of up to so many ``tokens`` each, smallest first, for `run` to replay.

        They have up to so many ``segments``, each of up to so many ``blocks``. What is larger is
        run as always.
        """
        times = 0
        for most in sorted(tokens):
            if self._stack.layers[0].time_bias is not None:
                times = segments * blocks * BLOCK_TOKENS + most
            sizes = Sizes(most, segments, 0, blocks, times)
            self._graphs.append(_Graph(self, sizes, record))

    def close(self) -> None:
        self._layers = []
        self._graphs = []

    def _run(
        self, x_TD: Tensor, segments: Sequence[Segment], sizes: Sizes, arrivals: Arrivals | None
    ) -> None:
        held = self.held(sizes)
        on = self.brought(segments, sizes, held)
        most = max(segment.new + segment.candidates for segment in segments)
        has_cached = any(segment.cached for segment in segments)
        for number in range(len(self._layers)):
            if arrivals is not None:
                arrivals.wait(number)
            self.layer(number, x_TD, on, sizes, most, has_cached)

    def held(self, sizes: Sizes) -> Tensor:
        """Memory on the device for the arrays of a batch."""
        end = layout(sizes, self._stack)["end"][2]
        return torch.empty(end, dtype=torch.uint8, device=self.device)

    def brought(
        self, segments: Sequence[Segment], sizes: Sizes, target: Tensor
    ) -> Mapping[str, Tensor]:
        """The arrays of a batch in memory on the device, in one copy."""
        of = layout(sizes, self._stack)
        # Pinned memory is kept by torch, which uses it again when the copy is over.
        host = torch.empty(len(target), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        on_host = {name: tensor.numpy() for name, tensor in views(host, of).items()}
        fill(on_host, segments, sizes)
        target.copy_(host, non_blocking=True)
        return views(target, of)

    def layer(
        self,
        number: int,
        x_TD: Tensor,
        on: Mapping[str, Tensor],
        sizes: Sizes,
        most_queries: int,
        has_cached: bool,
    ) -> None:
        """One layer on x in place. Of the last one only the wanted rows, if these are not all."""
        stack, layer = self._stack, self._layers[number]
        is_partial = bool(sizes.rows) and number == len(self._layers) - 1
        f, k = stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk
        groups_T = on.get("group_T")
        if is_partial:
            row_R, end = on["row_R"], "_R"
            kv_TW = self._project(layer, x_TD, slice(0, f + k), None, groups_T)
            qu_RW = self._project(layer, x_TD, slice(f + k, None), row_R, groups_T)
        else:
            row_R, end = None, "_T"
            all_TW = self._project(layer, x_TD, slice(None), None, groups_T)
            kv_TW, qu_RW = all_TW[:, : f + k], all_TW[:, f + k :]
        v_TF, k_TF = torch.split(kv_TW, [f, k], dim=1)
        q_RF, u_RF = torch.split(qu_RW, [k, f], dim=1)
        heads = stack.num_heads
        q_RHK, k_THK, v_THV = (torch.unflatten(x, 1, (heads, -1)) for x in (q_RF, k_TF, v_TF))
        self._store(number, k_THK, v_THV, on)
        bias = self._bias(layer, on, end)
        a_RHV = self._ops.attention(most_queries, biased=bias is not None)(
            q_RHK,
            k_THK,
            v_THV,
            on["wanted_offsets"] if is_partial else on["offsets"],
            on["offsets"],
            on["low" + end],
            on["high" + end],
            on["own" + end],
            stack.alpha,
            stack.divisor,
            most_queries,
            CachedKeys(on["addresses_BM"], on["cached_B"], number * self._layer_bytes)
            if has_cached
            else None,
            bias,
        )
        self._ops.output(len(a_RHV), layer.output_weight.shape[1], stack.d_model)(
            x_TD,
            a_RHV,
            u_RF,
            layer.output_weight,
            layer.output_bias,
            layer.attention_norm_weight,
            layer.attention_norm_bias,
            groups_T,
            row_R,
            norm_eps=stack.norm_eps,
            head_norm=stack.head_norm,
            gate=stack.gate,
            # It reads U anyway, so that the projection need not.
            silu_u=stack.projection_silu == "u",
        )

    def _project(
        self,
        layer: _Layer,
        x_TD: Tensor,
        columns: slice,
        row_R: Tensor | None,
        groups_T: Tensor | None,
    ) -> Tensor:
        weight_WD = layer.vkqu_weight[columns]
        bias_W = None if layer.vkqu_bias is None else layer.vkqu_bias[columns]
        rows, (width, d_model) = len(x_TD if row_R is None else row_R), weight_WD.shape
        projected: Tensor = self._ops.projection(rows, width, d_model)(
            x_TD,
            weight_WD,
            bias_W,
            layer.input_norm_weight,
            layer.input_norm_bias,
            groups_T,
            row_R,
            norm_eps=self._stack.norm_eps,
            silu=(0, width if self._stack.projection_silu == "all" else 0),
        )
        return projected

    def _store(self, number: int, k_THK: Tensor, v_THV: Tensor, on: Mapping[str, Tensor]) -> None:
        tokens, heads, d_qk = k_THK.shape
        d_v = v_THV.shape[2]
        self._kernels.store_tokens[(-(-tokens // _STORED_AT_ONCE),)](
            k_THK,
            v_THV,
            on["block_T"],
            on["place_T"],
            tokens,
            number * self._layer_bytes,
            *k_THK.stride()[:2],
            *v_THV.stride()[:2],
            HEADS=heads,
            D_QK=d_qk,
            D_V=d_v,
            M=_STORED_AT_ONCE,
            C=power_of_two(heads * max(d_qk, d_v), most=256),
            num_warps=4,
        )

    def _bias(self, layer: _Layer, on: Mapping[str, Tensor], end: str) -> TableBias | None:
        if layer.position_bias is None and layer.time_bias is None:
            return None
        return TableBias(
            histories_B=on["history_B"],
            position=layer.position_bias,
            positions_T=on["position" + end],
            time=layer.time_bias,
            thresholds=self._thresholds,
            times=on.get("time_Z"),
            time_offsets_B=on.get("time_start_B"),
            next_times_T=on.get("next_time" + end),
        )


class _Graph:
    """Batches up to some sizes, replayed on memory that stays where it is."""

    def __init__(self, stack: CudaStack, sizes: Sizes, record: Record) -> None:
        self.sizes = sizes
        self._owner = stack
        self._x_TD = torch.zeros(
            sizes.tokens, stack._stack.d_model, dtype=torch.float32, device=stack.device
        )
        self._held = stack.held(sizes)
        self._held.zero_()  # a batch of no tokens
        on = views(self._held, layout(sizes, stack._stack))
        most = min(sizes.tokens, GRAPH_QUERIES)
        self._layers = [
            record(functools.partial(stack.layer, number, self._x_TD, on, sizes, most, True))
            for number in range(len(stack._layers))
        ]

    def run(self, x_TD: Tensor, segments: Sequence[Segment], arrivals: Arrivals | None) -> None:
        self._owner.brought(segments, self.sizes, self._held)
        tokens = len(x_TD)
        self._x_TD[:tokens].copy_(x_TD)
        # Rows of no segment would otherwise grow with each replay.
        self._x_TD[tokens:].zero_()
        for number, replay in enumerate(self._layers):
            if arrivals is not None:
                arrivals.wait(number)
            replay()
        x_TD.copy_(self._x_TD[:tokens])


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights on the device: products in the dtype of the stack, all else in float32."""

    input_norm_weight: Tensor | None
    input_norm_bias: Tensor | None
    vkqu_weight: Tensor
    """(W, D), rows in the order V, K, Q, U: what is kept, then what is used up."""
    vkqu_bias: Tensor | None
    attention_norm_weight: Tensor | None
    attention_norm_bias: Tensor | None
    output_weight: Tensor
    """(D, Y)."""
    output_bias: Tensor | None
    position_bias: Tensor | None
    time_bias: Tensor | None

    @staticmethod
    def of(weights: LayerWeights, stack: Stack, dtype: torch.dtype, device: torch.device) -> _Layer:
        f, k = stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk

        def reordered(parameter: Tensor) -> Tensor:
            u, v, q, k_ = torch.split(parameter, [f, f, k, k])
            return torch.cat([v, k_, q, u])

        def wide(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.to(device, torch.float32)

        return _Layer(
            input_norm_weight=wide(weights.input_norm_weight),
            input_norm_bias=wide(weights.input_norm_bias),
            vkqu_weight=reordered(weights.uvqk_weight).to(device, dtype),
            vkqu_bias=None
            if weights.uvqk_bias is None
            else reordered(weights.uvqk_bias).to(device, torch.float32),
            attention_norm_weight=wide(weights.attention_norm_weight),
            attention_norm_bias=wide(weights.attention_norm_bias),
            output_weight=weights.output_weight.to(device, dtype),
            output_bias=wide(weights.output_bias),
            position_bias=wide(weights.position_bias),
            time_bias=wide(weights.time_bias),
        )
