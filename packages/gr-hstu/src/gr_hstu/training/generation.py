"""Generation of semantic ids: next-code training over whole sequences, and scoring by search.

Shapes: B sequences, H items, T tokens, L levels, D width, V = 1 + items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gr_core.generation import CodeTrie
from gr_hstu.beams import BeamLoop
from gr_hstu.data.interactions import BoolArray, IntArray, Interactions
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.evaluation.retrieval import evaluate_retrieval
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.training.batches import HistoryEncoder

_AT_ONCE = 32
"""Cases searched at once."""


class GenerationScorer:
    """A trained model as the evaluator's scorer: what its search does not find scores -inf.

    It finds ``depth`` items besides those of the history, as serving does for as many.
    """

    def __init__(self, model: HSTUSemanticIds, encoder: HistoryEncoder, depth: int) -> None:
        self._model, self._encoder, self._depth = model, encoder, depth
        config = model.config
        self._device = model.item_codes.device
        self._search = BeamLoop(
            model,
            CodeTrie(model.item_tokens(), config.levels),
            config.levels,
            config.beam_width,
            self._device,
        )

    @torch.inference_mode()
    def score(self, data: Interactions, cases: Cases) -> np.ndarray:
        scores = np.full((len(cases), len(data.items) + 1), -np.inf, np.float32)
        for start in range(0, len(cases), _AT_ONCE):
            part = cases.take(np.arange(start, min(start + _AT_ONCE, len(cases))))
            batch = self._encoder.batch(part)
            items, lengths = batch["history_items"], batch["history_lengths"]
            inputs = {
                "history_tokens": self._model.history_tokens(items.to(self._device)),
                "history_lengths": 1 + len(self._model.config.levels) * lengths.to(self._device),
            }
            seen = [len(np.unique(row[row > 0])) for row in items.numpy()]
            ks = [min(len(data.items), self._depth + count) for count in seen]
            for row, result in enumerate(self._search(inputs, ks), start=start):
                assert result.indices is not None
                scores[row, result.indices] = result.scores
        return scores


class GenerationObjective:
    """Predicts every code of every item from all codes before it, the first item from nothing.

    So all prefixes of a history are learned from in one pass. Every epoch cuts each user's training
    rows into windows of ``max_history + 1`` items at a new random offset.
    """

    def __init__(
        self,
        data: Interactions,
        train_N: BoolArray,
        encoder: HistoryEncoder,
        validation: Cases,
        batch_size: int = 64,
        metric: str = "ndcg@10",
    ) -> None:
        self._data, self._encoder, self._validation = data, encoder, validation
        self._batch_size, self._metric = batch_size, metric
        # Training rows of a user are a prefix of the user's rows in every protocol.
        count_U = np.bincount(data.user_N, train_N, len(data.users) + 1).astype(np.int64)
        users = np.flatnonzero(count_U)
        self._first_U = np.searchsorted(data.user_N, users)
        self._end_U = self._first_U + count_U[users]

    def epoch(self, draw: np.random.Generator) -> Sequence[IntArray]:
        """Batches of windows (start, end), shuffled."""
        size = self._encoder.schema.max_history + 1
        length_U = self._end_U - self._first_U
        offset_U = np.where(length_U > size, draw.integers(0, size, len(length_U)), 0)
        windows = []
        for first, end, offset in zip(self._first_U, self._end_U, offset_U, strict=True):
            cuts = np.unique([first, *range(first + offset, end, size), end])
            windows.append(np.stack([cuts[:-1], cuts[1:]], axis=1))
        shuffled = draw.permutation(np.concatenate(windows))
        size = self._batch_size
        return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]

    def loss(self, model: HSTUSemanticIds, plan: IntArray) -> Tensor:
        row_BH = plan[:, :1] + np.arange((plan[:, 1] - plan[:, 0]).max())
        inside_BH = row_BH < plan[:, 1:]
        item_BH = np.where(inside_BH, self._data.item_N[np.minimum(row_BH, plan[:, 1:] - 1)], 0)
        device = model.item_codes.device
        items_BH = torch.from_numpy(item_BH).to(device)
        chosen_BH = items_BH > 0
        levels = len(model.config.levels)
        tokens_BT = model.history_tokens(items_BH)[:, :-1]
        states_BTD = model.states(tokens_BT, levels * chosen_BH.sum(1))
        losses = []
        for level in range(levels):
            # The token before a code is the one that it is predicted from.
            log_probs = model.log_probs(states_BTD[:, level::levels][chosen_BH], level)
            codes = model.item_codes[items_BH[chosen_BH], level].long()
            losses.append(-log_probs.gather(1, codes[:, None]).mean())
        return torch.stack(losses).sum()

    def validate(self, model: HSTUSemanticIds) -> float:
        scorer = GenerationScorer(model, self._encoder, depth=10)
        return evaluate_retrieval(scorer, self._data, self._validation).mean(self._metric)
