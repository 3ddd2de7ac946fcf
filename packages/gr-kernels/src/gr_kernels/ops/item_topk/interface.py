"""What every implementation of the op `item_topk` is: exact search of a catalogue by dot product.

    item_topk(users_BD, table_ID, k) -> (scores_BK, rows_BK)

``users`` and ``table`` are of one dtype out of `DTYPES` and on one device; their columns are
contiguous, their rows may have any stride. Row 0 of the table is padding and never an answer. For
each user the answer holds the k rows with the largest score, best first: scores in float32, rows in
int64. A score is the dot product, its sum in float32 in any order, products of float32 as exact as
float32 is. Of equal scores the lower row comes first; a score that is NaN counts as -inf. k is at
most the number of rows but one. Memory does not grow with users times rows.

The best are chosen by **keys**, int64 numbers that are in the order of the answers: in the high
half the bits of the score, such that they are in its order; in the low half the inverted row.

Shapes: B users, I rows of the table, D columns, K answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 2**31 - 1


def check_call(users_BD: Tensor, table_ID: Tensor, k: int) -> None:
    """Checks the arguments of a call. Raises `ValueError` naming what is wrong."""
    if table_ID.dim() != 2 or not 1 <= len(table_ID) <= MAX_ROWS or not table_ID.shape[1]:
        raise ValueError(f"table is {tuple(table_ID.shape)}; expected (items, width)")
    if table_ID.dtype not in DTYPES:
        raise ValueError(f"table is {table_ID.dtype}; expected float32, bfloat16 or float16")
    width, items = table_ID.shape[1], len(table_ID) - 1
    if users_BD.dim() != 2 or users_BD.shape[1] != width:
        raise ValueError(f"users have the shape {tuple(users_BD.shape)}; expected (users, {width})")
    if users_BD.dtype != table_ID.dtype or users_BD.device != table_ID.device:
        raise ValueError(
            f"users are {users_BD.dtype} on {users_BD.device}; expected {table_ID.dtype} on "
            f"{table_ID.device}, as the table is"
        )
    for name, tensor in (("users", users_BD), ("table", table_ID)):
        if width > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} has columns that are {tensor.stride(1)} apart; expected 1")
    if not 0 <= k <= items:
        raise ValueError(f"k is {k}; expected 0 to {items}, the number of items")


def keys_of(scores_BI: Tensor, first_row: int) -> Tensor:
    """Keys of float32 scores of the rows from ``first_row`` on. Writes over the scores."""
    infinity = torch.inf
    scores_BI.nan_to_num_(nan=-infinity, posinf=infinity, neginf=-infinity)
    scores_BI += 0.0  # of the two zeros, one
    keys_BI = ordered(scores_BI.view(torch.int32)).long()
    keys_BI <<= 32
    rows_I = torch.arange(first_row, first_row + scores_BI.shape[1], device=scores_BI.device)
    keys_BI |= rows_I ^ MAX_ROWS
    return keys_BI


def answers_of(keys_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and rows of keys."""
    scores_BK = ordered((keys_BK >> 32).int()).view(torch.float32)
    return scores_BK, (keys_BK & MAX_ROWS) ^ MAX_ROWS


def ordered(bits: Tensor) -> Tensor:
    """Bits of float32, int32, as numbers in its order; and back, since twice is not at all."""
    return bits ^ ((bits >> 31) & MAX_ROWS)
