"""Problems for the op `hstu_paged_attention`, computed in one call or in many, on poisoned pages.

Shapes: B sequences, N tokens of one sequence, T tokens of a call, H heads, K and V columns per
head, M pages of a row of the block table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_kernels.ops.hstu_attention import Intervals
from gr_kernels.ops.hstu_attention.reference import hstu_attention
from gr_kernels.ops.hstu_paged_attention import BLOCK_TOKENS

ALPHA, DIVISOR = 0.3, 7.0
GARBAGE = -7
"""A number in the block table that is none of a page."""
POISON = 255
"""Four bytes of it are a NaN in every dtype."""


@dataclass(frozen=True, slots=True)
class User:
    """All tokens of one sequence, float64."""

    q_NHK: Tensor
    k_NHK: Tensor
    v_NHV: Tensor
    low_N: Tensor
    high_N: Tensor
    stored: int
    """Tokens that are stored, the first ones."""
    bias_NN: Tensor | None

    def __len__(self) -> int:
        return len(self.q_NHK)


def random_user(
    seed: int,
    intervals: Intervals,
    *,
    heads: int = 2,
    d_qk: int = 8,
    d_v: int = 8,
    stored: int | None = None,
    bias: bool = False,
) -> User:
    rng = np.random.default_rng(seed)
    low_N, high_N, _ = intervals
    tokens = len(low_N)

    def normal(*shape: int) -> Tensor:
        # What every precision can hold, so that all of them compute the same problem.
        return torch.from_numpy(rng.normal(size=shape)).bfloat16().double()

    return User(
        normal(tokens, heads, d_qk),
        normal(tokens, heads, d_qk),
        normal(tokens, heads, d_v),
        low_N,
        high_N,
        tokens if stored is None else stored,
        normal(tokens, tokens) if bias else None,
    )


def right(users: Sequence[User], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the unpaged op says."""
    found = []
    for user in users:
        offsets = torch.tensor([0, len(user)])
        own_N = torch.arange(len(user), dtype=torch.int32)
        bias = None if user.bias_NN is None else user.bias_NN.flatten().to(dtype)
        rows = (x.to(dtype) for x in (user.q_NHK, user.k_NHK, user.v_NHV))
        places = (offsets, offsets, user.low_N, user.high_N, own_N)
        found.append(hstu_attention(*rows, *places, ALPHA, DIVISOR, bias))
    return found


class Memory:
    """Pages of some users, shuffled, in an allocation of which they are a part; all of it NaN."""

    def __init__(
        self, users: Sequence[User], page_bytes: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        counts = [-(-len(user) // BLOCK_TOKENS) for user in users]
        total, gap = sum(counts) + 3, max(4, dtype.itemsize)
        self.bytes = torch.full((gap + total * (page_bytes + 3 * gap),), POISON, dtype=torch.uint8)
        self.pages = self.bytes.as_strided(
            (total, page_bytes + gap), (page_bytes + 3 * gap, 1), storage_offset=gap
        )
        self.table_BM = torch.full((len(users), max(counts, default=0) + 2), GARBAGE).int()
        numbers = torch.from_numpy(rng.permutation(total).astype(np.int32))
        for row, part in zip(self.table_BM, numbers[: sum(counts)].split(counts), strict=True):
            row[: len(part)] = part
        self.used = numbers[: sum(counts)].long()
        self.page_bytes = page_bytes

    def assert_nothing_else_written(self) -> None:
        untouched = self.bytes.clone()
        shape, stride, offset = self.pages.shape, self.pages.stride(), self.pages.storage_offset()
        pages = untouched.as_strided(shape, stride, offset)
        pages[self.used, : self.page_bytes] = POISON
        assert (untouched == POISON).all()


def compute(
    make: Callable[..., Any],
    users: Sequence[User],
    steps: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    *,
    padding: int = 0,
    views: bool = False,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> list[Tensor]:
    """The users' rows, each call of ``steps`` with so many new tokens of each user.

    Between ``padding`` rows of NaN; with ``views``, q, k and v are parts of one tensor.
    """
    heads, d_qk = users[0].q_NHK.shape[1:]
    d_v = users[0].v_NHV.shape[2]
    attention = make(heads, d_qk, d_v, dtype, ALPHA, DIVISOR, **options)
    memory = Memory(users, attention.page_bytes, dtype, seed)
    pages = memory.pages
    if device != "cpu":
        moved = memory.bytes.to(device)
        pages = moved.as_strided(pages.shape, pages.stride(), pages.storage_offset())
    done = [0] * len(users)
    found: list[list[Tensor]] = [[] for _ in users]
    for counts in steps:
        parts = [slice(n, n + count) for n, count in zip(done, counts, strict=True)]
        done = [part.stop for part in parts]
        rows = [
            torch.cat([getattr(user, name)[part] for user, part in zip(users, parts, strict=True)])
            for name in ("q_NHK", "k_NHK", "v_NHV")
        ]
        joined = torch.nn.functional.pad(
            torch.cat(rows, dim=-1), (0, 0, 0, 0, padding, padding), value=float("nan")
        ).to(dtype)
        split = joined.split([d_qk, d_qk, d_v], dim=-1)
        q, k, v = split if views else (x.contiguous() for x in split)
        table_BM = memory.table_BM.clone()
        slots, lows, highs = [], [], []
        for b, (user, part) in enumerate(zip(users, parts, strict=True)):
            place = torch.arange(part.start, part.stop)
            slot = memory.table_BM[b, place // BLOCK_TOKENS].long() * BLOCK_TOKENS
            slots.append(torch.where(place < user.stored, slot + place % BLOCK_TOKENS, -1))
            low, high = user.low_N[part], user.high_N[part]
            lows.append(low)
            highs.append(high)
            if (low < high).any():
                # Nobody looks there.
                table_BM[b, : int(low[low < high].min()) // BLOCK_TOKENS] = GARBAGE
        slots_T, low_T, high_T = (
            torch.nn.functional.pad(torch.cat(x), (padding, padding), value=GARBAGE)
            for x in (slots, lows, highs)
        )
        offsets = np.cumsum([0, *counts]) + padding
        bias = None
        if users[0].bias_NN is not None:
            bias = torch.cat(
                [
                    user.bias_NN[part, : part.stop].flatten()
                    for user, part in zip(users, parts, strict=True)
                ]
            ).float()
        given = (
            *(q, k, v),
            *(pages, table_BM, slots_T, torch.tensor(offsets), torch.tensor(done).int()),
            *(low_T, high_T, bias),
        )
        a_THV = attention(*(None if x is None else x.to(device) for x in given)).cpu()
        assert a_THV.dtype == dtype
        assert a_THV.shape == (len(q), heads, d_v)
        assert not a_THV[: offsets[0]].any()
        assert not a_THV[offsets[-1] :].any()
        for rows_of, begin, end in zip(found, offsets[:-1], offsets[1:], strict=True):
            rows_of.append(a_THV[begin:end])
    if device != "cpu":
        memory.bytes.copy_(moved)
    memory.assert_nothing_else_written()
    assert done == [len(user) for user in users]
    return [torch.cat(rows_of) for rows_of in found]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative in the Euclidean norm, but to no less than a twentieth of what is usual: of few
    numbers the terms may cancel, and what is left is as small as their roundings."""
    one, other = (torch.cat([x.double().flatten() for x in rows]) for rows in (found, expected))
    least = 0.05 / DIVISOR * max(1, other.numel()) ** 0.5
    return float((one - other).norm() / max(float(other.norm()), least))
