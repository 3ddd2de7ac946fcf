"""Exact search on a GPU: the op `item_topk` on a table that is there.

Shapes: B users, I rows of the table, D width, K best items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.types import FloatArray
from gr_kernels.choice import choose
from gr_kernels.retrieval.checks import check_search, check_table

TopK = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""See `gr_kernels.ops.item_topk.interface`."""


class CudaIndex:
    """Implements `ItemIndex`. Of equal scores the lower row comes first, NaN last.

    Holds the table once, on the device. Thread-safe as far as its streams are: a search is on the
    current one.
    """

    def __init__(
        self,
        table_ID: Any,
        device: str = "cuda",
        dtype: str = "float32",
        *,
        kernels: Sequence[str] = (),
        topk: TopK | None = None,
    ) -> None:
        """The table, and users, are rounded to ``dtype``: float32, bfloat16 or float16.

        ``kernels`` may name the implementation of the op, see `gr_kernels.choice`; ``topk`` is one
        that was chosen already. Raises `PlanError` where none is usable here.
        """
        check_table(table_ID)
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        kind = torch.device(device).type
        self._topk: TopK = (
            topk or choose("item_topk", dtype, device=kind, kernels=kernels).resolve()
        )
        self._table_ID = table_ID.detach().to(device, _DTYPES[dtype]).contiguous()

    def best(self, users_BD: Any, k: int) -> tuple[Tensor, Tensor]:
        """As `search`, to tensors on the device; does not wait for it, if the users are there."""
        table_ID = self._table_ID
        check_search(users_BD, k, len(table_ID) - 1, table_ID.shape[1])
        users_BD = users_BD.detach().to(table_ID.device, table_ID.dtype, non_blocking=True)
        return self._topk(users_BD.contiguous(), table_ID, k)

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """As `ItemIndex.search`; the users may be on any device and of any dtype."""
        scores_BK, rows_BK = self.best(users_BD, k)
        return scores_BK.cpu().numpy(), rows_BK.cpu().numpy()


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
