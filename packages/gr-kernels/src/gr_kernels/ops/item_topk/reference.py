"""The op `item_topk` in torch, on any device: the catalogue block by block.

Shapes as in `gr_kernels.ops.item_topk.interface`; M best of all blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.ops.item_topk.interface import answers_of, check_call, keys_of

_SCORES_IN_FLIGHT = 2**21


def item_topk(users_BD: Tensor, table_ID: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `interface`."""
    check_call(users_BD, table_ID, k)
    users_BD = users_BD.detach().float()
    block = max(k, 1, _SCORES_IN_FLIGHT // max(1, len(users_BD)))
    best_BM = torch.empty(len(users_BD), 0, dtype=torch.int64, device=users_BD.device)
    for start in range(1, len(table_ID), block):
        part_ID = table_ID[start : start + block].detach().float()
        keys_BI = keys_of(users_BD @ part_ID.T, start)
        best_BM = torch.cat([best_BM, keys_BI.topk(min(k, len(part_ID))).values], dim=1)
        best_BM = best_BM.topk(min(k, best_BM.shape[1])).values
    return answers_of(best_BM)
