"""`HSTURetrieval` without padding.

Shapes: L behaviours, G signal columns, W ids of a token, D model width, R requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.tokens import Norm, Readout, TokenTables
from gr_core.types import IntArray, Task
from gr_hstu.jagged.intervals import Int32Array, hstu_intervals
from gr_hstu.jagged.rows import (
    candidate_counts,
    columns,
    joined,
    new_ids,
    on_device,
    on_host,
    picked,
    to_content,
    to_ids,
)
from gr_hstu.models import HSTURetrieval
from gr_hstu.models.retrieval import USER_NORM_EPS


class JaggedRetrieval:
    """A token's ids: the item, its signals and, with a time bias, the time until what follows.

    That bias lets token i read the time of behaviour i + 1, which therefore belongs to its row; the
    last row has the request's time, so the last token changes once a behaviour follows.
    """

    def __init__(self, module: HSTURetrieval, items: str = "history_items") -> None:
        """``items`` is the array of the requests that the tokens are read from."""
        self._module = module
        self._device = module.items.weight.device
        self._items = items
        self._signals = len(module.signals)
        self._timed = module.config.relative_bias
        self._width = 1 + self._signals + (2 if self._timed else 0)

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        arrays = request.arrays
        items_L = arrays[self._items]
        length = len(items_L)
        ids_LW = np.empty((length, self._width), np.int32)
        ids_LW[:, 0] = items_L
        if self._signals:
            ids_LW[:, 1 : 1 + self._signals] = arrays["history_signals"]
        times_L = next_times_L = None
        if self._timed:
            times_L = arrays["history_timestamps"]
            next_times_L = np.empty_like(times_L)
            next_times_L[:-1] = times_L[1:]
            next_times_L[-1:] = arrays["request_time"]
            # Two ids hold the 64 bits. Differences are all that the bias reads.
            ids_LW[:, -2:].view(np.int64)[:, 0] = next_times_L - times_L
        low, high = hstu_intervals(0, length, 0)
        return TokenSequence(
            history=length,
            candidates=0,
            low=low,
            high=high,
            content=to_content(ids_LW),
            salt=b"",
            reusable=max(0, length - 1) if self._timed else length,
            times=times_L,
            next_times=next_times_L,
        )

    @torch.inference_mode()
    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        ids, places = new_ids(sequences, starts)
        arrays = {"ids": columns(ids[:, : 1 + self._signals]), "places": places}
        there = on_device(arrays, self._device)
        ids_TW = there["ids"].T
        return self._module.placed(ids_TW[:, 0], ids_TW[:, 1:], there["places"])

    @torch.no_grad()
    def tables(self) -> TokenTables:
        module = self._module
        scale = math.sqrt(module.config.d_model)
        tables = [module.items, *module.signals.tables]
        rows = tuple(scale * table.get_parameter("weight").detach() for table in tables)
        return TokenTables(rows, module.positions.weight.detach())

    @torch.no_grad()
    def readout(self) -> Readout:
        norm: Norm = "l2" if self._module.config.user_norm == "l2" else "layer"
        return Readout(self._module.item_embeddings().detach(), norm, USER_NORM_EPS)

    def ids(self, sequence: TokenSequence) -> Int32Array:
        return to_ids(sequence.content)[:, : 1 + self._signals]

    def answer_ids(self, request: EncodedRequest) -> IntArray:
        return request.arrays["candidate_items"]

    @torch.inference_mode()
    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        users_RD = self._module.normalize_user(rows)
        if task is not Task.RANK:
            return users_RD.unbind(0)
        counts = candidate_counts(requests)
        arrays = {"items": joined(requests, "candidate_items")}
        if on_host(self._device):
            items_CD = self._module.item_vectors(on_device(arrays, self._device)["items"])
            by_request = items_CD.split_with_sizes(counts)
            return [i @ user for i, user in zip(by_request, users_RD[..., None], strict=True)]
        # One product for all requests, as each one would be started on its own.
        arrays["users"] = np.arange(len(counts)).repeat(counts)
        there = on_device(arrays, self._device)
        users_CD = picked(users_RD, there["users"])
        products_CD = self._module.item_vectors(there["items"]) * users_CD
        return products_CD.sum(1, keepdim=True).split_with_sizes(counts)
