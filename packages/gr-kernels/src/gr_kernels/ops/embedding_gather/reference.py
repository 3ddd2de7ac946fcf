"""The op `embedding_gather` in torch, on any device: table after table.

Shapes as in `gr_kernels.ops.embedding_gather.interface`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gr_kernels.ops.embedding_gather.interface import Combine, check_call, check_tables


class TorchEmbeddingGather:
    """Implements `EmbeddingGather`."""

    def __init__(
        self, tables: Sequence[Tensor], places: Tensor | None = None, *, combine: Combine = "sum"
    ) -> None:
        check_tables(tables, places, combine)
        self._tables = tuple(table.detach() for table in tables)
        self._places = None if places is None else places.detach()
        self._adds = combine == "sum"
        widths = [table.shape[1] for table in tables]
        self.width = widths[0] if self._adds else sum(widths)

    def __call__(
        self, ids_TF: Tensor, places_T: Tensor | None = None, out_TD: Tensor | None = None
    ) -> Tensor:
        """See `EmbeddingGather.__call__`."""
        first = self._tables[0]
        dtype = torch.float32 if self._adds else first.dtype
        shape = torch.Size((len(ids_TF), self.width))
        has_places = self._places is not None
        check_call(
            len(self._tables), has_places, shape, dtype, first.device, ids_TF, places_T, out_TD
        )
        out_TD = first.new_empty(shape, dtype=dtype) if out_TD is None else out_TD
        rows = [_rows(table, ids_TF[:, f]) for f, table in enumerate(self._tables)]
        if not self._adds:
            return torch.cat(rows, dim=1, out=out_TD) if len(rows) > 1 else out_TD.copy_(rows[0])
        if self._places is not None and places_T is not None:
            rows.append(_rows(self._places, places_T))
        out_TD.zero_()
        for row_TD in rows:
            out_TD += row_TD
        return out_TD


def _rows(table_ID: Tensor, ids_T: Tensor) -> Tensor:
    if not len(table_ID):
        return table_ID.new_zeros(len(ids_T), table_ID.shape[1])
    inside_T = (ids_T >= 0) & (ids_T < len(table_ID))
    row_TD = table_ID[ids_T.clamp(0, len(table_ID) - 1).long()]
    return torch.where(inside_T[:, None], row_TD, 0)
