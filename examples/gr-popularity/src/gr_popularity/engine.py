"""The engine: computes batches of encoded requests with numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr_core.contracts import (
    Artifact,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
)
from gr_core.errors import PlanError, Unavailable
from gr_core.types import FloatArray, IntArray, Task
from gr_popularity.model import PopularityModel


class PopularityEngine:
    """Implements `gr_core.contracts.Engine`."""

    def __init__(self) -> None:
        self._shares: FloatArray | None = None
        self._best: IntArray = np.empty(0, np.int64)

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        assert isinstance(model, PopularityModel)
        if options.extra:
            raise PlanError(f"engine popularity: unknown option {sorted(options.extra)[0]!r}")
        self._shares = model.shares
        self._best = np.argsort(-model.shares[1:], kind="stable") + 1

    def warm_up(self) -> None:
        """Nothing is compiled or cached."""

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._shares is None:
            raise Unavailable("engine popularity is closed")
        return [self._infer(request, self._shares) for request in batch]

    def _infer(self, request: EncodedRequest, shares: FloatArray) -> InferenceResult:
        if request.task is Task.RETRIEVE:
            best = self._best[: request.k]
            return InferenceResult(shares[best], best)
        return InferenceResult(shares[request.arrays["candidate_items"]][:, None])

    def health(self) -> Health:
        return Health(True) if self._shares is not None else Health(False, "not loaded")

    def close(self) -> None:
        self._shares = None
