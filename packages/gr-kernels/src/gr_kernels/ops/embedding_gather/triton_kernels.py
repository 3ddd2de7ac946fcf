"""The kernels of `triton`. Imports Triton.

A table of numbers says where the tables lie: its row f has, in elements from the first table, where
table f begins; its rows; how far apart they are; its columns; and the column of the answer that it
starts at. All but the number of rows are multiples of ALIGNED.

Shapes: T tokens, M of them in a program, C columns of a program, F tables.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = tl.constexpr(5)
"""Of each table."""


@triton.jit
def rows_of(first_ptr, number_ptr, table, id_M, real_M, column_C, real_C, ALIGNED: tl.constexpr):
    """Rows of one table (M, C); zeros for ids outside."""
    number_ptr += table * NUMBERS
    start = tl.multiple_of(tl.load(number_ptr), ALIGNED)
    rows = tl.load(number_ptr + 1)
    stride = tl.multiple_of(tl.load(number_ptr + 2), ALIGNED)
    id_M = id_M.to(tl.int64)
    real_M = real_M & (id_M >= 0) & (id_M < rows)
    at_MC = (start + id_M * stride)[:, None] + column_C[None, :]
    return tl.load(first_ptr + at_MC, mask=real_M[:, None] & real_C[None, :], other=0.0)


@triton.jit
def sum_rows(
    first_ptr,
    number_ptr,
    id_ptr,
    place_ptr,
    out_ptr,
    tokens,
    id_token_stride,
    id_table_stride,
    place_stride,
    out_stride,
    TABLES: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """Sums of rows of M tokens and C columns. Grid: (T / M, WIDTH / C)."""
    token_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    real_M, real_C = token_M < tokens, column_C < WIDTH
    sum_MC = tl.zeros([M, C], tl.float32)
    # In steps of several tables, so that their rows are on their way at once.
    for from_ in range(0, TABLES, STEP):
        for i in tl.static_range(STEP):
            table = tl.minimum(from_ + i, TABLES - 1)
            id_M_ptr = id_ptr + token_M * id_token_stride + table * id_table_stride
            id_M = tl.load(id_M_ptr, mask=real_M & (from_ + i < TABLES), other=-1)
            row_MC = rows_of(first_ptr, number_ptr, table, id_M, real_M, column_C, real_C, ALIGNED)
            sum_MC += row_MC.to(tl.float32)
    if HAS_PLACES:
        place_M = tl.load(place_ptr + token_M * place_stride, mask=real_M, other=-1)
        row_MC = rows_of(first_ptr, number_ptr, TABLES, place_M, real_M, column_C, real_C, ALIGNED)
        sum_MC += row_MC.to(tl.float32)
    out_MC_ptr = out_ptr + (token_M * out_stride)[:, None] + column_C[None, :]
    tl.store(out_MC_ptr, sum_MC, mask=real_M[:, None] & real_C[None, :])


@triton.jit
def concatenate_rows(
    first_ptr,
    number_ptr,
    id_ptr,
    out_ptr,
    tokens,
    id_token_stride,
    id_table_stride,
    out_stride,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """Rows of M tokens from one table, C columns of them. Grid: (T / M, F, widest / C)."""
    token_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    table = tl.program_id(1)
    column_C = tl.program_id(2) * C + tl.arange(0, C)
    width = tl.multiple_of(tl.load(number_ptr + table * NUMBERS + 3), ALIGNED)
    start = tl.multiple_of(tl.load(number_ptr + table * NUMBERS + 4), ALIGNED)
    real_M, real_C = token_M < tokens, column_C < width
    id_M = tl.load(
        id_ptr + token_M * id_token_stride + table * id_table_stride, mask=real_M, other=-1
    )
    row_MC = rows_of(first_ptr, number_ptr, table, id_M, real_M, column_C, real_C, ALIGNED)
    out_MC_ptr = out_ptr + (token_M * out_stride + start)[:, None] + column_C[None, :]
    tl.store(out_MC_ptr, row_MC, mask=real_M[:, None] & real_C[None, :])
