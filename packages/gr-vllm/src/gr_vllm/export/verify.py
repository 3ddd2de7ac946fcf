"""A written model directory against the model that it was made of.

Shapes: T tokens, C candidates, A answers, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.collate import collate
from gr_core.contracts import EncodedRequest
from gr_core.errors import GrError
from gr_core.generation import GenerativeModel
from gr_core.parity import TOLERANCE
from gr_core.samples import for_task, sample_requests
from gr_core.stack import StackModel, TokenSequence
from gr_core.tokens import TokenModel
from gr_core.types import Task
from gr_vllm.checkpoint import Role
from gr_vllm.export.reader import Reader, TokensIn
from gr_vllm.quantization import Quantization

TASKS: Mapping[Role, Task] = {
    "retrieval": Task.RETRIEVE,
    "ranking": Task.RANK,
    "generation": Task.GENERATE,
}
ALLOWED: Mapping[Quantization, float] = {
    "none": TOLERANCE["float32"],
    "int8": TOLERANCE["int8"],
    "awq": 0.5,
    "gptq": 0.5,
}
"""Difference of a score, as a part of the largest magnitude of a request's scores."""
_SAMPLES = 6
_LONGEST = 80
_CANDIDATES = 9


@torch.inference_mode()
def verify(folder: Path, model: StackModel) -> float:
    """The largest difference on samples, see `ALLOWED`; raises `GrError` if it is more.

    Where no token sees a later one, each sequence is computed in two passes, the second on the
    keys and values that the first left.
    """
    reader = Reader(folder)
    checkpoint = reader.checkpoint
    compare = _COMPARISONS[checkpoint.role]
    task = TASKS[checkpoint.role]
    worst = 0.0
    for sample in sample_requests(model, _SAMPLES, max_history=_LONGEST, candidates=_CANDIDATES):
        request = model.encode(for_task(sample, task), task).request
        sequence = model.sequence(request)
        if sequence.history + sequence.candidates:
            worst = max(worst, compare(reader, model, request, sequence))
    allowed = ALLOWED[checkpoint.quantization]
    if not worst <= allowed:
        raise GrError(
            f"exporter vllm: what was written of {checkpoint.name} differs from the model by "
            f"{worst:.2g} of the largest score, more than {allowed:g}"
            + (
                f", with quantization {checkpoint.quantization}"
                if checkpoint.quantization != "none"
                else ""
            )
        )
    return worst


def _retrieval(
    reader: Reader, model: StackModel, request: EncodedRequest, sequence: TokenSequence
) -> float:
    assert isinstance(model, TokenModel)
    tokens = _of_ids(reader, model.token_ids(sequence), sequence)
    found_A = reader.scores(_run(reader, tokens)[-1:])[0, 1:]
    user_D = model.module(Task.RETRIEVE)(**_inputs(model, request))[0]
    return _difference(found_A, model.item_table()[1:] @ user_D)


def _ranking(
    reader: Reader, model: StackModel, request: EncodedRequest, sequence: TokenSequence
) -> float:
    rows_CD = _run(reader, _of_rows(model, request, sequence))[sequence.history :]
    (found,) = model.outputs(Task.RANK, [request], rows_CD)
    right = model.module(Task.RANK)(**_inputs(model, request))[0, : sequence.candidates]
    return _difference(found, right)


def _generation(
    reader: Reader, model: StackModel, request: EncodedRequest, sequence: TokenSequence
) -> float:
    """All levels of one item, token after token."""
    assert isinstance(model, GenerativeModel)
    chosen_L = model.item_tokens()[-1]
    history_T = model.token_ids(sequence)[:, 0]
    ids_T = np.concatenate([history_T, chosen_L[:-1]]).astype(np.int32)
    tokens = _causal(reader.embed(torch.from_numpy(ids_T).long()[:, None]))
    passes = [len(history_T) + i for i in range(len(chosen_L))]
    rows_LD = reader.run(tokens, passes)[len(history_T) - 1 :]
    scores_LA = reader.scores(rows_LD)
    worst = 0.0
    for number, level in enumerate(model.levels):
        prefix = torch.from_numpy(chosen_L[None, :number]).long()
        right_A = model.module(Task.GENERATE)(**_inputs(model, request), prefixes=prefix)[0]
        worst = max(worst, _difference(scores_LA[number, level.start : level.stop], right_A))
    return worst


_Comparison = Callable[[Reader, StackModel, EncodedRequest, TokenSequence], float]
_COMPARISONS: Mapping[Role, _Comparison] = {
    "retrieval": _retrieval,
    "ranking": _ranking,
    "generation": _generation,
}


def _run(reader: Reader, tokens: TokensIn) -> Tensor:
    count = len(tokens.x_TD)
    first = count // 3 if reader.checkpoint.causal else 0
    return reader.run(tokens, [first, count] if first else [count])


def _of_ids(reader: Reader, ids: npt.NDArray[np.int32], sequence: TokenSequence) -> TokensIn:
    tokens = _causal(reader.embed(torch.from_numpy(ids.astype(np.int64))))
    return _timed(tokens, sequence)


def _causal(x_TD: Tensor) -> TokensIn:
    places_T = torch.arange(len(x_TD), dtype=torch.int32)
    return TokensIn(x_TD, torch.zeros_like(places_T), places_T)


def _of_rows(model: StackModel, request: EncodedRequest, sequence: TokenSequence) -> TokensIn:
    low_T, high_T = (torch.from_numpy(np.array(a)) for a in (sequence.low, sequence.high))
    groups_T = None if sequence.groups is None else torch.from_numpy(sequence.groups).long()
    x_TD = model.embed([request], [sequence], [0])
    return _timed(TokensIn(x_TD, low_T, high_T, groups_T), sequence)


def _timed(tokens: TokensIn, sequence: TokenSequence) -> TokensIn:
    if sequence.times is None or sequence.next_times is None:
        return tokens
    times_T, next_times_T = (
        torch.from_numpy((a - sequence.times[:1]).astype(np.int32))
        for a in (sequence.times, sequence.next_times)
    )
    return TokensIn(
        tokens.x_TD, tokens.low_T, tokens.high_T, tokens.groups_T, times_T, next_times_T
    )


def _inputs(model: StackModel, request: EncodedRequest) -> dict[str, Any]:
    arrays = collate(model.inputs(request.task), [request])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _difference(found: Tensor, right: Tensor) -> float:
    if found.shape != right.shape:
        return float("inf")
    if not right.numel():
        return 0.0
    difference = float((found - right).abs().max() / right.abs().max().clamp(min=1e-6))
    return difference if np.isfinite(difference) else float("inf")
