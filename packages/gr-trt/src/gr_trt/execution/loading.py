"""What engines do alike: open a folder of graphs, find room for K and V, give answers back.

Shapes: B requests, D width of a user's representation, K items wanted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import (
    Artifact,
    BlockCache,
    BlockSpace,
    EncodedRequest,
    InferenceResult,
    Model,
)
from gr_core.errors import BundleError
from gr_core.steps import SteppedModel
from gr_core.types import FloatArray, IntArray, Task
from gr_trt.ensemble import Ensemble, Graph, Role
from gr_trt.execution.pages import BLOCK_TOKENS, Pages
from gr_trt.execution.passes import Answer

Search = Callable[[npt.NDArray[Any], int], tuple[FloatArray, IntArray]]
"""From users (B, D) and K to scores (B, K), best first, and catalogue indices (B, K)."""


def open_folder(artifact: Artifact, model: Model, dtype: str) -> Ensemble:
    """What the folder holds; it must be of this very bundle, in the precision that is asked for."""
    ensemble = Ensemble.read(artifact.path)
    if ensemble.identity != model.bundle.identity.hex():
        raise BundleError(
            f"{artifact.path}: made of {ensemble.model}/{ensemble.version} with other files than "
            f"{model.bundle.name}/{model.bundle.version} has now; export the model again"
        )
    if ensemble.dtype != dtype:
        raise BundleError(
            f"{artifact.path}: made in {ensemble.dtype}, asked for {dtype}; "
            f"export the model again with --precision {dtype}"
        )
    return ensemble


def needed(artifact: Artifact, ensemble: Ensemble, role: Role, task: Task) -> Graph:
    """The graph of a role for a task. Raises `BundleError` where there is none."""
    if (graph := ensemble.graph(role, task)) is not None:
        return graph
    raise BundleError(
        f"{artifact.path}: has no graph {role.value} for {task.value}, only "
        f"{', '.join(g.name for g in ensemble.graphs)}; export the model again"
    )


def kv_space(
    cache: BlockCache, model: SteppedModel, task: Task, pages: Pages, *made_by: object
) -> BlockSpace:
    """Room for K and V of a loaded model, which depend on what computes them too: ``made_by``."""
    layers, heads, columns = pages.keys
    width = heads * (columns + pages.values[2])
    stack = model.stack(task)
    digest = hashlib.blake2b(model.bundle.identity, digest_size=32)
    digest.update(f"|{made_by}|{pages.dtype}|{layers}|{BLOCK_TOKENS}|".encode())
    if "int8" in made_by or model.bundle.source is not None:
        # Calibration, or weights from elsewhere, may change without a trace in the bundle.
        digest.update(os.urandom(32))
    return cache.space(
        digest.digest(),
        block_tokens=BLOCK_TOKENS,
        block_bytes=pages.block_bytes,
        # Multiplications of one layer: projections, and scores with their values.
        token_cost=2.0 * width * stack.d_model + stack.layers[0].output_weight.numel(),
        pair_cost=float(width),
    )


def results(
    batch: Sequence[EncodedRequest], answers: Sequence[Answer], search: Search | None
) -> Sequence[InferenceResult]:
    """What is given back for a batch of one task."""
    if batch[0].task is not Task.RETRIEVE:
        return [InferenceResult(answer.output, tokens_reused=answer.reused) for answer in answers]
    assert search is not None
    users_BD = np.stack([answer.output for answer in answers])
    scores_BK, indices_BK = search(users_BD, max(request.k for request in batch))
    return [
        InferenceResult(scores_BK[row, : request.k], indices_BK[row, : request.k], answer.reused)
        for row, (request, answer) in enumerate(zip(batch, answers, strict=True))
    ]
