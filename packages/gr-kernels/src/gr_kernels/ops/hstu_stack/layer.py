"""One layer over jagged tokens as ``torch.ops.gr.hstu_layer``, so that export and compile see it.

Shapes: T tokens of all sequences, B sequences, D model width, G groups, P positions, F = H·V with H
heads and V columns of U and V per head, K columns of Q and K per head.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields, replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gr_core.stack import Gate, LayerWeights, Stack
from gr_kernels.choice import wanted_isa
from gr_kernels.ops.hstu_stack.choice import make_stack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, HSTUStack, Rows, Segment


@dataclass(slots=True)
class _Packed:
    """A layer with its weights converted, and memory for K and V."""

    made_of: tuple[object, ...]
    runner: HSTUStack
    memory: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def blocks(self, count: int) -> npt.NDArray[np.uintp]:
        """Addresses of so many blocks."""
        size = -(-self.runner.block_bytes // 64) * 64
        if len(self.memory) < count * size + 64:
            self.memory = np.empty(count * size + 64, np.uint8)
        first = -(-self.memory.ctypes.data // 64) * 64
        return (first + np.arange(count) * size).astype(np.uintp)


# By the tensor uvqk_weight, and no longer than it.
_packed = WeakTensorKeyDictionary()
_lock = threading.Lock()
_SILU = ("none", "u", "all")


@torch.library.custom_op("gr::hstu_layer", mutates_args=())
def hstu_layer(
    x_TD: Tensor,
    offsets: Tensor,
    histories_B: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    uvqk_weight: Tensor,
    output_weight: Tensor,
    uvqk_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    input_norm_weight: Tensor | None = None,
    input_norm_bias: Tensor | None = None,
    attention_norm_weight: Tensor | None = None,
    attention_norm_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    groups_T: Tensor | None = None,
    times_T: Tensor | None = None,
    next_times_T: Tensor | None = None,
    *,
    num_heads: int,
    d_qk: int,
    d_v: int,
    alpha: float,
    divisor: float,
    norm_eps: float = 1e-6,
    projection_silu: str = "u",
    gate: str = "u,a,u*norm(a)",
    head_norm: bool = False,
    dtype: str = "float32",
) -> Tensor:
    """The layer's output (T, D), for float32 ``x_TD`` on the CPU.

    The rows of sequence b are ``offsets[b]`` to ``offsets[b + 1] - 1``: ``histories[b]`` tokens of
    the history, then candidates. Token i of a sequence sees the keys ``low`` to ``high - 1`` of its
    history, and itself. Weights and settings are those of `gr_core.stack.LayerWeights` and `Stack`,
    ``dtype`` is the kernels' precision. Weights are converted at the first call with them, and anew
    when they were changed.
    """
    if gate not in get_args(Gate) or projection_silu not in _SILU:
        raise ValueError(
            f"gate is {gate!r} and projection_silu {projection_silu!r}; expected one of "
            f"{get_args(Gate)} and one of {_SILU}"
        )
    weights = LayerWeights(
        input_norm_weight=input_norm_weight,
        input_norm_bias=input_norm_bias,
        uvqk_weight=uvqk_weight,
        uvqk_bias=uvqk_bias,
        attention_norm_weight=attention_norm_weight,
        attention_norm_bias=attention_norm_bias,
        output_weight=output_weight,
        output_bias=output_bias,
        position_bias=position_bias,
        time_bias=time_bias,
    )
    with_groups = (w for w in (input_norm_weight, attention_norm_weight) if w is not None)
    stack = Stack(
        d_model=x_TD.shape[1],
        num_heads=num_heads,
        d_qk=d_qk,
        d_v=d_v,
        alpha=alpha,
        divisor=divisor,
        norm_eps=norm_eps,
        projection_silu=projection_silu,  # type: ignore[arg-type]
        gate=gate,  # type: ignore[arg-type]
        head_norm=head_norm,
        groups=next((len(w) for w in with_groups), 1),
        layers=(weights,),
    )
    y_TD = x_TD.clone()
    packed = _pack(stack, dtype)
    with packed.lock:
        segments = _segments(
            packed, len(x_TD), offsets, histories_B, low_T, high_T, groups_T, times_T, next_times_T
        )
        packed.runner.run(y_TD, segments)
    return y_TD


@hstu_layer.register_fake
def _(x_TD: Tensor, *arguments: object, **settings: object) -> Tensor:
    return torch.empty_like(x_TD)


def _pack(stack: Stack, dtype: str) -> _Packed:
    """The converted weights of a stack of one layer, from last time if nothing has changed."""
    (weights,) = stack.layers
    tensors = {f.name: getattr(weights, f.name) for f in fields(LayerWeights)}
    states = tuple(
        None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version)
        for t in tensors.values()
    )
    threads, isa = torch.get_num_threads(), wanted_isa()
    made_of = (replace(stack, layers=()), states, dtype, threads, isa)
    with _lock:
        key = weights.uvqk_weight
        packed: _Packed | None = _packed[key] if key in _packed else None  # noqa: SIM401
        if packed is None or packed.made_of != made_of:
            # Detached, or what is kept would keep its own key alive.
            detached = {name: None if t is None else t.detach() for name, t in tensors.items()}
            layers = (LayerWeights(**detached),)
            runner = make_stack(replace(stack, layers=layers), dtype, threads=threads)
            packed = _packed[key] = _Packed(made_of, runner)
    return packed


def _segments(
    packed: _Packed,
    rows: int,
    offsets: Tensor,
    histories_B: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    groups_T: Tensor | None,
    times_T: Tensor | None,
    next_times_T: Tensor | None,
) -> list[Segment]:
    """Whole sequences, with nothing cached. Raises `ValueError` where they do not fit the rows."""
    ends, histories = offsets.numpy(), histories_B.numpy()
    lengths = np.diff(ends)
    if len(ends) != len(histories) + 1 or ends[0] != 0 or ends[-1] != rows:
        raise ValueError(
            f"offsets must go from 0 to {rows}, the tokens, in {len(histories)} sequences"
        )
    if (histories < 0).any() or (histories > lengths).any():
        raise ValueError("histories must be from 0 to the lengths of their sequences")
    low, high = (places.numpy().astype(np.int32) for places in (low_T, high_T))
    keys = np.repeat(histories, lengths)
    if low.shape != (rows,) or high.shape != (rows,) or (low < 0).any() or (high > keys).any():
        raise ValueError(f"low and high must be {rows} places from 0 to their histories' ends")
    groups, times, next_times = (
        None if given is None else given.numpy() for given in (groups_T, times_T, next_times_T)
    )
    counts = -(-histories // BLOCK_TOKENS)
    blocks = packed.blocks(int(counts.sum()))
    blocks_of = np.split(blocks, np.cumsum(counts)[:-1]) if len(counts) else []
    segments = []
    for b, own_blocks in enumerate(blocks_of):
        own = slice(int(ends[b]), int(ends[b + 1]))
        segments.append(
            Segment(
                blocks=own_blocks,
                cached=0,
                new=int(histories[b]),
                candidates=int(lengths[b] - histories[b]),
                low=low[own],
                high=high[own],
                groups=None if groups is None else groups[own].astype(np.uint8),
                times=None if times is None else times[own],
                next_times=None if next_times is None else next_times[own],
                rows=Rows.ALL,
            )
        )
    return segments
