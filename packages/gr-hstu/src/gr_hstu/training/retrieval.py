"""Retrieval: next-item training over whole sequences, and scoring for the evaluator.

Shapes: B sequences, L behaviours, D width, T targets, V = 1 + items, S signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_hstu.data.interactions import BoolArray, FloatArray, IntArray, Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.evaluation.retrieval import evaluate_retrieval
from gr_hstu.training import losses
from gr_hstu.training.batches import HistoryEncoder, to_device

LOSSES = ("full", "sampled", "shared", "in-batch")


class RetrievalScorer:
    """A trained model as the evaluator's scorer; encodes as a server would."""

    def __init__(self, model: Any, encoder: HistoryEncoder) -> None:
        self.model, self.encoder = model, encoder

    @torch.inference_mode()
    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        inputs = to_device(self.encoder.batch(cases), self.model)
        state_BLD = _encode_all(self.model, inputs)
        last_B = inputs["history_lengths"] - 1
        query_BD = state_BLD[torch.arange(len(cases), device=last_B.device), last_B]
        return (query_BD @ self.model.item_embeddings().T).float().cpu().numpy()


class RetrievalObjective:
    """Predicts each positive row from the rows before it.

    Every epoch cuts each user's training rows into windows of ``max_history`` at a new random
    offset; all positions of a window are trained at once. ``weight_N`` (N,) is each row's weight as
    a target, 0 for none. The time of the request is that of the row to predict.
    """

    def __init__(
        self,
        data: Interactions,
        train_N: BoolArray,
        weight_N: FloatArray,
        encoder: HistoryEncoder,
        validation: Cases,
        loss: str = "sampled",
        negatives: int = 128,
        batch_size: int = 128,
        temperature: float = 1.0,
        metric: str = "ndcg@10",
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
        self.data, self.encoder, self.validation = data, encoder, validation
        self.loss_name, self.negatives = loss, negatives
        self.batch_size, self.temperature, self.metric = batch_size, temperature, metric
        self.weight_N = np.where(train_N, weight_N, 0).astype(np.float32)
        self.target_N = self.weight_N > 0
        # Training rows of a user are a prefix of the user's rows in every protocol.
        users = np.flatnonzero(np.bincount(data.user_N, train_N, len(data.users) + 1) >= 2)
        first = np.searchsorted(data.user_N, users)
        count = np.bincount(data.user_N, train_N, len(data.users) + 1)[users].astype(np.int64)
        self.first_U, self.end_U = first, first + count
        frequency_V = np.bincount(data.item_N[self.target_N], minlength=len(data.items) + 1)
        share_V = np.maximum(frequency_V, 1) / max(frequency_V.sum(), 1)
        self.log_frequency_V = torch.from_numpy(np.log(share_V).astype(np.float32))

    def epoch(self, draw: np.random.Generator) -> Sequence[IntArray]:
        """Batches of windows (start, end), shuffled."""
        window = self.encoder.schema.max_history
        starts, ends = [], []
        # A window reads rows [start, end) and predicts (start, end]: the last row is never read.
        length_U = self.end_U - 1 - self.first_U
        offset_U = np.where(length_U > window, draw.integers(0, window, len(length_U)), 0)
        for first, end, offset in zip(self.first_U, self.end_U - 1, offset_U, strict=True):
            cuts = np.arange(first + offset, end, window)
            if offset:
                cuts = np.concatenate([[first], cuts])
            starts.append(cuts)
            ends.append(np.append(cuts[1:], end))
        windows = np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
        targets = np.concatenate([[0], np.cumsum(self.target_N)])
        useful = targets[windows[:, 1] + 1] > targets[windows[:, 0] + 1]
        windows = draw.permutation(windows[useful])
        return [windows[i : i + self.batch_size] for i in range(0, len(windows), self.batch_size)]

    def loss(self, model: Any, plan: IntArray) -> Tensor:
        rows = Cases(plan[:, 1], plan[:, 0], plan[:, 1])
        inputs = to_device(self.encoder.batch(rows), model)
        state_BLD = _encode_all(model, inputs)
        step_L = np.arange(state_BLD.shape[1])
        row_BL = plan[:, :1] + 1 + step_L
        inside_BL = row_BL <= plan[:, 1:]
        row_BL = np.minimum(row_BL, plan[:, 1:])
        chosen_BL = torch.from_numpy(inside_BL & self.target_N[row_BL]).to(state_BLD.device)
        target_BL = torch.from_numpy(self.data.item_N[row_BL]).to(state_BLD.device)
        query_TD, target_T = state_BLD[chosen_BL], target_BL[chosen_BL]
        weight_BL = torch.from_numpy(self.weight_N[row_BL]).to(state_BLD.device)
        weight_T = weight_BL[chosen_BL]
        loss_T = self._per_target(query_TD, model.item_embeddings(), target_T)
        return (loss_T * weight_T).sum() / weight_T.sum()

    def _per_target(self, query_TD: Tensor, item_VD: Tensor, target_T: Tensor) -> Tensor:
        if self.loss_name == "full":
            return losses.full_softmax(query_TD, item_VD, target_T, self.temperature)
        if self.loss_name in ("sampled", "shared"):
            sample = losses.sampled_softmax
            if self.loss_name == "shared":
                sample = losses.shared_softmax
            return sample(query_TD, item_VD, target_T, self.temperature, self.negatives)
        frequency = self.log_frequency_V.to(query_TD.device)
        return losses.in_batch_softmax(query_TD, item_VD, target_T, self.temperature, frequency)

    def validate(self, model: Any) -> float:
        scorer = RetrievalScorer(model, self.encoder)
        return evaluate_retrieval(scorer, self.data, self.validation).mean(self.metric)


def _encode_all(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.encode_all(
        history_items=inputs["history_items"],
        history_timestamps=inputs["history_timestamps"],
        history_lengths=inputs["history_lengths"],
        request_time=inputs["request_time"],
        history_signals=inputs["history_signals"],
    )
