"""Where a batch's tokens are embedded and its answers read out: where the layers run, if possible.

Shapes: T tokens of a batch, R rows that answers are read from, D model width, W ids of a token, V
rows of a table, C candidates of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
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


def ends_of(model: StackModel, device: torch.device, tasks: Sequence[Task]) -> StackEnds:
    """The model itself on the CPU; on a GPU its ends there, or a way to the CPU and back."""
    if device.type == "cpu":
        return model
    if isinstance(model, TokenModel):
        try:
            return SummedTokens(model, device, tasks)
        except PlanError:
            pass  # its tokens are more than sums
    if isinstance(model, PlacedStackModel):
        return model.ends(str(device))
    return HostEnds(model, device)


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

    def __init__(self, model: TokenModel, device: torch.device, tasks: Sequence[Task]) -> None:
        """Raises `PlanError` where tokens or answers of the model are made in another way."""
        tables, readout = model.token_tables(), model.readout()
        gather = choose("embedding_gather", "float32", device="cuda").resolve()
        self._gather = gather(
            [table.to(device) for table in tables.tables],
            None if tables.places is None else tables.places.to(device),
        )
        self._model = model
        self._device = device
        self._norm, self._eps = readout.norm, readout.eps
        # What finds items has an index of them.
        self._table_VD = readout.table.to(device) if Task.RANK in tasks else None

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
        users_RD = self._normed(rows)
        if task is not Task.RANK:
            return users_RD.unbind(0)
        assert self._table_VD is not None
        ids = [self._model.answer_ids(request) for request in requests]
        counts = [len(one) for one in ids]
        packed = np.stack([np.concatenate(ids), np.repeat(np.arange(len(ids)), counts)])
        item_C, user_C = placed(packed, self._device)
        scores_C = (self._table_VD[item_C] * users_RD[user_C]).sum(1)
        return torch.split(scores_C[:, None], counts)

    def _normed(self, x_RD: Tensor) -> Tensor:
        if self._norm == "l2":
            return F.normalize(x_RD, dim=1, eps=self._eps)
        return x_RD if self._norm == "none" else F.layer_norm(x_RD, x_RD.shape[1:], eps=self._eps)
