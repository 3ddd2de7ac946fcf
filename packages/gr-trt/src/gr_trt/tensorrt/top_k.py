"""The items with the largest dot products with users, found by torch on the engine's device.

Shapes: B users, D width, I items and the padding row, K items wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gr_core.types import FloatArray, IntArray


class TopK:
    """Exact; the table stays on the device in float32."""

    def __init__(self, table_ID: torch.Tensor, device: str) -> None:
        self._device = device
        self._table_DI = table_ID[1:].T.to(device, torch.float32).contiguous()

    @torch.inference_mode()
    def search(self, users_BD: npt.NDArray[Any], k: int) -> tuple[FloatArray, IntArray]:
        """Scores (B, K) float32, best first, and catalogue indices (B, K) int64."""
        users = torch.from_numpy(np.ascontiguousarray(users_BD)).to(self._device, torch.float32)
        scores_BK, places_BK = torch.topk(users @ self._table_DI, k, dim=1)
        return scores_BK.cpu().numpy(), (places_BK + 1).cpu().numpy()
