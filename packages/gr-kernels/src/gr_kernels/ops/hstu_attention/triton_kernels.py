"""The kernel of `triton`. Imports Triton.

Shapes: T queries, B sequences, M rows of queries of a program, N keys of a step, K and V columns
per head, padded to powers of two, S blocks of a row of addresses.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)
"""Tokens of a block of keys."""
LARGEST_INT = tl.constexpr(2147483647)
LOG2_E = tl.constexpr(1.4426950408889634)
BUCKETS_PER_OCTAVE = tl.constexpr(0.6931471805599453 / 0.301)
"""Buckets of a table by time are of log(seconds) / 0.301."""
BUCKET_SLACK = tl.constexpr(1e-3)
"""More than a bucket, as a fraction in float32, can be off; less than two buckets are apart."""


@triton.jit
def silu(x, TANH: tl.constexpr):
    """x·sigmoid(x); with TANH of one special function instead of two, 2^-11 off at most."""
    if TANH:
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        product = half * tanh + half
    else:
        product = x / (1.0 + tl.exp2(x * -LOG2_E))
    return product


@triton.jit
def time_bucket(gap, threshold_ptr, BUCKETS: tl.constexpr):
    """Thresholds that are at most ``gap``, an int64 of at least 0: found by a logarithm that may be
    slightly off, and one comparison."""
    log2 = tl.log2(tl.maximum(gap, 1).to(tl.float32))
    bucket = tl.maximum(log2 * BUCKETS_PER_OCTAVE - BUCKET_SLACK, 0.0).to(tl.int32)
    bucket = tl.minimum(bucket, BUCKETS - 2)
    return bucket + (gap >= tl.load(threshold_ptr + bucket)).to(tl.int32)


@triton.jit
def biased(
    score,
    place,
    real,
    pair_ptr,
    history,
    position_ptr,
    position,
    time_ptr,
    threshold_ptr,
    times_ptr,
    next_time,
    P: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Adds the biases of pairs to their scores.

    All of one shape, or broadcast to that; ``pair_ptr`` and ``times_ptr`` point to what belongs to
    the place; P and BUCKETS are 0 without the tables.
    """
    if pair_ptr is not None:
        score += tl.load(pair_ptr, mask=real, other=0.0)
    if P:
        at = tl.minimum(place, history) - position + (P - 1)
        score += tl.load(position_ptr + at, mask=real, other=0.0)
    if BUCKETS:
        gap = tl.abs(next_time - tl.load(times_ptr, mask=real, other=0))
        if BUCKETS == 1:
            score += tl.load(time_ptr)
        else:
            score += tl.load(time_ptr + time_bucket(gap, threshold_ptr, BUCKETS))
    return score


@triton.jit
def block_of(place, real, count, address_ptr, CACHED: tl.constexpr):
    """The addresses of the blocks that places are in; 0 of those in no block and those not real."""
    address = None
    if CACHED:
        address = tl.load(address_ptr + place // BLOCK, mask=real & (place < count), other=0)
    return address


@triton.jit
def row_of(place, address, row_ptr, stride, in_block, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to where the K or V of places begin: in blocks where there is one, else in rows.

    The place 0 would be at ``row_ptr``; the head's part of a block begins at its byte ``in_block``.
    """
    ptr = row_ptr + place.to(tl.int64) * stride
    if address is not None:
        item: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        inside = address + in_block + place % BLOCK * (D * item)
        # In terms of addresses, as those of blocks are.
        either = tl.where(address != 0, inside, ptr.to(tl.int64))
        ptr = tl.multiple_of(either.to(row_ptr.dtype), ALIGNED)
    return ptr


@triton.jit
def columns_mask(real, column, D: tl.constexpr, PADDED: tl.constexpr):
    """Of rows with ``real`` and the real columns; without columns that are padding, of the rows."""
    mask = real[:, None]
    if D < PADDED:
        mask = mask & (column < D)[None, :]
    return mask


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    query_offset_ptr,
    key_offset_ptr,
    low_ptr,
    high_ptr,
    own_ptr,
    address_ptr,
    count_ptr,
    pair_ptr,
    pair_start_ptr,
    history_ptr,
    position_ptr,
    positions_ptr,
    time_ptr,
    threshold_ptr,
    times_ptr,
    time_start_ptr,
    next_time_ptr,
    a_ptr,
    tokens,
    sequences,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    a_token_stride,
    a_head_stride,
    address_stride,
    layer_offset,
    alpha,
    scale,
    HEADS: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    BUCKETS: tl.constexpr,
    CACHED: tl.constexpr,
    K_ALIGNED: tl.constexpr,
    V_ALIGNED: tl.constexpr,
    TANH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M rows of one sequence and one head. Grid: (T // M + B, HEADS).

    K_ALIGNED and V_ALIGNED: bytes that every row of K and of V is aligned to, in blocks or not.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    HAS_BIAS: tl.constexpr = pair_ptr is not None or P > 0 or BUCKETS > 0
    # The last rows of a sequence see most, so they come first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row_M = tl.arange(0, M)
    k_column, v_column = tl.arange(0, K), tl.arange(0, V)
    a_head_ptr = a_ptr + head.to(tl.int64) * a_head_stride
    first, last = tl.load(query_offset_ptr), tl.load(query_offset_ptr + sequences)

    # Rows of no sequence, of which every program has its share.
    nobody = tokens - (last - first)
    if block * M < nobody:
        outside_M = (block * M + row_M).to(tl.int64)
        token_M = tl.where(outside_M < first, outside_M, outside_M - first + last)
        zero_ptr = a_head_ptr + token_M[:, None] * a_token_stride + v_column[None, :]
        mask = columns_mask(outside_M < nobody, v_column, D_V, V)
        tl.store(zero_ptr, tl.zeros([M, V], a_ptr.dtype.element_ty), mask=mask)

    # Sequence s has the blocks from start // M + s on: enough for all of its rows, however its
    # start falls, and known without a look at the lengths.
    left, right = 0, sequences
    while left < right:
        middle = (left + right) // 2
        begins = (tl.load(query_offset_ptr + middle) - first) // M + middle
        if begins <= block:
            left = middle + 1
        else:
            right = middle
    sequence = left - 1
    start, end = tl.load(query_offset_ptr + sequence), tl.load(query_offset_ptr + sequence + 1)
    from_row = ((block - (start - first) // M - sequence) * M).to(tl.int32)
    rows = (end - start).to(tl.int32) - from_row
    if rows > 0:
        key_start = tl.load(key_offset_ptr + sequence).to(tl.int64)
        count = 0
        if CACHED:
            count = tl.load(count_ptr + sequence)
            address_ptr += sequence.to(tl.int64) * address_stride
        start = start.to(tl.int64) + from_row
        real_M = row_M < rows

        # What the rows see: an interval, and perhaps a key apart from it.
        low_M = tl.load(low_ptr + start + row_M, mask=real_M, other=0)
        high_M = tl.load(high_ptr + start + row_M, mask=real_M, other=0)
        own_M = tl.load(own_ptr + start + row_M, mask=real_M, other=-1)
        apart_M = (own_M >= 0) & ((own_M < low_M) | (own_M >= high_M))
        next_M = apart_M & (own_M == high_M) & (low_M <= high_M)
        any_apart = tl.max((apart_M & ~next_M).to(tl.int32)) > 0
        if not any_apart:
            # As of a causal mask: their intervals are one longer.
            high_M += next_M.to(tl.int32)
        some_M = real_M & (low_M < high_M)
        lowest = tl.min(tl.where(some_M, low_M, LARGEST_INT))
        highest = tl.max(tl.where(some_M, high_M, 0))

        q_row_ptr = q_ptr + start * q_token_stride + head.to(tl.int64) * q_head_stride
        q_at_MK = row_M[:, None] * q_token_stride + k_column[None, :]
        real_MK = columns_mask(real_M, k_column, D_QK, K)
        q_MK = tl.load(q_row_ptr + q_at_MK, mask=real_MK, other=0.0)

        # Such that the row of a place, counted from the sequence's first key, is that many strides
        # away.
        k_row_ptr = k_ptr + (key_start - count) * k_token_stride + head.to(tl.int64) * k_head_stride
        v_row_ptr = v_ptr + (key_start - count) * v_token_stride + head.to(tl.int64) * v_head_stride
        k_in_block = layer_offset + head * (BLOCK * D_QK * (dtype.primitive_bitwidth // 8))
        v_in_block = layer_offset + (
            (HEADS * D_QK + head * D_V) * BLOCK * (dtype.primitive_bitwidth // 8)
        )

        pair_row_ptr, history, position_M, times_row_ptr, next_time_M = None, 0, None, None, None
        position_M1, next_time_M1 = None, None
        if pair_ptr is not None:
            keys = count + (tl.load(key_offset_ptr + sequence + 1) - key_start)
            pair_row_ptr = pair_ptr + tl.load(pair_start_ptr + sequence) + from_row * keys
            pair_row_ptr = pair_row_ptr + row_M * keys
        if P:
            history = tl.load(history_ptr + sequence)
            position_M = tl.load(positions_ptr + start + row_M, mask=real_M, other=0)
            position_M1 = position_M[:, None]
        if BUCKETS:
            times_row_ptr = times_ptr + tl.load(time_start_ptr + sequence)
            next_time_M = tl.load(next_time_ptr + start + row_M, mask=real_M, other=0)
            next_time_M1 = next_time_M[:, None]

        a_MV = tl.zeros([M, V], tl.float32)
        if any_apart:
            address_M = block_of(own_M, apart_M, count, address_ptr, CACHED)
            k_ptr_M = row_of(
                own_M, address_M, k_row_ptr, k_token_stride, k_in_block, D_QK, K_ALIGNED
            )
            v_ptr_M = row_of(
                own_M, address_M, v_row_ptr, v_token_stride, v_in_block, D_V, V_ALIGNED
            )
            apart_MK = columns_mask(apart_M, k_column, D_QK, K)
            apart_MV = columns_mask(apart_M, v_column, D_V, V)
            own_MK = tl.load(k_ptr_M[:, None] + k_column[None, :], mask=apart_MK, other=0.0)
            score_M = tl.sum(q_MK.to(tl.float32) * own_MK.to(tl.float32), axis=1) * alpha
            if HAS_BIAS:
                pair_ptr_M, times_ptr_M = None, None
                if pair_ptr is not None:
                    pair_ptr_M = pair_row_ptr + own_M
                if BUCKETS:
                    times_ptr_M = times_row_ptr + own_M
                score_M = biased(
                    score_M,
                    own_M,
                    apart_M,
                    pair_ptr_M,
                    history,
                    position_ptr,
                    position_M,
                    time_ptr,
                    threshold_ptr,
                    times_ptr_M,
                    next_time_M,
                    P,
                    BUCKETS,
                )
            weight_M = tl.where(apart_M, silu(score_M, TANH), 0.0)
            own_MV = tl.load(v_ptr_M[:, None] + v_column[None, :], mask=apart_MV, other=0.0)
            a_MV = weight_M[:, None] * own_MV.to(tl.float32)

        # Without any key to see, lowest is behind them all, too far to count from.
        from_block = tl.minimum(lowest, highest) // BLOCK * BLOCK
        # One step ahead, so that no step waits for it.
        from_N = from_block + tl.arange(0, N)
        next_N = block_of(from_N, from_N < highest, count, address_ptr, CACHED)
        # From 0 on: of another begin Triton knows too little to see that rows are contiguous.
        for step in range(0, highest - from_block, N):
            from_key = from_block + step
            key_N = from_key + tl.arange(0, N)
            address_N = next_N
            if CACHED:
                next_N = block_of(key_N + N, key_N + N < highest, count, address_ptr, CACHED)
            k_ptr_N = row_of(
                key_N, address_N, k_row_ptr, k_token_stride, k_in_block, D_QK, K_ALIGNED
            )
            v_ptr_N = row_of(
                key_N, address_N, v_row_ptr, v_token_stride, v_in_block, D_V, V_ALIGNED
            )
            real_NK = columns_mask(key_N < highest, k_column, D_QK, K)
            real_NV = columns_mask(key_N < highest, v_column, D_V, V)
            k_NK = tl.load(k_ptr_N[:, None] + k_column[None, :], mask=real_NK, other=0.0)
            v_NV = tl.load(v_ptr_N[:, None] + v_column[None, :], mask=real_NV, other=0.0)
            score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="tf32x3") * alpha
            if HAS_BIAS:
                pair_ptr_MN, times_ptr_1N = None, None
                if pair_ptr is not None:
                    pair_ptr_MN = tl.expand_dims(pair_row_ptr, 1) + key_N[None, :]
                if BUCKETS:
                    times_ptr_1N = times_row_ptr + key_N[None, :]
                score_MN = biased(
                    score_MN,
                    key_N[None, :],
                    real_M[:, None] & (key_N < highest)[None, :],
                    pair_ptr_MN,
                    history,
                    position_ptr,
                    position_M1,
                    time_ptr,
                    threshold_ptr,
                    times_ptr_1N,
                    next_time_M1,
                    P,
                    BUCKETS,
                )
            weight_MN = silu(score_MN, TANH)
            sees_MN = (key_N[None, :] >= low_M[:, None]) & (key_N[None, :] < high_M[:, None])
            weight_MN = tl.where(sees_MN, weight_MN, 0.0)
            a_MV = tl.dot(weight_MN.to(dtype), v_NV, a_MV, input_precision="tf32x3")

        a_row_ptr = a_head_ptr + start * a_token_stride
        real_MV = columns_mask(real_M, v_column, D_V, V)
        a_at_MV = row_M[:, None] * a_token_stride + v_column[None, :]
        tl.store(a_row_ptr + a_at_MV, a_MV * scale, mask=real_MV)
