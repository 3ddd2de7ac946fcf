"""The last step: from what the engine gave to the answer in JSON.

Shapes: B requests of a batch, D width of a user's representation, K items found, C candidates,
H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gr_core.contracts import InferenceResult, Model
from gr_core.steps import USER
from gr_core.types import FloatArray, IntArray, Task
from gr_trt.triton.layout import INDICES, ITEMS, SCORES, STATE, State

Array = npt.NDArray[Any]


class TopK(Protocol):
    """The graph that finds items for users, see `gr_trt.ensemble.Role.TOP_K`."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]: ...


class Answers:
    """Answers of one task of one model. All methods are thread-safe."""

    def __init__(self, model: Model, task: Task, engine: str, top_k: TopK | None = None) -> None:
        """``top_k`` where the engine gives representations of users rather than items."""
        self._model = model
        self._task = task
        self._top_k = top_k
        self._stage = {
            "task": task.value,
            "model": model.bundle.name,
            "version": model.bundle.version,
            "engine": engine,
        }

    def texts(self, tensors: Mapping[str, Array]) -> Sequence[bytes]:
        """Answers to the B requests of one call."""
        states = [State.of(text) for text in tensors[STATE][:, 0]]
        items = [row[row > 0] for row in tensors[ITEMS]]
        if self._task is Task.RANK:
            results: Sequence[InferenceResult] = [
                InferenceResult(scores[: len(candidates)].astype(np.float32, copy=False))
                for scores, candidates in zip(tensors[SCORES], items, strict=True)
            ]
        elif self._top_k is None:
            found = zip(tensors[SCORES], tensors[INDICES], strict=True)
            results = [InferenceResult(scores[of > 0], of[of > 0]) for scores, of in found]
        else:
            results = self._found(self._top_k, tensors[USER], states, items)
        return [self._text(*row) for row in zip(states, items, results, strict=True)]

    def _found(
        self,
        top_k: TopK,
        users_BD: Array,
        states: Sequence[State],
        excluded: Sequence[IntArray],
    ) -> Sequence[InferenceResult]:
        size = len(self._model.catalogue)
        wanted = [min(size, s.k + len(none)) for s, none in zip(states, excluded, strict=True)]
        best = top_k.run({USER: users_BD, "k": np.array(max(wanted), np.int64)})
        return [
            InferenceResult(best[SCORES][row, :k], best[INDICES][row, :k])
            for row, k in enumerate(wanted)
        ]

    def _text(self, state: State, items: IntArray, result: InferenceResult) -> bytes:
        scores, heads = self._model.decode(self._task, result, state.head_weights)
        if self._task is Task.RETRIEVE:
            assert result.indices is not None
            passed_over = np.zeros(len(self._model.catalogue) + 1, np.bool_)
            passed_over[items] = True
            (best,) = (~passed_over[result.indices]).nonzero()
            best = best[: state.k]
            return self._composed(state, result.indices[best], scores[best], None)
        best = np.argsort(-scores, kind="stable")[: state.k]
        return self._composed(state, items[best], scores[best], heads[best])

    def _composed(
        self, state: State, indices: IntArray, scores: FloatArray, heads: FloatArray | None
    ) -> bytes:
        catalogue, names = self._model.catalogue, self._model.heads
        by_head: Sequence[Mapping[str, float]] = [{}] * len(indices)
        if heads is not None:
            by_head = [dict(zip(names, row, strict=True)) for row in heads.tolist()]
        rows = zip(
            catalogue.ids_of(indices).tolist(),
            map(catalogue.title, indices.tolist()),
            scores.tolist(),
            by_head,
            strict=True,
        )
        answer = {
            "request_id": state.request_id,
            "items": [
                {"item_id": item, "title": title, "score": score, "head_scores": head_scores}
                for item, title, score, head_scores in rows
            ],
            "stages": [self._stage],
            "unknown_items": state.unknown_items,
            "unscored_item_ids": state.unscored,
        }
        return json.dumps(answer, ensure_ascii=False).encode()
