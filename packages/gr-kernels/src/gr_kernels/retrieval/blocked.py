"""Exact search in torch: the catalogue block by block, for machines without native kernels.

Shapes: B users, I items, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gr_core.types import FloatArray

_SCORES_IN_FLIGHT = 16 * 2**20


class BlockedIndex:
    """Implements `ItemIndex`. Equal scores come in any order."""

    def __init__(self, table_ID: Any) -> None:
        self._table_ID = table_ID[1:]

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        items = len(self._table_ID)
        block = max(k, _SCORES_IN_FLIGHT // max(1, len(users_BD)))
        best: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, items, block):
            part = self._table_ID[start : start + block]
            scores, places = torch.topk(users_BD @ part.T, min(k, len(part)))
            best.append((scores, places + start + 1))
        scores_BM, places_BM = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
        scores_BK, order_BK = torch.topk(scores_BM, k)
        return scores_BK.numpy(), places_BM.gather(1, order_BK).numpy()
