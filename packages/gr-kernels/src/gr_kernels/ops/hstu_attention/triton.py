"""Attention as `on_device` and the op `hstu_attention` say it, in Triton, for CUDA.

Nothing is copied to the host and nothing waits, so a call can be part of a CUDA graph; in exchange,
numbers out of range are not seen. Sums are in float32; products of float32 are of three products of
TF32 each, which is as good as float32 up to a few last bits. SiLU of bfloat16 and float16 is of the
GPU's approximate tanh, which is off by 2^-11 of itself at most (PTX ISA): no more than what float16
rounds away. Thresholds of a `TableBias` have to be those of buckets of log(seconds) / 0.301.

Shapes as in `gr_kernels.ops.hstu_attention.on_device`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.hstu_attention.interface import check_shapes
from gr_kernels.ops.hstu_attention.on_device import CachedKeys, TableBias
from gr_kernels.tuning import configuration, power_of_two

NAME = "hstu_cached_attention-triton"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LARGEST = 256
"""Columns of a head."""
MOST_QUERIES = 4096
"""From here on, more queries of a sequence change nothing about how it is launched."""
Configuration = Mapping[str, int]

# Launches of many queries, the default first: M, N, warps, stages and, for some, the registers of a
# thread, so that two programs share a processor and one's products hide the other's SiLU. By the
# generation of tensor cores, or float32, and the larger of a head's two sizes. Chosen by what ptxas
# says: no spilled registers in the loop without masks.
_MANY: Mapping[tuple[str, int], Sequence[tuple[int, ...]]] = {
    ("hopper", 64): (
        (128, 64, 8, 3, 128),
        (128, 64, 8, 2, 128),
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 3, 128),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
    ),
    ("hopper", 128): (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 2, 128),
        (128, 32, 8, 3, 128),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
    ),
    ("hopper", 256): (
        (128, 32, 8, 2),
        (128, 64, 8, 2),
        (64, 32, 8, 2),
        (64, 64, 8, 2),
        (32, 32, 4, 2),
    ),
    ("ampere", 64): (
        (128, 64, 8, 3),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (128, 32, 8, 3, 128),
        (128, 64, 4, 3),
        (64, 32, 4, 2),
    ),
    ("ampere", 128): (
        (128, 32, 8, 3),
        (64, 32, 4, 3),
        (128, 32, 8, 2),
        (64, 64, 4, 2),
        (32, 32, 4, 3),
    ),
    ("ampere", 256): ((64, 32, 8, 2), (32, 32, 4, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    ("float32", 64): ((64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2), (64, 64, 4, 2)),
    ("float32", 128): ((32, 32, 8, 2), (16, 32, 4, 2), (32, 32, 4, 2), (64, 32, 8, 2)),
    ("float32", 256): ((16, 32, 8, 2), (16, 16, 4, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
}
# N, warps and stages of few queries: at most 64.
_FEW: Mapping[tuple[str, int], Sequence[tuple[int, int, int]]] = {
    ("half", 64): ((64, 4, 3), (64, 4, 2), (32, 4, 4), (128, 4, 2)),
    ("half", 128): ((64, 4, 2), (32, 4, 3), (64, 4, 3), (64, 8, 2)),
    ("half", 256): ((32, 8, 2), (32, 4, 2), (64, 8, 2), (32, 8, 3)),
    ("float32", 64): ((32, 4, 2), (64, 4, 2), (32, 8, 2)),
    ("float32", 128): ((32, 8, 2), (32, 4, 2), (16, 4, 2)),
    ("float32", 256): ((32, 8, 2), (16, 8, 2), (16, 4, 2)),
}


def configurations(dtype: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Launches worth trying for these sizes, the default first; see `attend` for the sizes."""
    d_qk, d_v = sizes["d_qk"], sizes["d_v"]
    size = max(64, d_qk, d_v)
    capability, shared = _device()
    kind = "hopper" if capability >= 90 else "ampere"
    launches = _MANY[dtype if dtype == "float32" else kind, size]
    if sizes["queries"] <= 64:
        m = min(power_of_two(sizes["queries"], least=16), launches[0][0])
        launches = [(m, *few) for few in _FEW[dtype if dtype == "float32" else "half", size]]
    names = ("M", "N", "num_warps", "num_stages", "maxnreg")
    found = [dict(zip(names, launch, strict=False)) for launch in launches]
    itemsize = 4 if dtype == "float32" else 2

    def bytes_of(one: dict[str, int]) -> int:
        # Of Q, and of K and V of each stage; products of float32 are of copies.
        keys = one["num_stages"] * one["N"] * (d_qk + d_v)
        return (one["M"] * d_qk + keys) * itemsize * (5 if dtype == "float32" else 4) // 4

    fitting = [one for one in found if bytes_of(one) <= shared]
    return fitting or [{"M": 16, "N": 16, "num_warps": 4, "num_stages": 1}]


def attend(
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
    most_queries: int,
    cached: CachedKeys | None = None,
    bias: TableBias | Tensor | None = None,
    out_THV: Tensor | None = None,
) -> Tensor:
    """Implements `DeviceAttention`. Raises `ValueError` for what it does not compute, and
    `PlanError` where Triton is not installed.

    It is launched by `gr_kernels.tuning.configuration`, by the columns of Q and K and of V, padded
    to powers of two, and the power of two from ``most_queries`` on.
    """
    dtype = _check(q_THK, k_SHK, v_SHV)
    tokens, heads, d_qk = q_THK.shape
    d_v = v_SHV.shape[2]
    sequences = len(query_offsets) - 1
    if out_THV is None:
        out_THV = q_THK.new_empty(tokens, heads, d_v)
    elif out_THV.shape != (tokens, heads, d_v) or out_THV.dtype != q_THK.dtype:
        raise ValueError(
            f"out is {out_THV.dtype} {tuple(out_THV.shape)}; "
            f"expected {q_THK.dtype} {(tokens, heads, d_v)}"
        )
    for name, tensor in (("q", q_THK), ("k", k_SHK), ("v", v_SHV), ("out", out_THV)):
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(
                f"{name} has columns {tensor.stride(2)} numbers apart; expected contiguous ones"
            )
    if not out_THV.numel():
        return out_THV
    if not sequences:
        return out_THV.zero_()
    kernels = _kernels()
    pairs_start = None
    tables = bias if isinstance(bias, TableBias) else TableBias(query_offsets)
    pairs = bias if isinstance(bias, Tensor) else None
    if pairs is not None:
        keys_B = key_offsets.diff().long()
        if cached is not None:
            keys_B = keys_B + cached.counts_B
        pairs_B = query_offsets.diff() * keys_B
        pairs_start = pairs_B.cumsum(0) - pairs_B
    k, v = (power_of_two(d, least=16) for d in (d_qk, d_v))
    sizes = {"d_qk": k, "d_v": v, "queries": power_of_two(most_queries, most=MOST_QUERIES)}
    launch = dict(configuration(NAME, dtype, sizes, _default(dtype, **sizes)))
    if bias is not None:
        # A bias takes registers of its own.
        launch.pop("maxnreg", None)
    with device_of(q_THK):
        kernels.attend[(tokens // launch["M"] + sequences, heads)](
            q_THK,
            k_SHK,
            v_SHV,
            query_offsets,
            key_offsets,
            low_T,
            high_T,
            own_T,
            None if cached is None else cached.addresses_BM,
            None if cached is None else cached.counts_B,
            pairs,
            pairs_start,
            None if tables.position is None else tables.histories_B,
            tables.position,
            tables.positions_T,
            tables.time,
            tables.thresholds,
            tables.times,
            tables.time_offsets_B,
            tables.next_times_T,
            out_THV,
            tokens,
            sequences,
            *q_THK.stride()[:2],
            *k_SHK.stride()[:2],
            *v_SHV.stride()[:2],
            *out_THV.stride()[:2],
            0 if cached is None else cached.addresses_BM.stride(0),
            0 if cached is None else cached.layer_offset,
            float(alpha),
            1 / divisor,
            HEADS=heads,
            D_QK=d_qk,
            D_V=d_v,
            K=k,
            V=v,
            P=0 if tables.position is None else (len(tables.position) + 1) // 2,
            BUCKETS=0 if tables.time is None else len(tables.time),
            CACHED=cached is not None,
            K_ALIGNED=_aligned(k_SHK),
            V_ALIGNED=_aligned(v_SHV),
            TANH=q_THK.is_cuda and q_THK.dtype != torch.float32,
            **launch,
        )
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
    """The op, see `gr_kernels.ops.hstu_attention.interface`; numbers are not checked.

    Offsets and places may be on the CPU. Raises `ValueError` for what it does not compute.
    """
    _check(q_THK, k_SHK, v_SHV)
    tokens, sequences = len(q_THK), len(query_offsets) - 1
    if len(key_offsets) - 1 != sequences or sequences < 0:
        raise ValueError(
            f"query_offsets are of {sequences} sequences, key_offsets of "
            f"{len(key_offsets) - 1}; expected the same"
        )
    for name, places in (("low", low_T), ("high", high_T), ("own", own_T)):
        if places.shape != (tokens,) or places.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} is {places.dtype} {tuple(places.shape)}; expected int32 of shape "
                f"{(tokens,)}"
            )
    if bias is not None and bias.ndim != 1:
        raise ValueError(f"bias has the shape {tuple(bias.shape)}; expected one axis")
    # On a device, the longest is not known without waiting.
    most_queries = -(-tokens // max(sequences, 1))
    if sequences and query_offsets.device.type == "cpu":
        most_queries = int(query_offsets.diff().max())

    def here(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(q_THK.device, dtype, non_blocking=True).contiguous()

    q_THK, k_SHK, v_SHV = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THK, k_SHK, v_SHV))
    return attend(
        q_THK,
        k_SHK,
        v_SHV,
        here(query_offsets, torch.int64),
        here(key_offsets, torch.int64),
        here(low_T, torch.int32),
        here(high_T, torch.int32),
        here(own_T, torch.int32),
        alpha,
        divisor,
        most_queries,
        bias=None if bias is None else here(bias, torch.float32),
    )


def _check(q_THK: Tensor, k_SHK: Tensor, v_SHV: Tensor) -> str:
    """The dtype's name."""
    check_shapes(q_THK, k_SHK, v_SHV, None)
    if q_THK.dtype not in DTYPES:
        raise ValueError(
            f"q is {q_THK.dtype}; expected float32, bfloat16 or float16; "
            "hstu_attention-reference has no limit"
        )
    if max(q_THK.shape[2], v_SHV.shape[2]) > LARGEST:
        raise ValueError(
            f"heads have {q_THK.shape[2]} columns of Q and K and {v_SHV.shape[2]} of V; expected "
            f"at most {LARGEST}; hstu_attention-reference has no limit"
        )
    return DTYPES[q_THK.dtype]


def _aligned(rows: Tensor) -> int:
    """Bytes, at most 16, that all rows are aligned to, and those of blocks of such rows."""
    numbers = (rows.shape[2], rows.stride(0), rows.stride(1))
    return math.gcd(16, rows.data_ptr(), *(n * rows.element_size() for n in numbers))


@functools.cache
def _device() -> tuple[int, int]:
    """Of the current device: capability, and bytes of shared memory; without one, as of an H100."""
    if not torch.cuda.is_available():
        return 90, 227 * 1024
    properties: Any = torch.cuda.get_device_properties()
    return properties.major * 10 + properties.minor, properties.shared_memory_per_block_optin


@functools.cache
def _default(dtype: str, d_qk: int, d_v: int, queries: int) -> Configuration:
    return configurations(dtype, {"d_qk": d_qk, "d_v": d_v, "queries": queries})[0]


@functools.cache
def _kernels() -> ModuleType:
    if find_spec("triton") is None:
        raise PlanError("hstu_attention-triton needs Triton; pip install gr-kernels[triton]")
    from gr_kernels.ops.hstu_attention import triton_kernels

    return triton_kernels
