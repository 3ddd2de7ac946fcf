"""The best items of a catalogue by dot product, exact or approximate."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gr_core.types import FloatArray
from gr_kernels.choice import wanted_isa
from gr_kernels.native import probe


class ItemIndex(Protocol):
    """Searches a catalogue. Row 0 of its table is padding and never an answer."""

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Scores (B, k) float32, best first, and row numbers (B, k) of the best items.

        Takes float32 torch tensors on the CPU. ``k`` is at most the number of items.
        """
        ...


def make_index(table_ID: Any, kind: str, threads: int) -> ItemIndex:
    """An index of the rows 1.. of a float32 table: ``exact`` or ``hnsw``.

    The exact one is in C++ where this installation and the environment have that, else in torch.
    """
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
