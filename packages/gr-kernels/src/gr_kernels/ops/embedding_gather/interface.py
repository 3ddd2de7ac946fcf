"""What every implementation of the op `embedding_gather` is: tokens as rows of several tables.

It is made once for a set of tables, as `gr_core.tokens.TokenTables` holds one, and then called with
the ids of any number of tokens.

Shapes: T tokens, F tables of I_f rows and D_f columns, D columns of an answer, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Combine = Literal["sum", "concat"]
"""The rows of a token added up in float32, or side by side in the tables' dtype."""


class EmbeddingGather(Protocol):
    """Embeddings of tokens. The factories of the op make one; its arguments are checked.

    A table that is written to later gives its new rows: tables are kept, not copied.
    """

    width: int
    """Columns of an answer: D_f with ``sum``, all D_f together with ``concat``."""

    def __init__(
        self, tables: Sequence[Tensor], places: Tensor | None = None, *, combine: Combine = "sum"
    ) -> None:
        """Tables (I_f, D_f) of one of `DTYPES`, all on one device, and of one width for ``sum``.

        ``places`` (P, D), for ``sum`` alone, is one more table, whose rows are chosen by place.
        Columns are contiguous; rows may have any stride. Raises `ValueError` naming what is wrong.
        """
        ...

    def __call__(
        self, ids_TF: Tensor, places_T: Tensor | None = None, out_TD: Tensor | None = None
    ) -> Tensor:
        """With ``sum`` float32 (T, D), added in the order of the tables, places last.

        With ``concat`` (T, D) in the tables' dtype. ``ids``, and ``places`` where there is a table
        of them, are int32 or int64 of any strides on the tables' device. An id outside its table,
        negative too, stands for a row of zeros. ``out`` is written to and returned where given: of
        contiguous columns and any stride of rows. Raises `ValueError` for what does not fit.
        """
        ...


def check_tables(tables: Sequence[Tensor], places: Tensor | None, combine: Combine) -> None:
    """Checks the arguments of a constructor. Raises `ValueError`."""
    if combine not in ("sum", "concat"):
        raise ValueError(f"combine is {combine!r}; expected 'sum' or 'concat'")
    if not tables:
        raise ValueError("tables are none; expected at least one")
    if places is not None and combine == "concat":
        raise ValueError("combine is 'concat', which adds no places; expected places to be None")
    first = tables[0]
    named = [(f"table {f}", table) for f, table in enumerate(tables)]
    for name, table in named if places is None else [*named, ("places", places)]:
        if table.dim() != 2 or not table.shape[1]:
            raise ValueError(f"{name} is {tuple(table.shape)}; expected (rows, width)")
        if table.dtype not in DTYPES:
            raise ValueError(f"{name} is {table.dtype}; expected float32, bfloat16 or float16")
        if table.dtype != first.dtype or table.device != first.device:
            raise ValueError(
                f"{name} is {table.dtype} on {table.device}; expected {first.dtype} on "
                f"{first.device}, as table 0 is"
            )
        if combine == "sum" and table.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} is {table.shape[1]} wide; expected {first.shape[1]}, as table 0 is, since "
                "rows are summed"
            )
        if table.shape[1] > 1 and table.stride(1) != 1:
            raise ValueError(f"{name} has columns that are {table.stride(1)} apart; expected 1")


def check_call(
    tables: int,
    places: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    ids_TF: Tensor,
    places_T: Tensor | None,
    out_TD: Tensor | None,
) -> None:
    """Checks a call on so many tables, whose answer has that shape. Raises `ValueError`."""
    if ids_TF.dim() != 2 or ids_TF.shape[1] != tables:
        raise ValueError(f"ids are {tuple(ids_TF.shape)}; expected (tokens, {tables})")
    if places and places_T is None:
        raise ValueError("places are None; expected one of each token, for the table of places")
    if places_T is not None:
        if not places:
            raise ValueError("places are given; expected None, since there is no table of them")
        if places_T.shape != shape[:1]:
            raise ValueError(f"places are {tuple(places_T.shape)}; expected {tuple(shape[:1])}")
    for name, tensor in (("ids", ids_TF), ("places", places_T)):
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} are {tensor.dtype}; expected int32 or int64")
    if out_TD is not None:
        if out_TD.shape != shape or out_TD.dtype != dtype:
            raise ValueError(
                f"out is {out_TD.dtype} {tuple(out_TD.shape)}; expected {dtype} {tuple(shape)}"
            )
        if shape[1] > 1 and out_TD.stride(1) != 1:
            raise ValueError(f"out has columns that are {out_TD.stride(1)} apart; expected 1")
    for name, tensor in (("ids", ids_TF), ("places", places_T), ("out", out_TD)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, as the tables are")
