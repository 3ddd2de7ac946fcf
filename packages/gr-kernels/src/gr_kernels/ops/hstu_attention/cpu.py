"""The op `hstu_attention` in C++, on the attention kernels of the stack; see csrc/gr_kernels.h.

bfloat16 is computed in bfloat16 products where the processor has them, else in float32.

Shapes as in `gr_kernels.ops.hstu_attention.interface`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.choice import plain_isa
from gr_kernels.ops.hstu_attention.interface import sequences

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NO_MEMORY = 2


class _Call(ctypes.Structure):
    """gr_attention_call."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
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
    dtype = DTYPES[q_THK.dtype]
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
        dtype=native.DTYPES[dtype],
        threads=torch.get_num_threads(),
        heads=q_THK.shape[1],
        d_qk=q_THK.shape[2],
        d_v=v_SHV.shape[2],
        sequences=len(found),
        alpha=alpha,
        divisor=divisor,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    library = native.library()
    status = library.gr_hstu_attention(
        ctypes.byref(call), plain_isa("hstu_attention", dtype).encode()
    )
    if status == _NO_MEMORY:
        raise MemoryError(f"hstu_attention: no memory for {len(k_SHK)} keys")
    assert status == 0
    return a_THV
