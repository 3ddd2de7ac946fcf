"""The model: requests to arrays, and scores back to answers.

The score of an item is its share of all interactions, between 0 and 1. It does not depend on the
user; the platform leaves out what the user has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gr_core.contracts import ArraySpec, EncodedRequest, Encoding, InferenceResult, PrefixStability
from gr_core.errors import BundleError
from gr_core.repository import Bundle, Catalogue
from gr_core.types import FloatArray, RecommendRequest, Task

HEAD = "recommendation"


class PopularityModel:
    """Implements `gr_core.contracts.Model`; an engine finds the popularity in ``shares``."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.catalogue: Catalogue = bundle.catalogue()
        self.tasks: Sequence[Task] = bundle.tasks
        self.heads: Sequence[str] = (HEAD,)
        self.notes: Sequence[str] = ()
        self.prefix_stability = PrefixStability("none", 0, (), "nothing is computed of it")
        self.shares = _read_shares(bundle, len(self.catalogue))

    def inputs(self, task: Task) -> Sequence[ArraySpec]:
        if task is Task.RANK:
            return (ArraySpec("candidate_items", "int64", ("candidate",)),)
        return ()

    def encode(self, request: RecommendRequest, task: Task) -> Encoding:
        history = self.catalogue.indices_of(request.history.item_ids)
        candidates = np.empty(0, np.int64)
        if request.candidates is not None:
            candidates = self.catalogue.indices_of(request.candidates.item_ids)
        known = candidates[candidates > 0]
        arrays = {"candidate_items": known} if task is Task.RANK else {}
        return Encoding(
            request=EncodedRequest(
                task, arrays, tokens=max(1, len(known)), k=request.k, user_id=request.user_id
            ),
            candidate_indices=known,
            unscored=candidates == 0,
            unknown_items=int(np.count_nonzero(history == 0)),
        )

    def decode(
        self, task: Task, result: InferenceResult, head_weights: Mapping[str, float]
    ) -> tuple[FloatArray, FloatArray]:
        head_scores = result.scores.reshape(-1, 1)
        return head_scores[:, 0] * np.float32(head_weights.get(HEAD, 1.0)), head_scores

    def close(self) -> None:
        """Nothing to free."""


def _read_shares(bundle: Bundle, size: int) -> FloatArray:
    """Popularity by catalogue index, (size + 1,) float32; index 0 is no item."""
    try:
        shares: FloatArray = load_file(bundle.weights_path)["shares"]
    except (OSError, SafetensorError, KeyError) as error:
        raise BundleError(f"{bundle.weights_path}: no array 'shares': {error}") from error
    if shares.dtype != np.float32 or shares.shape != (size + 1,):
        raise BundleError(
            f"{bundle.weights_path}: shares: {shares.dtype} {shares.shape}, expected float32 "
            f"({size + 1},), one for each of {size} items and one before them"
        )
    return shares
