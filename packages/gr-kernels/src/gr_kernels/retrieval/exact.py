"""Exact search in C++, see csrc/topk.h: the scores of all items, of which only the best are kept.

Shapes: B users, I rows of the table, D width, K best items.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gr_core.errors import PlanError
from gr_core.types import FloatArray
from gr_kernels.choice import wanted_isa
from gr_kernels.native import library
from gr_kernels.retrieval.checks import check_search, check_table


class ExactIndex:
    """Implements `ItemIndex`, in float32. Of equal scores the lower row comes first, NaN last.

    Holds the table once, in the order that the kernels read. What a user gets depends neither on
    the other users nor on the number of threads. Thread-safe: searches wait for each other.
    """

    def __init__(self, table_ID: Any, threads: int = 1, isa: str = "auto") -> None:
        """Raises `PlanError` without the library or, as said by ``isa``, the instruction set."""
        self._handle = 0
        try:
            self._library = _library()
        except (OSError, AttributeError) as error:
            raise PlanError(f"the exact index is not to be had: {error}") from error
        check_table(table_ID)
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads is {threads}; expected 1 to 1024")
        table_ID = table_ID.detach().to("cpu", torch.float32).contiguous()
        self._items, self._width = len(table_ID) - 1, table_ID.shape[1]
        isa = _instruction_set(wanted_isa(isa))
        self._handle = self._library.gr_topk_create(
            table_ID.data_ptr(), len(table_ID), self._width, isa.encode(), threads
        )
        if not self._handle:
            raise PlanError(
                f"the exact index of {self._items} items is not to be had: this processor lacks "
                f"the instruction set {isa!r}, or there is no memory"
            )

    def search(self, users_BD: Any, k: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        check_search(users_BD, k, self._items, self._width)
        users_BD = users_BD.detach().to("cpu", torch.float32).contiguous()
        scores_BK = np.empty((len(users_BD), k), np.float32)
        places_BK = np.empty((len(users_BD), k), np.int64)
        status = self._library.gr_topk_search(
            self._handle,
            users_BD.data_ptr(),
            len(users_BD),
            k,
            scores_BK.ctypes.data,
            places_BK.ctypes.data,
        )
        if status == _NO_MEMORY:
            raise MemoryError(f"no memory for the best {k} of {self._items} items")
        assert status == 0
        return scores_BK, places_BK

    def __del__(self) -> None:
        handle, self._handle = self._handle, 0
        if handle:
            self._library.gr_topk_destroy(handle)


_NO_MEMORY = 2


def _instruction_set(wanted: str) -> str:
    """That of the search: all of AVX-512's kinds are one to it."""
    if wanted in ("auto", "torch"):
        return "auto"
    return "avx2" if wanted == "avx2" else "avx512"


@functools.cache
def _library() -> ctypes.CDLL:
    found = library()
    found.gr_topk_create.restype = ctypes.c_void_p
    found.gr_topk_create.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
    )
    found.gr_topk_destroy.restype = None
    found.gr_topk_destroy.argtypes = (ctypes.c_void_p,)
    found.gr_topk_search.restype = ctypes.c_int32
    found.gr_topk_search.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    return found
