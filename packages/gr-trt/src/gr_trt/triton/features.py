"""The first step: requests in JSON become the arrays of a model.

Shapes: B requests of a batch.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.collate import collate
from gr_core.contracts import ArraySpec, EncodedRequest, Model
from gr_core.errors import InvalidRequest, Violation
from gr_core.json_requests import request_of
from gr_core.types import IntArray, RecommendRequest, Task
from gr_core.validation import Limits, violations_of
from gr_trt.triton.layout import ITEMS, SIZES, STATE, State, axes_of

Array = npt.NDArray[Any]

_MAX_BYTES = 64 * 2**20
_SHORTEST = 8
"""Shorter axes are padded to this."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request, ready for the engine and for the answer."""

    request: EncodedRequest
    items: IntArray
    """Catalogue indices: for retrieval those that are excluded, for ranking the candidates."""
    state: State


class Features:
    """Requests of one task of one model. All methods are thread-safe."""

    def __init__(
        self, model: Model, task: Task, specs: Sequence[ArraySpec], longest: Mapping[str, int]
    ) -> None:
        """``specs`` are the arrays to be made, and ``longest``: see `gr_trt.triton.layout.Step`."""
        self._model = model
        self._task = task
        self._specs = specs
        self._longest = longest
        self._axes = axes_of(specs)
        self._limits = Limits()

    def row(self, text: bytes) -> Row:
        """Raises `InvalidRequest`."""
        return self._row(self._checked(_parsed(text)))

    def _row(self, request: RecommendRequest) -> Row:
        encoding = self._model.encode(request, self._task)
        encoded = replace(encoding.request, k=request.k)
        unscored: Sequence[int | str] = ()
        if self._task is Task.RETRIEVE:
            items = _excluded(self._model, request)
            size = len(self._model.catalogue)
            encoded = replace(encoded, k=min(size, request.k + len(items)))
        else:
            assert request.candidates is not None
            items = encoding.candidate_indices
            unscored = request.candidates.item_ids[encoding.unscored].tolist()
            encoded = replace(encoded, k=len(items))
        if violations := self._too_long(encoded):
            raise InvalidRequest(violations)
        state = State(
            request.k,
            request.request_id,
            encoding.unknown_items,
            unscored,
            request.head_weights,
        )
        return Row(encoded, items, state)

    def tensors(self, rows: Sequence[Row]) -> dict[str, Array]:
        """What the next steps are given for rows of one call, (B, …) each."""
        arrays = collate(self._specs, [row.request for row in rows])
        for spec in self._specs:
            arrays[spec.name] = _widened(arrays[spec.name], spec, self._longest)
        sizes = [[row.request.k, row.request.tokens, *self._lengths(row)] for row in rows]
        most = max(1, *(len(row.items) for row in rows))
        items = np.zeros((len(rows), most), np.int64)
        for place, row in zip(items, rows, strict=True):
            place[: len(row.items)] = row.items
        states = np.array([[row.state.text()] for row in rows], np.object_)
        return {**arrays, SIZES: np.array(sizes, np.int64), STATE: states, ITEMS: items}

    def _lengths(self, row: Row) -> Sequence[int]:
        return [_length(self._specs, row.request, axis) for axis in self._axes]

    def _too_long(self, request: EncodedRequest) -> list[Violation]:
        found = []
        for axis, most in self._longest.items():
            length = _length(self._specs, request, axis) if axis in self._axes else 0
            if length > most:
                found.append(
                    Violation(
                        "candidates" if axis == "candidate" else axis,
                        f"{length} known ones, but the graph takes at most {most}; send fewer",
                    )
                )
        return found

    def _checked(self, request: RecommendRequest) -> RecommendRequest:
        """The request with its time and a name. Raises `InvalidRequest`."""
        if found := [*self._misplaced(request), *violations_of(request, self._limits)]:
            raise InvalidRequest(found)
        now = time.time_ns() // 1_000_000
        return replace(
            request,
            request_id=request.request_id or uuid.uuid4().hex,
            request_time_ms=now if request.request_time_ms is None else request.request_time_ms,
        )

    def _misplaced(self, request: RecommendRequest) -> list[Violation]:
        """What a request asks for that is not served under this name."""
        bundle, task, found = self._model.bundle, self._task, []
        for field, value, own in (
            ("model", request.model, bundle.name),
            ("version", request.version, bundle.version),
        ):
            if value not in ("", own):
                found.append(
                    Violation(
                        field, f"{value!r}, but this is {own!r}; leave it out, or ask another model"
                    )
                )
        if request.task not in (None, task):
            found.append(Violation("task", f"{request.task}, but this model can {task.value}"))
        if task is Task.RETRIEVE and request.task is None and request.candidates:
            found.append(Violation("candidates", "given, but this model retrieves; leave them out"))
        if task is Task.RANK and not request.candidates:
            found.append(Violation("candidates", "none given, but there is nothing else to rank"))
        if request.history_handle:
            found.append(Violation("history_handle", "no histories are kept; send it whole"))
        heads = self._model.heads if Task.RANK in self._model.tasks else ()
        listing = ", ".join(heads) or "none, this model does not rank"
        found += [
            Violation(f"head_weights[{name!r}]", f"no such head; there are: {listing}")
            for name in request.head_weights
            if name not in heads
        ]
        return found


def _parsed(text: bytes) -> RecommendRequest:
    if len(text) > _MAX_BYTES:
        raise InvalidRequest(
            [Violation("request", f"{len(text)} bytes, expected at most {_MAX_BYTES}")]
        )
    try:
        return request_of(json.loads(text))
    except RecursionError:
        raise InvalidRequest([Violation("request", "nested too deeply")]) from None
    except ValueError as error:
        raise InvalidRequest([Violation("request", f"is not JSON: {error}")]) from None


def _excluded(model: Model, request: RecommendRequest) -> IntArray:
    """Catalogue indices that may not be retrieved, each once."""
    ids = [request.exclude_item_ids]
    if not request.include_seen:
        ids.append(request.history.item_ids)
    indices = np.unique(np.concatenate([model.catalogue.indices_of(some) for some in ids]))
    return indices[indices > 0]


def _length(specs: Sequence[ArraySpec], request: EncodedRequest, axis: str) -> int:
    spec = next(spec for spec in specs if axis in spec.axes)
    return int(request.arrays[spec.name].shape[spec.axes.index(axis)])


def _widened(array: Array, spec: ArraySpec, longest: Mapping[str, int]) -> Array:
    """Jagged axes padded to a power of two, so that requests of like lengths make a batch."""
    if not spec.axes:
        return array[:, None]
    width = [(0, 0)]
    for axis, size in zip(spec.axes, array.shape[1:], strict=True):
        most = longest.get(axis, 0) if isinstance(axis, str) else 0
        width.append((0, max(0, min(most, max(_SHORTEST, 1 << (size - 1).bit_length())) - size)))
    if not any(after for _, after in width):
        return array
    return np.pad(array, width, constant_values=spec.pad)
