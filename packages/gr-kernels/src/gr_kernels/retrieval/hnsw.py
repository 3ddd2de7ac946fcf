"""An approximate index for catalogues of millions: faiss' graph of near neighbours."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.errors import PlanError
from gr_core.types import FloatArray
from gr_kernels.retrieval import ItemIndex

_NEIGHBOURS = 32
_BUILD_BREADTH = 80
_SEARCH_BREADTH = 128
"""Least number of nodes kept while searching; more are kept for a larger k."""


class HNSWIndex:
    """Hierarchical navigable small worlds (arXiv 1603.09320) over dot products.

    Finds most of the best items in a time that hardly grows with their number. Where it finds
    fewer than asked, the exact index answers.
    """

    def __init__(self, table_ID: Any, threads: int, exact: ItemIndex) -> None:
        """Raises `PlanError` where faiss is not installed."""
        try:
            faiss: Any = import_module("faiss")  # its types leave out most of it
        except ImportError as error:
            raise PlanError(
                "engine native: option index is 'hnsw', which needs faiss; "
                "pip install gr-kernels[faiss], or set it to 'exact'"
            ) from error
        self._faiss = faiss
        self._threads = threads
        self._exact = exact
        items_ID = np.ascontiguousarray(table_ID[1:].numpy())
        faiss.omp_set_num_threads(threads)
        self._index = faiss.IndexHNSWFlat(
            items_ID.shape[1], _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT
        )
        self._index.hnsw.efConstruction = _BUILD_BREADTH
        self._index.add(items_ID)

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        parameters = self._faiss.SearchParametersHNSW()
        parameters.efSearch = max(_SEARCH_BREADTH, 2 * k)
        self._faiss.omp_set_num_threads(self._threads)
        scores_BK, places_BK = self._index.search(users_BD.numpy(), k, params=parameters)
        if (places_BK < 0).any():
            return self._exact.search(users_BD, k)
        return scores_BK, places_BK.astype(np.int64) + 1
