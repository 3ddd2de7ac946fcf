"""The op `hstu_attention` in CUDA C++ with CUTLASS, see `gr_kernels.cuda.library`.

Computes in bfloat16 and float16, on heads of 64, 128 or 256 columns, K's as V's, without biases.
Everything else is refused by a `ValueError` before anything is launched, so that another
implementation can take it. Sums are in float32.

Shapes as in `gr_kernels.ops.hstu_attention.interface` and `.on_device`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.cuda import library
from gr_kernels.ops.hstu_attention.on_device import CachedKeys, TableBias

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
"""Numbers of gr_cuda.h."""
COLUMNS = (64, 128, 256)
PIECE = 16
"""Bytes of which q, k and v are loaded at once."""
ROWS = 128
"""Of queries in a block of the grid; fewer in some kernels."""
LEAST_KEYS = 512
"""Fewer keys are not worth a block of their own."""
MOST_SPLITS = 8
PAGE = 32
"""Tokens of a block of cached keys."""


def attend(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    alpha: float,
    divisor: float,
    most_queries: int,
    cached: CachedKeys | None = None,
    bias: TableBias | Tensor | None = None,
    out_THV: Tensor | None = None,
) -> Tensor:
    """Implements `DeviceAttention`. Raises `ValueError` for what it has no kernel for."""
    if not q_THK.is_cuda:
        raise ValueError(f"q is on {q_THK.device}; expected a CUDA device")
    return attend_with(
        library.library_of(q_THK.device.index),
        q_THK,
        k_THK,
        v_THV,
        query_offsets,
        key_offsets,
        low_T,
        high_T,
        own_T,
        alpha,
        divisor,
        most_queries,
        cached,
        bias,
        out_THV,
    )


def attend_with(
    found: library.Library,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    alpha: float,
    divisor: float,
    most_queries: int,
    cached: CachedKeys | None = None,
    bias: TableBias | Tensor | None = None,
    out_THV: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """As `attend`, with a library of one's choice, wherever that computes.

    ``splits`` is how many blocks of the grid share the keys of a row, None as many as pay.
    """
    if bias is not None:
        raise ValueError("bias is given; hstu_attention-cutlass has none")
    _check(q_THK, k_THK, v_THV)
    if out_THV is None:
        out_THV = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
    elif out_THV.shape != q_THK.shape or out_THV.dtype != q_THK.dtype:
        raise ValueError(
            f"out is {out_THV.dtype} {tuple(out_THV.shape)}; expected {q_THK.dtype} "
            f"{tuple(q_THK.shape)}"
        )
    elif not _is_aligned(out_THV, 4):
        raise ValueError("out must have contiguous columns, and rows at multiples of 4 bytes")
    places = {"low": low_T, "high": high_T, "own": own_T}
    for name, tensor in places.items():
        if tensor.dtype != torch.int32 or not tensor.is_contiguous() or len(tensor) != len(q_THK):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected contiguous int32 of "
                f"shape {(len(q_THK),)}"
            )
    offsets = {"query_offsets": query_offsets, "key_offsets": key_offsets}
    for name, tensor in offsets.items():
        if tensor.dtype not in (torch.int32, torch.int64) or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype}; expected contiguous int32 or int64")
    if query_offsets.dtype != key_offsets.dtype or len(query_offsets) != len(key_offsets):
        raise ValueError(
            f"query_offsets are {query_offsets.dtype} {tuple(query_offsets.shape)}, key_offsets "
            f"{key_offsets.dtype} {tuple(key_offsets.shape)}; expected the same"
        )
    call = library.Call(
        dtype=DTYPES[q_THK.dtype],
        device=q_THK.device.index or 0,
        heads=q_THK.shape[1],
        columns=q_THK.shape[2],
        sequences=len(query_offsets) - 1,
        offset_bytes=query_offsets.element_size(),
        tokens=len(q_THK),
        keys=len(k_THK),
        alpha=alpha,
        scale=1 / divisor,
        **{name: tensor.data_ptr() for name, tensor in (places | offsets).items()},
    )
    for name, tensor in (("q", q_THK), ("k", k_THK), ("v", v_THV), ("out", out_THV)):
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_token_stride", tensor.stride(0))
        setattr(call, f"{name}_head_stride", tensor.stride(1))
    if cached is not None:
        _add_cached(call, cached)
    call.splits = _splits(q_THK, k_THK, call.sequences, cached) if splits is None else splits
    if call.splits > 1:
        workspace = q_THK.new_empty(call.splits * q_THK.numel(), dtype=torch.float32)
        call.workspace = workspace.data_ptr()
    found.hstu_attention(call, _stream(q_THK))
    return out_THV


def hstu_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    own_T: Tensor,
    alpha: float,
    divisor: float,
    bias: Tensor | None = None,
) -> Tensor:
    """See `gr_kernels.ops.hstu_attention.interface`. What cannot be loaded as it lies is copied."""
    q_THK, k_SHK, v_SHV = (x if _is_aligned(x, PIECE) else x.clone() for x in (q_THK, k_SHK, v_SHV))
    query_offsets, key_offsets = (x.long().contiguous() for x in (query_offsets, key_offsets))
    low_T, high_T, own_T = (x.int().contiguous() for x in (low_T, high_T, own_T))
    return attend(
        q_THK,
        k_SHK,
        v_SHV,
        query_offsets,
        key_offsets,
        low_T,
        high_T,
        own_T,
        alpha,
        divisor,
        len(q_THK),
        bias=bias,
    )


def _splits(q_THK: Tensor, k_SHK: Tensor, sequences: int, cached: CachedKeys | None) -> int:
    """As many as give each multiprocessor a block, when rows are few and keys may be many.

    Lengths are on the device; so a sequence is taken to have all keys that it could have.
    """
    if not q_THK.is_cuda:
        return 1
    grid = (len(q_THK) // ROWS + sequences) * q_THK.shape[1]
    keys = len(k_SHK) + (0 if cached is None else cached.addresses_BM.shape[1] * PAGE)
    there = torch.cuda.get_device_properties(q_THK.device).multi_processor_count
    return max(1, min(there // max(1, grid), keys // LEAST_KEYS, MOST_SPLITS))


def _check(q_THK: Tensor, k_SHK: Tensor, v_SHV: Tensor) -> None:
    if not q_THK.ndim == k_SHK.ndim == v_SHV.ndim == 3:
        raise ValueError("q, k and v must have three axes: tokens, heads, columns")
    if not q_THK.dtype == k_SHK.dtype == v_SHV.dtype or q_THK.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v are {q_THK.dtype}, {k_SHK.dtype} and {v_SHV.dtype}; expected all "
            "bfloat16 or all float16"
        )
    if v_SHV.shape != k_SHK.shape or q_THK.shape[1:] != k_SHK.shape[1:]:
        raise ValueError(
            f"q is {tuple(q_THK.shape)}, k {tuple(k_SHK.shape)} and v {tuple(v_SHV.shape)}; "
            "expected k as v, and q but for the tokens"
        )
    if q_THK.shape[2] not in COLUMNS:
        raise ValueError(
            f"heads have {q_THK.shape[2]} columns; expected {', '.join(map(str, COLUMNS))}"
        )
    for name, tensor in (("q", q_THK), ("k", k_SHK), ("v", v_SHV)):
        if not _is_aligned(tensor, PIECE):
            raise ValueError(
                f"{name} must have contiguous columns, and rows at multiples of {PIECE} bytes"
            )


def _is_aligned(x_THK: Tensor, unit: int) -> bool:
    """Whether each token and head has its columns in a row, at a multiple of ``unit`` bytes."""
    size = x_THK.element_size()
    steps = [x_THK.stride(axis) * size % unit == 0 for axis in (0, 1) if x_THK.shape[axis] > 1]
    return x_THK.data_ptr() % unit == 0 and x_THK.stride(2) == 1 and all(steps)


def _add_cached(call: library.Call, cached: CachedKeys) -> None:
    addresses_BM, counts_B = cached.addresses_BM, cached.counts_B
    sequences = call.sequences
    if (
        addresses_BM.dtype != torch.int64
        or addresses_BM.ndim != 2
        or len(addresses_BM) != sequences
        or (addresses_BM.shape[1] > 1 and addresses_BM.stride(1) != 1)
    ):
        raise ValueError(
            f"addresses are {addresses_BM.dtype} {tuple(addresses_BM.shape)}; expected int64 of "
            f"{sequences} contiguous rows"
        )
    if (
        counts_B.dtype != torch.int32
        or counts_B.shape != (sequences,)
        or not counts_B.is_contiguous()
    ):
        raise ValueError(
            f"counts are {counts_B.dtype} {tuple(counts_B.shape)}; expected contiguous int32 of "
            f"shape {(sequences,)}"
        )
    if cached.layer_offset % 64:
        raise ValueError(f"layer_offset is {cached.layer_offset}; expected a multiple of 64")
    if addresses_BM.numel():  # else there are no blocks
        call.addresses = addresses_BM.data_ptr()
        call.counts = counts_B.data_ptr()
        call.addresses_stride = addresses_BM.stride(0)
        call.layer_offset = cached.layer_offset


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
