"""The op `hstu_stack` in C++, one call a batch; see csrc/gr_kernels.h for the interface.

Shapes: T tokens of all segments, D model width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.contracts import Arrivals
from gr_core.errors import PlanError
from gr_core.stack import Stack
from gr_kernels.native import DTYPES, instruction_sets, library
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Segment
from gr_kernels.ops.hstu_stack.time_buckets import thresholds

_SILU = ("none", "u", "all")
_GATES = ("u*norm(a)", "u,norm(a),u*norm(a)", "u,a,u*norm(a)", "norm(a*u)")


class _Config(ctypes.Structure):
    _fields_ = (
        ("d_model", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("d_qk", ctypes.c_int32),
        ("d_v", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("silu", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("head_norm", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("divisor", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("positions", ctypes.c_int32),
        ("time_buckets", ctypes.c_int32),
        ("time_thresholds", ctypes.c_void_p),
    )


_WEIGHTS = (
    "input_norm_weight",
    "input_norm_bias",
    "uvqk_weight",
    "uvqk_bias",
    "attention_norm_weight",
    "attention_norm_bias",
    "output_weight",
    "output_bias",
    "position_bias",
    "time_bias",
)


class _Weights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _WEIGHTS)


_SEGMENT = np.dtype(
    [(name, np.uintp) for name in ("blocks", "low", "high", "groups", "times", "next_times")]
    + [(name, np.int32) for name in ("cached", "new", "candidates", "rows")],
    align=True,
)
"""A gr_segment, as rows of an array."""


class CpuStack:
    """Implements `HSTUStack`: bit for bit the same for a token, whatever it is computed with.

    Projections, keys, values and activations are in ``dtype``, sums, norms and the residual in
    float32. ``threads`` workers, the caller among them, share each layer.
    """

    def __init__(
        self, stack: Stack, dtype: str = "float32", *, threads: int = 1, isa: str = "auto"
    ) -> None:
        """Raises `PlanError` for a dtype or an instruction set that this processor lacks."""
        self._handle = 0
        sets = instruction_sets(dtype)
        if not sets or isa not in ("auto", *sets):
            raise PlanError(
                f"the kernels in C++ for {dtype} on the instruction set {isa!r} are not to be had; "
                f"this processor has: {', '.join(sets) or 'none'}"
            )
        self._library = _library()
        self._stack = stack
        self._has_times = stack.layers[0].time_bias is not None
        self._handle = _create(stack, dtype, sets[0] if isa == "auto" else isa, threads)
        self._name = f"cpu-{self._library.gr_stack_instruction_set(self._handle).decode()}"
        self._block_bytes = int(self._library.gr_stack_block_bytes(self._handle))

    @property
    def name(self) -> str:
        return self._name

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    @property
    def workspace_bytes(self) -> int:
        """Memory for tokens in flight, at its largest so far."""
        return int(self._library.gr_stack_workspace_bytes(self._handle))

    def run(
        self, x_TD: Tensor, segments: Sequence[Segment], arrivals: Arrivals | None = None
    ) -> None:
        """See `HSTUStack.run`. Raises ValueError for what does not fit together."""
        assert arrivals is None, "blocks on the CPU are always there"
        if not self._handle:
            raise ValueError("the stack is closed")
        if (
            x_TD.dtype != torch.float32
            or x_TD.dim() != 2
            or x_TD.shape[1] != self._stack.d_model
            or not x_TD.is_contiguous()
            or x_TD.device.type != "cpu"
        ):
            raise ValueError(
                f"x is a {x_TD.dtype} tensor {tuple(x_TD.shape)} on {x_TD.device}; expected a "
                f"contiguous float32 one (tokens, {self._stack.d_model}) on the CPU"
            )
        rows = np.zeros(len(segments), _SEGMENT)
        kept: list[npt.NDArray[Any]] = []
        for row, segment in zip(rows, segments, strict=True):
            self._fill(row, segment, kept)
        status = self._library.gr_stack_run(
            self._handle, x_TD.data_ptr(), len(x_TD), rows.ctypes.data, len(rows)
        )
        if status:
            raise ValueError(self._library.gr_last_error().decode())

    def _fill(self, row: Any, segment: Segment, kept: list[npt.NDArray[Any]]) -> None:
        """One row of the C call; ``kept`` holds the arrays that it points to."""
        keys, tokens = segment.cached + segment.new, segment.new + segment.candidates

        def address(
            name: str, array: npt.NDArray[Any] | None, dtype: type[np.generic], length: int
        ) -> int:
            if array is None or len(array) < length:
                found = "missing" if array is None else f"{len(array)} long"
                raise ValueError(f"segment.{name} is {found}; expected {length} numbers")
            array = np.ascontiguousarray(array, dtype)
            kept.append(array)
            return int(array.__array_interface__["data"][0])

        row["blocks"] = address("blocks", segment.blocks, np.uintp, -(-keys // BLOCK_TOKENS))
        row["low"] = address("low", segment.low, np.int32, tokens)
        row["high"] = address("high", segment.high, np.int32, tokens)
        if self._stack.groups > 1:
            row["groups"] = address("groups", segment.groups, np.uint8, tokens)
        if self._has_times:
            count = keys + segment.candidates
            row["times"] = address("times", segment.times, np.int64, count)
            row["next_times"] = address("next_times", segment.next_times, np.int64, tokens)
        row["cached"], row["new"] = segment.cached, segment.new
        row["candidates"], row["rows"] = segment.candidates, int(segment.rows)

    def close(self) -> None:
        handle, self._handle = self._handle, 0
        if handle:
            self._library.gr_stack_destroy(handle)

    def __del__(self) -> None:
        self.close()


def _create(stack: Stack, dtype: str, isa: str, threads: int) -> int:
    first = stack.layers[0]
    limits = thresholds(0 if first.time_bias is None else len(first.time_bias))
    config = _Config(
        d_model=stack.d_model,
        num_heads=stack.num_heads,
        d_qk=stack.d_qk,
        d_v=stack.d_v,
        num_layers=len(stack.layers),
        dtype=DTYPES[dtype],
        silu=_SILU.index(stack.projection_silu),
        gate=_GATES.index(stack.gate),
        head_norm=stack.head_norm,
        groups=stack.groups,
        alpha=stack.alpha,
        divisor=stack.divisor,
        norm_eps=stack.norm_eps,
        positions=0 if first.position_bias is None else (len(first.position_bias) + 1) // 2,
        time_buckets=0 if first.time_bias is None else len(first.time_bias),
        time_thresholds=limits.ctypes.data,
    )
    layers = (_Weights * len(stack.layers))()
    for layer, weights in zip(layers, stack.layers, strict=True):
        for name in _WEIGHTS:
            tensor = getattr(weights, name)
            if tensor is not None:
                assert tensor.dtype == torch.float32, name
                assert tensor.is_contiguous(), name
                setattr(layer, name, tensor.data_ptr())
    handle = _library().gr_stack_create(ctypes.byref(config), layers, isa.encode(), threads)
    if not handle:
        raise PlanError(f"the stack cannot be made: {_library().gr_last_error().decode()}")
    return int(handle)


@functools.cache
def _library() -> ctypes.CDLL:
    found = library()
    found.gr_last_error.restype = ctypes.c_char_p
    found.gr_stack_create.restype = ctypes.c_void_p
    found.gr_stack_create.argtypes = (
        ctypes.POINTER(_Config),
        ctypes.POINTER(_Weights),
        ctypes.c_char_p,
        ctypes.c_int32,
    )
    found.gr_stack_destroy.restype = None
    found.gr_stack_destroy.argtypes = (ctypes.c_void_p,)
    found.gr_stack_instruction_set.restype = ctypes.c_char_p
    found.gr_stack_instruction_set.argtypes = (ctypes.c_void_p,)
    for name in ("gr_stack_block_bytes", "gr_stack_workspace_bytes"):
        getattr(found, name).restype = ctypes.c_int64
        getattr(found, name).argtypes = (ctypes.c_void_p,)
    found.gr_stack_run.restype = ctypes.c_int32
    found.gr_stack_run.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int32,
    )
    return found
