"""Models whose layers can be had in steps, as torch modules: what graphs are compiled from.

`gr_core.stack` opens a model's layers to engines that bring kernels of their own. A `SteppedModel`
goes one step further: the whole way from ids of tokens to answers, as modules with plain tensor
inputs that a compiler (ONNX, TensorRT) can take. A *prefill* step computes the history; a *decode*
step computes what comes after it, new behaviours and candidates, against given K and V.

Shapes: T tokens given, P tokens cached, N = P + T tokens of the history, C candidates, M layers,
H heads, K columns of Q and K per head, V columns of V per head, D width of a user's
representation, O heads of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from gr_core.contracts import ArraySpec, EncodedRequest
from gr_core.stack import StackModel, TokenSequence
from gr_core.types import Task

TOKEN, PAST, CANDIDATE = "token", "past", "candidate"
"""Jagged axes of a step's inputs and outputs."""
PAST_KEYS, PAST_VALUES, PAST_LENGTHS = "past_keys", "past_values", "past_lengths"
KEYS, VALUES, SCORES, USER = "keys", "values", "scores", "user"


@dataclass(frozen=True, slots=True)
class Step:
    """A torch module, in eval mode, float32, on the CPU, with what it takes and gives.

    ``module(**inputs)`` takes the inputs by name with a leading batch axis, jagged axes padded on
    the right as `gr_core.collate.collate` does, and returns a tuple in the order of ``outputs``,
    with a leading batch axis each. Cached K and V may be padded by anything whose products are
    finite. Outputs at padded places are arbitrary but finite. What it computes for one row depends
    on nothing else in the batch, and not on the padding.
    """

    module: Any
    inputs: tuple[ArraySpec, ...]
    """In the order of the module's parameters; the outputs depend on each one. Those of a decode
    step begin with ``past_keys`` float32 (M, P, H, K), ``past_values`` float32 (M, P, H, V), and
    ``past_lengths`` int32 (), the P of this request."""
    outputs: tuple[ArraySpec, ...]
    """``keys`` (M, T, H, K) and ``values`` (M, T, H, V) of the given tokens, float32, and before
    them the answer, see `SteppedModel`."""


@runtime_checkable
class SteppedModel(StackModel, Protocol):
    """A model that offers its steps. All methods are thread-safe."""

    def prefill_step(self, task: Task) -> Step:
        """A whole history without candidates; all its tokens are given.

        For `Task.RETRIEVE` the first output is ``user`` (D,), the user's representation after the
        last token, zeros without any. Raises `PlanError` where the layers cannot be had in steps.
        """
        ...

    def decode_step(self, task: Task) -> Step:
        """Tokens of a history after given K and V, and candidates.

        T and P may be 0 of a request (padded to at least 1). The first output is ``user`` (D,) for
        `Task.RETRIEVE`, and ``scores`` (C, O), as the module of the task gives, for `Task.RANK`.
        Where `TokenSequence.candidates` is 0, the answer is read from the last token of the
        history, which has to be among the given ones if there is any. Raises `PlanError` where
        the layers cannot be had in steps.
        """
        ...

    def step_arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        """Inputs of a step for one request, without padding and without the K and V.

        The tokens are those of the history from ``start`` on. It has every input of the prefill
        and of the decode step of ``request.task`` but ``past_keys`` and ``past_values``;
        ``past_lengths`` is ``start``.
        """
        ...
