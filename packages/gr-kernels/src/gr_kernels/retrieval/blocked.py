"""Exact search in torch: the catalogue block by block, for machines without native kernels.

Shapes: B users, I rows of the table, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gr_core.types import FloatArray
from gr_kernels.ops.item_topk.reference import item_topk
from gr_kernels.retrieval.checks import check_search, check_table


class BlockedIndex:
    """Implements `ItemIndex`. Of equal scores the lower row comes first, NaN last."""

    def __init__(self, table_ID: Any) -> None:
        check_table(table_ID)
        self._table_ID = table_ID.detach().to("cpu", torch.float32)

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        check_search(users_BD, k, len(self._table_ID) - 1, self._table_ID.shape[1])
        users_BD = users_BD.detach().to("cpu", torch.float32).contiguous()
        scores_BK, rows_BK = item_topk(users_BD, self._table_ID, k)
        return scores_BK.numpy(), rows_BK.numpy()
