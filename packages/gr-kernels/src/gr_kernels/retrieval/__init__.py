"""The best items of a catalogue by dot product, exact or approximate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gr_core.errors import PlanError
from gr_core.types import FloatArray
from gr_kernels.choice import wanted_isa
from gr_kernels.native import probe


class ItemIndex(Protocol):
    """Searches a catalogue. Row 0 of its table is padding and never an answer."""

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Scores (B, k) float32, best first, and row numbers (B, k) of the best items.

        Takes float32 torch tensors on the CPU, an index on a GPU those there too. ``k`` is at most
        the number of items.
        """
        ...


def make_index(
    table_ID: Any,
    kind: str,
    threads: int,
    device: str = "cpu",
    dtype: str = "float32",
    kernels: Sequence[str] = (),
) -> ItemIndex:
    """An index of the rows 1.. of a float32 table: ``exact`` or ``hnsw``.

    The exact one is on the ``device``. On the CPU it is in C++ where this installation and the
    environment have that, else in torch; elsewhere it rounds to ``dtype`` and ``kernels`` may name
    what it runs, see `gr_kernels.choice`. Raises `PlanError` for what is not to be had.
    """
    if device.partition(":")[0] != "cpu":
        if kind == "hnsw":
            raise PlanError(
                f"engine native: option index is 'hnsw', which is for the CPU; on {device} set it "
                "to 'exact'"
            )
        from gr_kernels.retrieval.cuda import CudaIndex

        return CudaIndex(table_ID, device, dtype, kernels=kernels)
    exact = _exact(table_ID, threads)
    if kind == "hnsw":
        from gr_kernels.retrieval.hnsw import HNSWIndex

        return HNSWIndex(table_ID, threads, exact)
    return exact


def _exact(table_ID: Any, threads: int) -> ItemIndex:
    if wanted_isa() != "torch" and probe("float32")[0]:
        from gr_kernels.retrieval.exact import ExactIndex

        return ExactIndex(table_ID, threads)
    from gr_kernels.retrieval.blocked import BlockedIndex

    return BlockedIndex(table_ID)
