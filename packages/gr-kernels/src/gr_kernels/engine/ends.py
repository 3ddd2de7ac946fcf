"""Where a batch's tokens are embedded and its answers read out: where the layers run, if possible.

Shapes: T tokens of a batch, R rows that answers are read from, D model width, W ids of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.errors import PlanError
from gr_core.stack import PlacedStackModel, StackEnds, StackModel, TokenSequence
from gr_core.tokens import TokenModel
from gr_core.types import Task
from gr_kernels.choice import choose


def placed(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """An array on a device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def ends_of(model: StackModel, device: torch.device) -> StackEnds:
    """The model itself on the CPU; on a GPU its ends there, or a way to the CPU and back."""
    if device.type == "cpu":
        return model
    ends: StackEnds = HostEnds(model, device)
    if isinstance(model, PlacedStackModel):
        ends = model.ends(str(device))
    if isinstance(model, TokenModel):
        try:
            return SummedTokens(model, ends, device)
        except PlanError:
            pass  # its tokens are more than sums
    return ends


class HostEnds:
    """Implements `StackEnds` with a model on the CPU: rows are copied there and back."""

    def __init__(self, model: StackModel, device: torch.device) -> None:
        self._model = model
        self._device = device

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        x_TD: Tensor = self._model.embed(requests, sequences, starts)
        return x_TD.to(self._device)

    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        answers = self._model.outputs(task, requests, rows.cpu())
        return [answer.to(self._device) for answer in answers]


class SummedTokens:
    """Implements `StackEnds` for tokens that are sums of table rows: all of them in one launch."""

    def __init__(self, model: TokenModel, ends: StackEnds, device: torch.device) -> None:
        """Raises `PlanError` where they are not."""
        tables = model.token_tables()
        gather = choose("embedding_gather", "float32", device="cuda").resolve()
        self._gather = gather(
            [table.to(device) for table in tables.tables],
            None if tables.places is None else tables.places.to(device),
        )
        self._model = model
        self._ends = ends
        self._device = device

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        both = list(zip(sequences, starts, strict=True))
        ids_TW = np.concatenate([self._model.token_ids(s)[start:] for s, start in both])
        places = [np.arange(start, s.history, dtype=np.int32) for s, start in both]
        # Ids and places in one copy.
        packed = np.concatenate([ids_TW, np.concatenate(places)[:, None]], axis=1, dtype=np.int32)
        on_device = placed(packed, self._device)
        x_TD: Tensor = self._gather(on_device[:, :-1], on_device[:, -1])
        return x_TD

    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        return self._ends.outputs(task, requests, rows)
