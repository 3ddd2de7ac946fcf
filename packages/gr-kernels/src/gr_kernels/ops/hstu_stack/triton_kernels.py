"""The kernel that keeps K and V of new tokens. Imports Triton.

Shapes: T tokens, M of them and C columns of all heads at a time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)
"""Tokens of a block."""


@triton.jit
def store_part(
    x_ptr,
    token_M,
    token_stride,
    head_stride,
    target_M,
    place_M,
    stored_M,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
):
    """K or V of M tokens to where each begins, a head after another, 32 tokens apart."""
    for first in range(0, HEADS * D, C):
        column_C = first + tl.arange(0, C)
        head_C, within_C = column_C // D, column_C % D
        mask = stored_M[:, None] & (column_C < HEADS * D)[None, :]
        of_MC = token_M[:, None] * token_stride + (head_C * head_stride + within_C)[None, :]
        to_MC = (head_C * (BLOCK * D) + within_C)[None, :] + place_M[:, None] * D
        x_MC = tl.load(x_ptr + of_MC, mask=mask)
        tl.store(target_M[:, None] + to_MC, x_MC, mask=mask)


@triton.jit
def store_tokens(
    k_ptr,
    v_ptr,
    block_ptr,
    place_ptr,
    tokens,
    layer_offset,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """K and V of M tokens to their places in their blocks; of none where the address is 0.

    Grid: (T / M,), rounded up.
    """
    token_M = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    address_M = tl.load(block_ptr + token_M, mask=token_M < tokens, other=0)
    if tl.max(address_M) > 0:
        stored_M = address_M > 0
        place_M = tl.load(place_ptr + token_M, mask=stored_M, other=0)
        k_target_M = (address_M + layer_offset).to(tl.pointer_type(k_ptr.dtype.element_ty))
        k_target_M = tl.multiple_of(k_target_M, 16)
        v_target_M = k_target_M + HEADS * BLOCK * D_QK
        store_part(
            k_ptr,
            token_M,
            k_token_stride,
            k_head_stride,
            k_target_M,
            place_M,
            stored_M,
            HEADS,
            D_QK,
            C,
        )
        store_part(
            v_ptr,
            token_M,
            v_token_stride,
            v_head_stride,
            v_target_M,
            place_M,
            stored_M,
            HEADS,
            D_V,
            C,
        )
