"""The op `embedding_gather` in Triton, for CUDA: all tables in one launch.

Where each table lies is kept on the device from the start, so a call makes no copy to or from the
host and waits for nothing: it can be part of a CUDA graph.

Shapes as in `gr_kernels.ops.embedding_gather.interface`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels.cuda.device import device_of
from gr_kernels.ops.embedding_gather.interface import Combine, check_call, check_tables
from gr_kernels.tuning import configuration, power_of_two

KERNEL = "embedding_gather-triton"
_VECTOR_BYTES = 16
"""What a thread loads at once, if tables, rows and columns begin at multiples of it."""
_STEP = 8
"""Tables whose rows are loaded at once."""


def configurations(dtype: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Launches to try, the default first. Sizes: tokens and width.

    M tokens and C columns of a program.
    """
    widest = power_of_two(sizes["width"], most=2048)
    found = []
    for elements, num_warps in ((2048, 4), (1024, 2), (1024, 4), (4096, 4), (4096, 8)):
        for c in sorted({min(512, widest), widest}):
            m = power_of_two(elements // c, most=power_of_two(sizes["tokens"]))
            found.append({"M": m, "C": c, "num_warps": num_warps})
    return found


class TritonEmbeddingGather:
    """Implements `EmbeddingGather`."""

    def __init__(
        self, tables: Sequence[Tensor], places: Tensor | None = None, *, combine: Combine = "sum"
    ) -> None:
        """Raises `PlanError` where Triton is not installed."""
        check_tables(tables, places, combine)
        if find_spec("triton") is None:
            raise PlanError("the op embedding_gather needs Triton; pip install gr-kernels[triton]")
        from gr_kernels.ops.embedding_gather import triton_kernels

        self._kernels = triton_kernels
        self._adds = combine == "sum"
        self._count, self._has_places = len(tables), places is not None
        # Kept, since the device holds no more than their addresses.
        self._tables = tuple(
            table.detach() for table in (tables if places is None else (*tables, places))
        )
        self._first = self._tables[0]
        widths = [table.shape[1] for table in tables]
        self.width = widths[0] if self._adds else sum(widths)
        self._widest = max(widths)
        numbers = self._numbers()
        in_memory = [number for row in numbers for number in (row[0], *row[2:])]
        self._aligned = math.gcd(_VECTOR_BYTES // self._first.element_size(), *in_memory)
        self._where = torch.tensor(numbers, device=self._first.device)

    def _numbers(self) -> list[list[int]]:
        """See `triton_kernels`."""
        numbers, column, size = [], 0, self._first.element_size()
        for table in self._tables:
            away = table.data_ptr() - self._first.data_ptr()
            assert away % size == 0
            rows, width = table.shape
            numbers.append([away // size, rows, table.stride(0), width, column])
            column += 0 if self._adds else width
        return numbers

    def __call__(
        self, ids_TF: Tensor, places_T: Tensor | None = None, out_TD: Tensor | None = None
    ) -> Tensor:
        """See `EmbeddingGather.__call__`."""
        first, tokens = self._first, len(ids_TF)
        dtype = torch.float32 if self._adds else first.dtype
        shape = torch.Size((tokens, self.width))
        check_call(
            self._count,
            self._has_places,
            shape,
            dtype,
            first.device,
            ids_TF,
            places_T,
            out_TD,
        )
        if out_TD is None:
            out_TD = torch.empty(shape, dtype=dtype, device=first.device)
        if not tokens:
            return out_TD
        sizes = {"tokens": power_of_two(tokens), "width": self._widest}
        name = str(first.dtype).removeprefix("torch.")
        launch = configuration(KERNEL, name, sizes, configurations(name, sizes)[0])
        blocks, columns = -(-tokens // launch["M"]), -(-self._widest // launch["C"])
        with device_of(first):
            if self._adds:
                self._kernels.sum_rows[(blocks, columns)](
                    first,
                    self._where,
                    ids_TF,
                    places_T,
                    out_TD,
                    tokens,
                    *ids_TF.stride(),
                    0 if places_T is None else places_T.stride(0),
                    out_TD.stride(0),
                    TABLES=self._count,
                    STEP=min(self._count, _STEP),
                    WIDTH=self.width,
                    HAS_PLACES=self._has_places,
                    ALIGNED=self._aligned,
                    **launch,
                )
            else:
                self._kernels.concatenate_rows[(blocks, self._count, columns)](
                    first,
                    self._where,
                    ids_TF,
                    out_TD,
                    tokens,
                    *ids_TF.stride(),
                    out_TD.stride(0),
                    ALIGNED=self._aligned,
                    **launch,
                )
        return out_TD
