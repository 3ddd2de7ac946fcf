"""The op `item_topk` in Triton, for CUDA: without the scores of all items in memory.

Rows that follow each other are a group. One pass over the table keeps of each group and user only
the best key. The k best items then lie in the k groups of the best such keys: were one in another
group, k groups would each hold a better one. A second pass scores these groups row by row. Keys
differ, so both choices are exact, equal scores too; torch makes them, by radix selection. Compared
with keeping the k best of each part of the table, nothing is sorted in the pass that reads it, and
k has no limit.

With so few scores that groups would not pay, the keys of all items are one group's.

A call makes no copy to the host and waits for nothing, so it can be part of a CUDA graph. Products
of float32 are of three products of TF32 each in the first pass, and in float32 in the second; an
item whose score is the k-th but for the last bits may be missed for that.

Shapes as in `gr_kernels.ops.item_topk.interface`; G best of groups, C keys to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.item_topk.interface import check_call
from gr_kernels.tuning import configuration, power_of_two

KERNEL = "item_topk-triton"
SMALLEST_GROUP, LARGEST_GROUP = 32, 128
_ALL_KEYS = 2**20
"""So many keys of all items are chosen from at once, without a second pass."""
_KEY_BYTES = 2**28
"""Memory for keys; more users than fit into it are searched for in several turns."""
_MOST_USERS = 2**15
"""Of a turn: a grid has no more than 65535 in its second axis."""
_USER_CLASSES = 256
"""From so many users on launches are the same."""
_TILE = 64
"""Rows of a program where there are no groups."""
_ANSWERS = 512


def configurations(dtype: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Launches of the first pass to try, the default first. Sizes: group, users, width.

    M users of a program, K columns of a step.
    """
    narrow = dtype != "float32"
    tried = [(64, 64, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (128, 64, 8, 3), (32, 64, 4, 3)]
    if not narrow:  # whose parts of TF32 take many registers
        tried = [(64, 32, 8, 3), (64, 64, 8, 2), (32, 32, 4, 3), (32, 64, 4, 3), (128, 32, 8, 3)]
    if sizes["users"] <= 32:
        tried = [(32, 64, 4, 3), (32, 32, 4, 4), (32, 128, 4, 2), (16, 64, 4, 3), (32, 64, 8, 3)]
    columns = power_of_two(sizes["width"], least=16)
    found: list[dict[str, int]] = []
    for m, k, num_warps, num_stages in tried:
        launch = {
            "M": min(m, power_of_two(sizes["users"], least=16)),
            "K": min(2 * k if narrow else k, columns),
            "num_warps": num_warps,
            "num_stages": num_stages,
        }
        if launch not in found:
            found.append(launch)
    return found


def group_of(users: int, items: int, k: int) -> int:
    """Rows of a group, such that few keys are chosen from; 1: all items' keys are."""
    if users * items <= _ALL_KEYS or items <= 2 * SMALLEST_GROUP * k:
        return 1
    best = math.isqrt(items // k)  # least items / group + k · group
    return min(max(SMALLEST_GROUP, 1 << (best.bit_length() - 1)), LARGEST_GROUP)


def item_topk(users_BD: Tensor, table_ID: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `interface`. Raises `PlanError` where Triton is not installed."""
    check_call(users_BD, table_ID, k)
    if find_spec("triton") is None:
        raise PlanError("the op item_topk needs Triton; pip install gr-kernels[triton]")
    from gr_kernels.ops.item_topk import triton_kernels

    users_BD, table_ID = users_BD.detach(), table_ID.detach()
    users, items = len(users_BD), len(table_ID) - 1
    scores_BK = users_BD.new_empty(users, k, dtype=torch.float32)
    rows_BK = users_BD.new_empty(users, k, dtype=torch.int64)
    if not users or not k:
        return scores_BK, rows_BK
    group = group_of(users, items, k)
    keys = items if group == 1 else max(-(-items // group), k * group)
    turn = min(max(1, _KEY_BYTES // (8 * keys)), _MOST_USERS)
    with device_of(table_ID):
        for first in range(0, users, turn):
            part = slice(first, first + turn)
            keys_BK = best_keys(triton_kernels, users_BD[part], table_ID, k, group)
            answers = keys_BK.numel()
            triton_kernels.answers_of[(-(-answers // _ANSWERS),)](
                keys_BK, scores_BK[part], rows_BK[part], answers, A=_ANSWERS
            )
    return scores_BK, rows_BK


def best_keys(kernels: Any, users_BD: Tensor, table_ID: Tensor, k: int, group: int) -> Tensor:
    """The k best keys of each user, (B, K), by groups of so many rows; see `group_of`."""
    rows, width = table_ID.shape
    users, tile = len(users_BD), group if group > 1 else _TILE
    tiles = -(-(rows - 1) // tile)
    dtype = str(table_ID.dtype).removeprefix("torch.")
    sizes = {"group": group, "users": power_of_two(users, most=_USER_CLASSES), "width": width}
    launch = configuration(KERNEL, dtype, sizes, configurations(dtype, sizes)[0])
    keys_BG = users_BD.new_empty(users, tiles if group > 1 else rows - 1, dtype=torch.int64)
    user_tiles = -(-users // launch["M"])
    kernels.scan[(tiles * user_tiles,)](
        users_BD,
        table_ID,
        keys_BG,
        users,
        rows,
        users_BD.stride(0),
        table_ID.stride(0),
        keys_BG.stride(0),
        user_tiles,
        D=width,
        N=tile,
        ALL=group == 1,
        **launch,
    )
    if group == 1:
        return keys_BG.topk(k).values
    best_BG = keys_BG.topk(min(k, tiles), sorted=False).values
    keys_BC = users_BD.new_empty(users, best_BG.shape[1] * group, dtype=torch.int64)
    kernels.score_groups[(best_BG.shape[1], users)](
        users_BD,
        table_ID,
        best_BG,
        keys_BC,
        rows,
        users_BD.stride(0),
        table_ID.stride(0),
        best_BG.stride(0),
        keys_BC.stride(0),
        D=width,
        N=group,
        K=power_of_two(width, least=16, most=64),
        num_warps=4,
    )
    return keys_BC.topk(k).values
