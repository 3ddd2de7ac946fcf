"""The second step in Python: the platform's own engine on the arrays of the first.

Shapes: B requests of a batch, K items found, C candidates, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import ArraySpec, EncodedRequest, Engine, InferenceResult
from gr_core.types import Task
from gr_trt.triton.layout import INDICES, SCORES, SIZES, axes_of

Array = npt.NDArray[Any]


class EngineStep:
    """Gives each request its own lengths back and has the engine compute them all at once."""

    def __init__(self, engine: Engine, task: Task, specs: Sequence[ArraySpec], heads: int) -> None:
        """``specs`` are all inputs of the model, those without elements among them."""
        self._engine = engine
        self._task = task
        self._specs = specs
        self._axes = axes_of([spec for spec in specs if 0 not in spec.axes])
        self._heads = heads

    def requests(self, tensors: Mapping[str, Array]) -> Sequence[EncodedRequest]:
        """The B requests of one call."""
        return [self._request(tensors, row) for row in range(len(tensors[SIZES]))]

    def compute(self, requests: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        """A result for each; nothing is computed where there is nothing to rank."""
        asked = [request for request in requests if request.k]
        found = iter(self._engine.infer(asked) if asked else ())
        none = InferenceResult(np.empty((0, self._heads), np.float32))
        return [next(found) if request.k else none for request in requests]

    def tensors(self, results: Sequence[InferenceResult]) -> dict[str, Array]:
        """Results of one call: scores (B, K) and indices (B, K), or scores (B, C, H)."""
        most = max(1, *(len(result.scores) for result in results))
        width = () if self._task is Task.RETRIEVE else (self._heads,)
        scores = np.zeros((len(results), most, *width), np.float32)
        indices = np.zeros((len(results), most), np.int64)
        for row, result in enumerate(results):
            scores[row, : len(result.scores)] = result.scores
            if result.indices is not None:
                indices[row, : len(result.indices)] = result.indices
        if self._task is Task.RETRIEVE:
            return {SCORES: scores, INDICES: indices}
        return {SCORES: scores}

    def _request(self, tensors: Mapping[str, Array], row: int) -> EncodedRequest:
        k, tokens, *lengths = tensors[SIZES][row].tolist()
        length = dict(zip(self._axes, lengths, strict=True))
        arrays = {}
        for spec in self._specs:
            if 0 in spec.axes:
                shape = [a if isinstance(a, int) else length.get(a, 0) for a in spec.axes]
                arrays[spec.name] = np.empty(shape, spec.dtype)
            elif spec.axes:
                place = tuple(
                    slice(length[a]) if isinstance(a, str) else slice(None) for a in spec.axes
                )
                arrays[spec.name] = tensors[spec.name][row][place]
            else:
                arrays[spec.name] = tensors[spec.name][row].reshape(())
        return EncodedRequest(self._task, arrays, tokens, k)
