"""Batches of cases: a dataset's rows through the very feature code that serves requests.

Shapes: B cases, L behaviours, S signals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gr_core.repository import Catalogue
from gr_core.types import History, item_id_array
from gr_hstu.data.interactions import Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import FeatureSchema


def catalogue_of(data: Interactions) -> Catalogue:
    """A catalogue whose index ``i`` is the dataset's item ``i``; integer ids stay integers."""
    ids: Sequence[Any] = data.items.ids
    if all(i.isdigit() and str(int(i)) == i for i in data.items.ids):
        ids = [int(i) for i in data.items.ids]
    titles = [data.items.title(i) for i in range(1, len(data.items) + 1)]
    return Catalogue(item_id_array(ids), titles if data.items.titles is not None else ())


class HistoryEncoder:
    """Turns slices of a dataset into the model inputs that a request with that history gets."""

    def __init__(self, data: Interactions, schema: FeatureSchema, catalogue: Catalogue) -> None:
        self.schema, self.catalogue = schema, catalogue
        self._data = data
        self._item_ids_N = catalogue.ids_of(data.item_N)
        known = {feature.name for feature in schema.signals}
        self._signals = {n: column for n, column in data.signals.items() if n in known}

    def history(self, start: int, end: int) -> History:
        """What the user did in the rows ``start`` to ``end``, as a client would send it."""
        rows = slice(start, end)
        return History(
            item_ids=self._item_ids_N[rows],
            timestamps_ms=self._data.timestamp_ms_N[rows],
            signals={name: column[rows] for name, column in self._signals.items()},
        )

    def encode(self, start: int, end: int, request_time_ms: int) -> dict[str, np.ndarray]:
        # More than two truncation steps beyond what is kept can only be cut off.
        longest = self.schema.max_history + 2 * self.schema.truncate_step
        if end - start > longest:
            start += (
                (end - start - longest) // self.schema.truncate_step * self.schema.truncate_step
            )
        history, indices, _ = self.schema.history(self.history(start, end), self.catalogue)
        return self.schema.history_arrays(history, indices, request_time_ms)

    def batch(self, cases: Cases) -> dict[str, Tensor]:
        """Inputs of cases as padded tensors; the request's time is the target's own."""
        time_N = self._data.timestamp_ms_N
        return stack(
            [
                self.encode(int(start), int(end), int(time_N[row]))
                for row, start, end in zip(cases.row_C, cases.start_C, cases.end_C, strict=True)
            ]
        )


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Arrays of single requests as one batch, padded with 0 on the right of the first axis."""
    out = {}
    for name in rows[0]:
        arrays = [row[name] for row in rows]
        if arrays[0].ndim == 0:
            out[name] = torch.from_numpy(np.stack(arrays))
            continue
        longest = max(len(array) for array in arrays)
        batch = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
        for target, array in zip(batch, arrays, strict=True):
            target[: len(array)] = array
        out[name] = torch.from_numpy(batch)
    return out


def to_device(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same inputs where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
