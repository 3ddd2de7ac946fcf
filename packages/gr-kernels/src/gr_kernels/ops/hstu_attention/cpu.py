"""The op `hstu_attention` in C++, see csrc/attention_op.h: float32 inside, for AVX2 and AVX-512.

Shapes as in `gr_kernels.ops.hstu_attention.interface`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.choice import wanted_isa
from gr_kernels.native import attention_isa, library
from gr_kernels.ops.hstu_attention.interface import sequences

DTYPES = (torch.float32, torch.bfloat16)


class _Call(ctypes.Structure):
    """gr_attention_call."""

    _fields_ = (
        ("isa", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("d_qk", ctypes.c_int32),
        ("d_v", ctypes.c_int32),
        ("sequences", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("divisor", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "query_offsets", "key_offsets")),
        *((name, ctypes.c_void_p) for name in ("low", "high", "own", "bias", "bias_offsets")),
        ("out", ctypes.c_void_p),
    )


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
    """See `gr_kernels.ops.hstu_attention.interface`. On as many threads as torch has."""
    if q_THK.dtype not in DTYPES:
        raise ValueError(f"q is {q_THK.dtype}; expected float32 or bfloat16")
    offsets = (query_offsets, key_offsets)
    # Checks the arguments, on which the code in C++ relies.
    found = list(sequences(q_THK, k_SHK, v_SHV, *offsets, low_T, high_T, own_T, bias))
    a_THV = q_THK.new_zeros(len(q_THK), *v_SHV.shape[1:])
    pairs = [
        (one.queries.stop - one.queries.start) * (one.keys.stop - one.keys.start) for one in found
    ]
    # Named, so that they live as long as the call.
    tensors = {
        "q": q_THK.contiguous(),
        "k": k_SHK.contiguous(),
        "v": v_SHV.contiguous(),
        "query_offsets": query_offsets.long().contiguous(),
        "key_offsets": key_offsets.long().contiguous(),
        "low": low_T.int().contiguous(),
        "high": high_T.int().contiguous(),
        "own": own_T.int().contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
        "bias_offsets": torch.from_numpy(np.cumsum([0, *pairs], dtype=np.int64)),
        "out": a_THV,
    }
    call = _Call(
        isa=_isa(wanted_isa()),
        is_bfloat16=q_THK.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        heads=q_THK.shape[1],
        d_qk=q_THK.shape[2],
        d_v=v_SHV.shape[2],
        sequences=len(found),
        alpha=alpha,
        divisor=divisor,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    status = library().gr_hstu_attention(ctypes.byref(call))
    if status == 2:
        raise MemoryError(f"hstu_attention: no memory for {len(k_SHK)} keys")
    assert status == 0
    return a_THV


def _isa(wanted: str) -> int:
    """The number of an instruction set in attention_op.h. Raises `PlanError` for one not here."""
    best = attention_isa()
    if wanted in ("auto", "torch"):
        return best
    family = [
        isa for isa, name in ((1, "avx2"), (2, "avx512"), (2, "amx")) if wanted.startswith(name)
    ]
    if not family or family[0] > best:
        raise PlanError(
            f"op hstu_attention: the instruction set asked for is {wanted!r}; expected auto, "
            f"torch, or one of this processor's: {', '.join(('avx2', 'avx512')[:best])}"
        )
    return family[0]
