"""The op `hstu_paged_attention` in C++, in place on pages packed for its products.

A page holds what a block of the op `hstu_stack` holds of one layer; see csrc/gr_kernels.h. bfloat16
is computed, and stored, in float32 where the processor has no bfloat16 products.

Shapes as in `gr_kernels.ops.hstu_paged_attention.interface`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels import native
from gr_kernels.choice import plain_isa
from gr_kernels.ops.hstu_paged_attention.interface import check_call, check_sizes

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NO_MEMORY = 2


class _Config(ctypes.Structure):
    """gr_paged_config."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("d_qk", ctypes.c_int32),
        ("d_v", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("divisor", ctypes.c_float),
    )


_Strides = ctypes.c_int64 * 2


class _Call(ctypes.Structure):
    """gr_paged_call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "page_count", "max_pages")),
        *((name, ctypes.c_int64) for name in ("page_stride", "table_stride", "pairs")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, _Strides) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, ctypes.c_void_p) for name in ("pages", "block_table", "slots", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("key_counts", "low", "high", "bias", "out")),
    )


class CpuPagedAttention:
    """Implements `PagedAttention`: bit for bit the same for a token, whatever it is computed with.

    Several in one process with as many threads share them and their memory, so the layers of a
    model cost no more than one.
    """

    def __init__(
        self,
        heads: int,
        d_qk: int,
        d_v: int,
        dtype: torch.dtype,
        alpha: float,
        divisor: float,
        *,
        threads: int = 0,
    ) -> None:
        """Raises `PlanError` for an instruction set asked for that this processor lacks."""
        self._handle = 0
        check_sizes(heads, d_qk, d_v, divisor, threads)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; expected float32 or bfloat16")
        self._sizes = (heads, d_qk, d_v, dtype)
        self._library = _library()
        config = _Config(
            dtype=native.DTYPES[DTYPES[dtype]],
            heads=heads,
            d_qk=d_qk,
            d_v=d_v,
            alpha=alpha,
            divisor=divisor,
        )
        isa = plain_isa("hstu_paged_attention", DTYPES[dtype])
        handle = self._library.gr_paged_create(
            ctypes.byref(config), isa.encode(), threads or torch.get_num_threads()
        )
        if not handle:
            raise PlanError(
                f"the op hstu_paged_attention cannot be made: "
                f"{self._library.gr_last_error().decode()}"
            )
        self._handle = int(handle)
        self.page_bytes = int(self._library.gr_paged_page_bytes(self._handle))

    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        pages: Tensor,
        block_table: Tensor,
        slots_T: Tensor,
        query_offsets: Tensor,
        key_counts: Tensor,
        low_T: Tensor,
        high_T: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """See `PagedAttention.__call__`."""
        check_call(
            *self._sizes,
            self.page_bytes,
            q_THK,
            k_THK,
            v_THV,
            pages,
            block_table,
            slots_T,
            query_offsets,
            key_counts,
            low_T,
            high_T,
            bias,
        )
        if q_THK.device.type != "cpu":
            raise ValueError(f"q is on {q_THK.device}; expected the CPU")
        heads, _, d_v, dtype = self._sizes
        a_THV = torch.empty(len(q_THK), heads, d_v, dtype=dtype)
        # Named, so that they live as long as the call.
        slots_T, key_counts = slots_T.contiguous(), key_counts.contiguous()
        low_T, high_T = low_T.contiguous(), high_T.contiguous()
        query_offsets = query_offsets.long().contiguous()
        if block_table.stride(1) != 1:
            block_table = block_table.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        call = _Call(
            len(q_THK),
            len(key_counts),
            len(pages),
            block_table.shape[1],
            pages.stride(0),
            block_table.stride(0),
            0 if bias is None else len(bias),
            q_THK.data_ptr(),
            k_THK.data_ptr(),
            v_THV.data_ptr(),
            q_THK.stride()[:2],
            k_THK.stride()[:2],
            v_THV.stride()[:2],
            pages.data_ptr(),
            block_table.data_ptr(),
            slots_T.data_ptr(),
            query_offsets.data_ptr(),
            key_counts.data_ptr(),
            low_T.data_ptr(),
            high_T.data_ptr(),
            None if bias is None else bias.data_ptr(),
            a_THV.data_ptr(),
        )
        status = self._library.gr_paged_run(self._handle, ctypes.byref(call))
        if status == _NO_MEMORY:
            raise MemoryError(f"hstu_paged_attention: no memory for {len(q_THK)} tokens")
        if status:
            raise ValueError(self._library.gr_last_error().decode())
        return a_THV

    def __del__(self) -> None:
        handle, self._handle = self._handle, 0
        if handle:
            self._library.gr_paged_destroy(handle)


@functools.cache
def _library() -> ctypes.CDLL:
    found = native.library()
    found.gr_last_error.restype = ctypes.c_char_p
    found.gr_paged_create.restype = ctypes.c_void_p
    found.gr_paged_create.argtypes = (ctypes.POINTER(_Config), ctypes.c_char_p, ctypes.c_int32)
    found.gr_paged_destroy.restype = None
    found.gr_paged_destroy.argtypes = (ctypes.c_void_p,)
    found.gr_paged_page_bytes.restype = ctypes.c_int64
    found.gr_paged_page_bytes.argtypes = (ctypes.c_void_p,)
    found.gr_paged_run.restype = ctypes.c_int32
    found.gr_paged_run.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Call))
    return found
