"""The kernel that keeps K and V of new tokens. Imports Triton.

Shapes: T tokens, K and V columns per head, padded to powers of two.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)
"""Tokens of a block."""


@triton.jit
def store_tokens(
    k_ptr,
    v_ptr,
    block_ptr,
    place_ptr,
    layer_offset,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """K and V of one token and one head to its place in its block. Grid: (T, HEADS)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    address = tl.load(block_ptr + token)
    if address != 0:
        place = tl.load(place_ptr + token)
        layer_ptr = (address + layer_offset).to(tl.pointer_type(k_ptr.dtype.element_ty))
        k_column, v_column = tl.arange(0, K), tl.arange(0, V)
        k_row_ptr = k_ptr + token * k_token_stride + head * k_head_stride
        v_row_ptr = v_ptr + token * v_token_stride + head * v_head_stride
        k = tl.load(k_row_ptr + k_column, mask=k_column < D_QK)
        v = tl.load(v_row_ptr + v_column, mask=v_column < D_V)
        k_block_ptr = layer_ptr + (head * BLOCK + place) * D_QK
        v_block_ptr = layer_ptr + HEADS * BLOCK * D_QK + (head * BLOCK + place) * D_V
        tl.store(k_block_ptr + k_column, k, mask=k_column < D_QK)
        tl.store(v_block_ptr + v_column, v, mask=v_column < D_V)
