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
"""More than rounding takes from a bucket, as a fraction in float32."""
ONE_BITS = tl.constexpr(0x3F800000)
"""Of 1.0 in float32, which has 2^23 numbers between powers of two."""


@triton.jit
def silu(x, TANH: tl.constexpr):
    """x·sigmoid(x); with TANH of one special function, an approximate one, instead of two."""
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
    """Thresholds that are at most ``gap``, an int64 of at least 0: a guess and one comparison.

    A float's bits are its logarithm with a line from each power of two to the next: at most 0.087
    too small, a fifth of a bucket. So the bucket is the guess or the one after it.
    """
    bits = gap.to(tl.float32).to(tl.int32, bitcast=True) - ONE_BITS
    bucket = (bits.to(tl.float32) * (BUCKETS_PER_OCTAVE / 8388608) - BUCKET_SLACK).to(tl.int32)
    bucket = tl.maximum(bucket, 0)
    if BUCKETS > 1:
        bucket = tl.minimum(bucket, BUCKETS - 2)
        bucket += (gap >= tl.load(threshold_ptr + bucket)).to(tl.int32)
    else:
        bucket = bucket * 0
    return bucket


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
        ptr = tl.where(address != 0, inside, ptr.to(tl.int64)).to(row_ptr.dtype)
    return tl.multiple_of(ptr, ALIGNED)


@triton.jit
def columns_mask(real, column, D: tl.constexpr, PADDED: tl.constexpr):
    """Of rows with ``real`` and the real columns; without columns that are padding, of the rows."""
    mask = real[:, None]
    if D < PADDED:
        mask = mask & (column < D)[None, :]
    return mask


@triton.jit
def load_rows(row_ptr, real, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows of D columns, zeros where they are not real; ``real`` None: all are."""
    column = tl.arange(0, PADDED)
    ptr = row_ptr[:, None] + column[None, :]
    if real is not None:
        values = tl.load(ptr, mask=columns_mask(real, column, D, PADDED), other=0.0)
    elif D < PADDED:
        values = tl.load(ptr, mask=(column < D)[None, :], other=0.0)
    else:
        values = tl.load(ptr)
    return values


@triton.jit
def edge_of(step, left, right, lowest, full_from, full_to, highest, own_ptr, rows, N: tl.constexpr):
    """A tile of those that not all rows see whole.

    These are ``left`` steps before the full tiles, ``right`` after them, then keys that are apart,
    each in the place of its row. Returns the places, -1 where there is none; what the first counts
    as for the rows' intervals; and whether the keys are apart.
    """
    is_left, is_apart = step < left, step >= left + right
    first = tl.where(is_left, lowest + step, full_to + step - left)
    end = tl.where(is_left, full_from, highest)
    first = tl.where(is_apart, step - left - right, first)
    end = tl.where(is_apart, rows, end)
    index_N = first + tl.arange(0, N)
    real_N = index_N < end
    own_N = tl.load(own_ptr + index_N, mask=real_N & is_apart, other=-1)
    return tl.where(is_apart, own_N, tl.where(real_N, index_N, -1)), first, is_apart


@triton.jit
def plus_tile(
    a_MV,
    q_MK,
    place_N,
    address_N,
    first,
    from_M,
    to_M,
    alpha,
    k_row_ptr,
    v_row_ptr,
    k_token_stride,
    v_token_stride,
    k_in_block,
    v_in_block,
    real_M,
    pair_row_ptr,
    history,
    position_ptr,
    position_M,
    time_ptr,
    threshold_ptr,
    times_row_ptr,
    next_time_M,
    FULL: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    P: tl.constexpr,
    BUCKETS: tl.constexpr,
    K_ALIGNED: tl.constexpr,
    V_ALIGNED: tl.constexpr,
    TANH: tl.constexpr,
):
    """Adds what the keys of the places give: to all rows where it is FULL, else to those whose
    interval has the key's number, which counts from ``first``."""
    K: tl.constexpr = q_MK.shape[1]
    V: tl.constexpr = a_MV.shape[1]
    N: tl.constexpr = place_N.shape[0]
    real_N = None
    if not FULL:
        real_N = place_N >= 0
    k_ptr_N = row_of(place_N, address_N, k_row_ptr, k_token_stride, k_in_block, D_QK, K_ALIGNED)
    v_ptr_N = row_of(place_N, address_N, v_row_ptr, v_token_stride, v_in_block, D_V, V_ALIGNED)
    k_NK = load_rows(k_ptr_N, real_N, D_QK, K)
    v_NV = load_rows(v_ptr_N, real_N, D_V, V)
    score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="tf32x3") * alpha
    if pair_row_ptr is not None or P > 0 or BUCKETS > 0:
        # In a branch, loads are not pipelined: copies of single numbers to shared memory would take
        # most of it, and more time than they save.
        always = alpha == alpha
        if always:
            if pair_row_ptr is not None:
                pair_ptr_MN = tl.expand_dims(pair_row_ptr, 1) + place_N[None, :]
                if FULL:
                    score_MN += tl.load(pair_ptr_MN, mask=real_M[:, None], other=0.0)
                else:
                    real_MN = real_M[:, None] & tl.expand_dims(real_N, 0)
                    score_MN += tl.load(pair_ptr_MN, mask=real_MN, other=0.0)
            if not FULL:
                # For what is no place, that of a key that there is.
                place_N = tl.maximum(place_N, 0)
            if P:
                at_MN = tl.minimum(place_N, history)[None, :] - position_M[:, None] + (P - 1)
                score_MN += tl.load(position_ptr + at_MN)
            if BUCKETS:
                gap_MN = tl.abs(next_time_M[:, None] - tl.load(times_row_ptr + place_N)[None, :])
                score_MN += tl.load(time_ptr + time_bucket(gap_MN, threshold_ptr, BUCKETS))
    if not FULL:
        # One comparison without signs instead of two with: from, and to.
        at_MN = (first - from_M)[:, None] + tl.arange(0, N)[None, :]
        length_M = tl.maximum(to_M - from_M, 0)
        sees_MN = at_MN.to(tl.uint32) < length_M.to(tl.uint32)[:, None]
        # SiLU of 0 is 0.
        score_MN = tl.where(sees_MN, score_MN, 0.0)
    weight_MN = silu(score_MN, TANH)
    return tl.dot(weight_MN.to(v_NV.dtype), v_NV, a_MV, input_precision="tf32x3")


# What changes from call to call shall not compile the kernel anew.
@triton.jit(
    do_not_specialize=["tokens", "sequences", "address_stride", "layer_offset"],
    do_not_specialize_on_alignment=[
        "query_offset_ptr",
        "key_offset_ptr",
        "low_ptr",
        "high_ptr",
        "own_ptr",
        "address_ptr",
        "count_ptr",
        "pair_ptr",
        "pair_start_ptr",
        "history_ptr",
        "position_ptr",
        "positions_ptr",
        "time_ptr",
        "threshold_ptr",
        "times_ptr",
        "time_start_ptr",
        "next_time_ptr",
    ],
)
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
    # The last rows of a sequence see most, so they come first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row_M = tl.arange(0, M)
    k_column, v_column = tl.arange(0, K), tl.arange(0, V)
    a_head_ptr = a_ptr + head.to(tl.int64) * a_head_stride
    front, back = tl.load(query_offset_ptr), tl.load(query_offset_ptr + sequences)

    # Rows of no sequence, of which every program has its share.
    nobody = tokens - (back - front)
    if block * M < nobody:
        outside_M = (block * M + row_M).to(tl.int64)
        token_M = tl.where(outside_M < front, outside_M, outside_M - front + back)
        zero_ptr = a_head_ptr + token_M[:, None] * a_token_stride + v_column[None, :]
        mask = columns_mask(outside_M < nobody, v_column, D_V, V)
        tl.store(zero_ptr, tl.zeros([M, V], a_ptr.dtype.element_ty), mask=mask)

    # Sequence s has the blocks from start // M + s on: enough for all of its rows, however its
    # start falls, and known without a look at the lengths.
    left, right = 0, sequences
    while left < right:
        middle = (left + right) // 2
        begins = (tl.load(query_offset_ptr + middle) - front) // M + middle
        if begins <= block:
            left = middle + 1
        else:
            right = middle
    sequence = left - 1
    start, end = tl.load(query_offset_ptr + sequence), tl.load(query_offset_ptr + sequence + 1)
    from_row = ((block - (start - front) // M - sequence) * M).to(tl.int32)
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
        highest = tl.max(tl.where(some_M, high_M, 0))
        lowest = tl.minimum(tl.min(tl.where(some_M, low_M, LARGEST_INT)), highest)

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
        if pair_ptr is not None:
            keys = count + (tl.load(key_offset_ptr + sequence + 1) - key_start)
            pair_row_ptr = pair_ptr + tl.load(pair_start_ptr + sequence) + from_row * keys
            pair_row_ptr = pair_row_ptr + row_M * keys
        if P:
            history = tl.load(history_ptr + sequence)
            position_M = tl.load(positions_ptr + start + row_M, mask=real_M, other=0)
        if BUCKETS:
            times_row_ptr = times_ptr + tl.load(time_start_ptr + sequence)
            next_time_M = tl.load(next_time_ptr + start + row_M, mask=real_M, other=0)

        # Tiles that all rows see whole need no masks.
        full_from = tl.max(tl.where(real_M, low_M, 0))
        full_to = tl.min(tl.where(real_M, high_M, LARGEST_INT))
        full = tl.maximum(full_to - full_from, 0) // N * N
        full_from = tl.where(full > 0, full_from, lowest)
        full_to = full_from + full
        a_MV = tl.zeros([M, V], tl.float32)
        # Blocks of the next tile, so that no step waits for them.
        key_N = full_from + tl.arange(0, N)
        next_N = block_of(key_N, key_N < full_to, count, address_ptr, CACHED)
        # From 0 on: of another begin Triton knows too little to see that rows are contiguous.
        for step in range(0, full, N):
            key_N = full_from + step + tl.arange(0, N)
            address_N = next_N
            if CACHED:
                next_N = block_of(key_N + N, key_N + N < full_to, count, address_ptr, CACHED)
            a_MV = plus_tile(
                a_MV,
                q_MK,
                key_N,
                address_N,
                0,
                low_M,
                high_M,
                alpha,
                k_row_ptr,
                v_row_ptr,
                k_token_stride,
                v_token_stride,
                k_in_block,
                v_in_block,
                real_M,
                pair_row_ptr,
                history,
                position_ptr,
                position_M,
                time_ptr,
                threshold_ptr,
                times_row_ptr,
                next_time_M,
                True,
                D_QK,
                D_V,
                P,
                BUCKETS,
                K_ALIGNED,
                V_ALIGNED,
                TANH,
            )

        left = tl.cdiv(full_from - lowest, N) * N
        right = tl.cdiv(tl.maximum(highest - full_to, 0), N) * N
        own_ptr += start
        own_rows = tl.minimum(rows, M)
        next_place_N, next_first, next_apart = edge_of(
            0, left, right, lowest, full_from, full_to, highest, own_ptr, own_rows, N
        )
        next_N = block_of(next_place_N, next_place_N >= 0, count, address_ptr, CACHED)
        for step in range(0, left + right + tl.where(any_apart, own_rows, 0), N):
            place_N = next_place_N
            address_N = next_N
            first = next_first
            is_apart = next_apart
            next_place_N, next_first, next_apart = edge_of(
                step + N, left, right, lowest, full_from, full_to, highest, own_ptr, own_rows, N
            )
            if CACHED:
                next_N = block_of(next_place_N, next_place_N >= 0, count, address_ptr, CACHED)
            a_MV = plus_tile(
                a_MV,
                q_MK,
                place_N,
                address_N,
                first,
                tl.where(is_apart, row_M, low_M),
                tl.where(is_apart, row_M + apart_M.to(tl.int32), high_M),
                alpha,
                k_row_ptr,
                v_row_ptr,
                k_token_stride,
                v_token_stride,
                k_in_block,
                v_in_block,
                real_M,
                pair_row_ptr,
                history,
                position_ptr,
                position_M,
                time_ptr,
                threshold_ptr,
                times_row_ptr,
                next_time_M,
                False,
                D_QK,
                D_V,
                P,
                BUCKETS,
                K_ALIGNED,
                V_ALIGNED,
                TANH,
            )

        a_row_ptr = a_head_ptr + start * a_token_stride
        real_MV = columns_mask(real_M, v_column, D_V, V)
        a_at_MV = row_M[:, None] * a_token_stride + v_column[None, :]
        tl.store(a_row_ptr + a_at_MV, a_MV * scale, mask=real_MV)
