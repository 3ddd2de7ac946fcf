"""How the answers of one task are computed: in a single pass, or in steps on cached K and V.

Shapes: B requests of a group, M layers, P cached tokens, T new ones, N tokens of a history,
C candidates, H heads, K columns of K per head, V columns of V per head, D width of a user,
O heads of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gr_core.collate import collate
from gr_core.contracts import BlockLease, BlockSpace, EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.steps import (
    CANDIDATE,
    KEYS,
    PAST_KEYS,
    PAST_VALUES,
    SCORES,
    USER,
    VALUES,
    SteppedModel,
)
from gr_core.types import Task
from gr_trt.ensemble import Graph
from gr_trt.execution.grouping import Size, grouped
from gr_trt.execution.pages import Pages

Array = npt.NDArray[Any]

_SCORE_BYTES = 3 * 4
"""A score of the attention: itself, activated, masked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a graph says of one request."""

    output: Array
    """``scores`` (C, O), or ``user`` (D,)."""
    reused: int = 0
    """Tokens whose K and V were there."""


class Pass(Protocol):
    """Computes batches of one task."""

    def answers(self, batch: Sequence[EncodedRequest]) -> Sequence[Answer]: ...

    def close(self) -> None: ...


class GraphSession(Protocol):
    """Runs one graph."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name for batched arrays of the declared types."""
        ...


class Limits(Protocol):
    """What may be computed at once."""

    @property
    def width(self) -> int:
        """Of the model, to weigh projections against attention."""
        ...

    def fits(self, count: int, size: Size) -> bool:
        """Whether so many requests may be, padded to a size."""
        ...

    def candidates_at_once(self, tokens: int, keys: int) -> int:
        """How many candidates may be scored beside ``tokens`` of their history."""
        ...


@dataclass(frozen=True, slots=True)
class Workspace:
    """`Limits` of memory for attention scores."""

    width: int
    """Of the model, to weigh projections against attention."""
    heads: int
    workspace_bytes: int

    def fits(self, count: int, size: Size) -> bool:
        return count * self.score_bytes(size) <= self.workspace_bytes

    def score_bytes(self, size: Size) -> int:
        return _SCORE_BYTES * self.heads * size.rows * size.keys

    def candidates_at_once(self, tokens: int, keys: int) -> int:
        """How many candidates may be scored beside ``tokens`` of their history."""
        rows = self.workspace_bytes // (_SCORE_BYTES * self.heads * max(1, keys))
        return int(max(64, rows - tokens))


class SinglePass:
    """For models whose layers do not go in steps: everything anew for every request."""

    def __init__(self, session: GraphSession, graph: Graph, limits: Limits) -> None:
        self._session = session
        self._specs = [tensor.spec for tensor in graph.inputs]
        self._limits = limits

    def answers(self, batch: Sequence[EncodedRequest]) -> Sequence[Answer]:
        sizes = [Size(request.tokens, request.tokens) for request in batch]
        found: dict[int, Answer] = {}
        for group in grouped(sizes, self._limits.width, self._limits.fits):
            outputs = self._session.run(collate(self._specs, [batch[i] for i in group]))
            for row, i in enumerate(group):
                found[i] = Answer(_own(outputs, row, batch[i]))
        return [found[i] for i in range(len(batch))]

    def close(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One request on its way through a decode graph."""

    request: EncodedRequest
    sequence: TokenSequence
    lease: BlockLease | None
    start: int

    @property
    def size(self) -> Size:
        new = self.sequence.history - self.start
        return Size(new + _candidates(self.request), self.sequence.history + 1)


class Stepped:
    """New tokens and candidates against what is cached, which may be nothing."""

    def __init__(
        self,
        model: SteppedModel,
        session: GraphSession,
        graph: Graph,
        pages: Pages,
        space: BlockSpace | None,
        limits: Limits,
    ) -> None:
        self._model = model
        self._session = session
        self._graph = graph
        self._pages = pages
        self._space = space
        self._limits = limits
        self._specs = [
            tensor.spec for tensor in graph.inputs if tensor.name not in (PAST_KEYS, PAST_VALUES)
        ]

    def answers(self, batch: Sequence[EncodedRequest]) -> Sequence[Answer]:
        works: list[_Work] = []
        found: dict[int, Answer] = {}
        try:
            for request in batch:
                works.append(self._acquire(request))
            sizes = [work.size for work in works]
            for group in grouped(sizes, self._limits.width, self._limits.fits):
                outputs = self._compute([works[i] for i in group])
                for i, output in zip(group, outputs, strict=True):
                    found[i] = Answer(output, works[i].start)
        finally:
            for work in works:
                if work.lease is not None:
                    work.lease.release()
        return [found[i] for i in range(len(batch))]

    def close(self) -> None:
        if self._space is not None:
            self._space.close()

    def _acquire(self, request: EncodedRequest) -> _Work:
        sequence = self._model.sequence(request)
        n = sequence.history
        lease = None
        if self._space is not None and n:
            # Where the last token's output is the answer, it has to be computed.
            reusable = max(0, min(sequence.reusable, n if sequence.candidates else n - 1))
            lease = self._space.acquire(sequence.salt, sequence.content, reusable, request.user_id)
        return _Work(request, sequence, lease, min(lease.reused, n) if lease is not None else 0)

    def _compute(self, group: Sequence[_Work]) -> Sequence[Array]:
        if len(group) == 1:
            return [self._compute_one(group[0])]
        arrays = [self._arrays(work, work.start) for work in group]
        outputs = self._run(group, arrays)
        for row, work in enumerate(group):
            self._keep(work, outputs, row)
        return [_own(outputs, row, work.request) for row, work in enumerate(group)]

    def _compute_one(self, work: _Work) -> Array:
        """A request alone, its candidates in several runs if there are too many (M-FALCON)."""
        n = work.sequence.history
        arrays = self._arrays(work, work.start)
        at_once = self._limits.candidates_at_once(n - work.start, n + 1)
        pieces = list(parts(self._graph, arrays, at_once))
        outputs = self._run([work], [pieces[0]])
        self._keep(work, outputs, 0)
        if len(pieces) == 1:
            return _own(outputs, 0, work.request)
        # The others see the whole history, whose new tokens the first run has computed. Where
        # candidates do not go through the layers, the last token's output is what scores them.
        start = n if work.sequence.candidates else max(0, n - 1)
        past = self._past([work])
        past = tuple(  # type: ignore[assignment]
            np.concatenate(
                [cached[:, :, : work.start], outputs[name][:, :, : start - work.start]], axis=2
            )
            for cached, name in zip(past, (KEYS, VALUES), strict=True)
        )
        scores = [outputs[SCORES][0]]
        for piece in list(parts(self._graph, self._arrays(work, start), at_once))[1:]:
            scores.append(self._run([work], [piece], past)[SCORES][0])
        return np.concatenate(scores)[: _candidates(work.request)]

    def _arrays(self, work: _Work, start: int) -> Mapping[str, Array]:
        return self._model.step_arrays(work.request, work.sequence, start)

    def _run(
        self,
        group: Sequence[_Work],
        arrays: Sequence[Mapping[str, Array]],
        past: tuple[Array, Array] | None = None,
    ) -> Mapping[str, Array]:
        given = [
            EncodedRequest(work.request.task, one, 0)
            for work, one in zip(group, arrays, strict=True)
        ]
        keys, values = self._past(group) if past is None else past
        feeds = collate(self._specs, given) | {PAST_KEYS: keys, PAST_VALUES: values}
        return self._session.run(feeds)

    def _past(self, group: Sequence[_Work]) -> tuple[Array, Array]:
        """K (B, M, P, H, K) and V (B, M, P, H, V), zeros where padded."""
        longest = max(1, *(work.start for work in group))
        pages, count = self._pages, len(group)
        (layers, *keys), (_, *values) = pages.keys, pages.values
        keys_BMPHK = np.zeros((count, layers, longest, *keys), pages.dtype)
        values_BMPHV = np.zeros((count, layers, longest, *values), pages.dtype)
        for row, work in enumerate(group):
            if work.lease is not None:
                pages.read(work.lease, keys_BMPHK[row], values_BMPHV[row], work.start)
        return keys_BMPHK, values_BMPHV

    def _keep(self, work: _Work, outputs: Mapping[str, Array], row: int) -> None:
        """Publishes the K and V of new tokens that hold for later requests too."""
        n = work.sequence.history
        stable = min(work.sequence.reusable, n)
        if work.lease is None or stable <= work.start:
            return
        new = stable - work.start
        keys, values = (outputs[name][row][:, :new] for name in (KEYS, VALUES))
        self._pages.write(work.lease, keys, values, work.start)
        work.lease.commit(stable)


def parts(graph: Graph, arrays: Mapping[str, Array], at_once: int) -> Iterator[Mapping[str, Array]]:
    """The inputs of one request, its candidates a few at a time."""
    jagged = {t.name: t.axes.index(CANDIDATE) for t in graph.inputs if CANDIDATE in t.axes}
    total = max((arrays[name].shape[axis] for name, axis in jagged.items()), default=0)
    for start in range(0, max(1, total), at_once):
        cut = slice(start, start + at_once)
        yield {
            name: array[(*(slice(None),) * jagged[name], cut)] if name in jagged else array
            for name, array in arrays.items()
        }


def _candidates(request: EncodedRequest) -> int:
    items = request.arrays.get("candidate_items")
    return 0 if items is None else len(items)


def _own(outputs: Mapping[str, Array], row: int, request: EncodedRequest) -> Array:
    """A request's own part of its group's outputs."""
    if request.task is Task.RETRIEVE:
        return outputs[USER][row]
    return outputs[SCORES][row, : _candidates(request)]
