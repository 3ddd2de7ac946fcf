"""Before and after the layers: rows of many tables, and the best of many items.

Shapes: T tokens, F tables of I rows and D columns, B users, K answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gr_kernels.benchmark.gpu.device import Device
from gr_kernels.benchmark.gpu.measure import Case, Entry, Kind, Side
from gr_kernels.ops.embedding_gather.triton import TritonEmbeddingGather
from gr_kernels.ops.item_topk.triton import item_topk

GATHER, TOPK, PLAIN = "embedding_gather-triton", "item_topk-triton", "torch"
_DTYPE = torch.bfloat16


# ── Embeddings ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class GatherPoint:
    """Rows of several tables, summed in float32."""

    tables: int
    rows: int
    width: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.tables} tables of {self.rows} x {self.width}, {self.tokens} tokens"

    @property
    def facts(self) -> Mapping[str, str]:
        return {
            "tables": f"{self.tables} of {self.rows} x {self.width}",
            "tokens": str(self.tokens),
            "dtype": "bfloat16, summed in float32",
        }

    @property
    def bytes(self) -> float:
        """Ids and rows read, sums written."""
        ids, row = 8.0 * self.tables, 2.0 * self.tables * self.width
        return self.tokens * (ids + row + 4.0 * self.width)


class GatherWork:
    def __init__(self, of: GatherPoint, sets: int, device: Device) -> None:
        self.point = of
        generator = torch.Generator(device.name).manual_seed(0)
        self.tables = [
            torch.empty(of.rows, of.width, dtype=_DTYPE, device=device.name).normal_(
                generator=generator
            )
            for _ in range(of.tables)
        ]
        self.ids = [
            torch.randint(of.rows, (of.tokens, of.tables), generator=generator, device=device.name)
            for _ in range(sets)
        ]

    def right(self, number: int) -> Tensor:
        ids_TF = self.ids[number]
        rows = (table[ids_TF[:, f]].double() for f, table in enumerate(self.tables))
        return sum(rows, torch.zeros((), dtype=torch.float64, device=ids_TF.device))


def summed(tables: list[Tensor], ids_TF: Tensor) -> Tensor:
    """Table by table, added in float32: (T, D)."""
    out_TD = F.embedding(ids_TF[:, 0], tables[0]).float()
    for f, table in enumerate(tables[1:], 1):
        out_TD += F.embedding(ids_TF[:, f], table)
    return out_TD


class GatherSide(Side):
    def __init__(self, work: GatherWork) -> None:
        self._work, self.bytes = work, work.point.bytes
        self._gather = TritonEmbeddingGather(work.tables)
        shape = (work.point.tokens, work.point.width)
        self._out_TD = torch.empty(shape, device=work.tables[0].device)

    def poison(self) -> None:
        self._out_TD.fill_(float("nan"))

    def run(self, number: int) -> None:
        self._gather(self._work.ids[number], None, self._out_TD)

    def output(self) -> Tensor:
        return self._out_TD


class PlainGatherSide(Side):
    def __init__(self, work: GatherWork) -> None:
        self._work, self.bytes = work, work.point.bytes
        self._out_TD = torch.empty(0)

    def run(self, number: int) -> None:
        self._out_TD = summed(self._work.tables, self._work.ids[number])

    def output(self) -> Tensor:
        return self._out_TD


def gather_case(of: GatherPoint, device: Device, *, sets: int = 4) -> Case:
    work = GatherWork(of, sets, device)
    entries = [
        Entry(GATHER, Kind.OURS, partial(GatherSide, work)),
        Entry(PLAIN, Kind.PLAIN, partial(PlainGatherSide, work)),
    ]
    return Case(of.name, of.facts, sets, work.right, entries, GATHER)


# ── Retrieval ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TopkPoint:
    """The best items of a catalogue for some users."""

    items: int
    width: int
    users: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.users} users, {self.k} best of {self.items} x {self.width}"

    @property
    def facts(self) -> Mapping[str, str]:
        return {
            "items": f"{self.items} x {self.width}",
            "users": str(self.users),
            "k": str(self.k),
            "dtype": "bfloat16",
        }

    @property
    def flops(self) -> float:
        return 2.0 * self.items * self.width * self.users

    @property
    def bytes(self) -> float:
        """The table, once."""
        return 2.0 * self.items * self.width


class TopkWork:
    def __init__(self, of: TopkPoint, sets: int, device: Device) -> None:
        self.point = of
        generator = torch.Generator(device.name).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            made = torch.empty(*shape, dtype=_DTYPE, device=device.name)
            return made.normal_(generator=generator)

        self.table_ID = normal(of.items + 1, of.width)
        self.users_BD = [normal(of.users, of.width) for _ in range(sets)]

    def right(self, number: int) -> Tensor:
        """The best scores in float32, as `found` has them."""
        score_BI = self.users_BD[number].float() @ self.table_ID[1:].float().T
        best_BK = score_BI.topk(self.point.k).values
        return torch.stack([best_BK, best_BK])

    def found(self, number: int, scores_BK: Tensor, rows_BK: Tensor) -> Tensor:
        """The scores that were given, and those that the given rows have in float32."""
        true_BK = torch.einsum(
            "bd,bkd->bk", self.users_BD[number].float(), self.table_ID[rows_BK].float()
        )
        sorted_BK = rows_BK.sort(dim=1).values
        if bool((sorted_BK[:, 1:] == sorted_BK[:, :-1]).any()):
            true_BK = torch.full_like(true_BK, float("nan"))  # one row twice
        return torch.stack([scores_BK.float(), true_BK])


class TopkSide(Side):
    def __init__(self, work: TopkWork, *, plain: bool) -> None:
        self._work, self._plain = work, plain
        self.flops, self.bytes = work.point.flops, work.point.bytes
        self._answer: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._last = 0

    def run(self, number: int) -> None:
        users_BD, table_ID, k = self._work.users_BD[number], self._work.table_ID, self._work.point.k
        self._last = number
        if self._plain:
            scores_BK, places_BK = torch.topk(users_BD @ table_ID[1:].T, k)
            self._answer = scores_BK, places_BK + 1
        else:
            self._answer = item_topk(users_BD, table_ID, k)

    def output(self) -> Tensor:
        return self._work.found(self._last, *self._answer)


def topk_case(of: TopkPoint, device: Device, *, sets: int = 4) -> Case:
    work = TopkWork(of, sets, device)
    entries = [
        Entry(TOPK, Kind.OURS, partial(TopkSide, work, plain=False)),
        Entry(PLAIN, Kind.PLAIN, partial(TopkSide, work, plain=True)),
    ]
    return Case(of.name, of.facts, sets, work.right, entries, TOPK)
