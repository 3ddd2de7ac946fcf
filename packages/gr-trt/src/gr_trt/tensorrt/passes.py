"""How a plan computes the answers of one task: parts of a batch at once, or steps on cached K, V.

Shapes: C candidates, D width of a user's representation, O heads of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.collate import collate
from gr_core.contracts import EncodedRequest
from gr_core.steps import CANDIDATE, PAST, SCORES, TOKEN, USER
from gr_core.types import Task
from gr_trt.ensemble import Graph
from gr_trt.execution.grouping import Size
from gr_trt.execution.passes import Answer, parts
from gr_trt.tensorrt.batches import array_sizes, choose, padded, request_sizes, round_up, split
from gr_trt.tensorrt.profiles import BATCH, Profile
from gr_trt.tensorrt.runner import Arrays, Pending, Runner


class SinglePass:
    """Implements `gr_trt.execution.passes.Pass`: everything anew for every request.

    ``independent`` says that no candidate's score depends on the others. Then a request with more
    of them than the profiles take is computed in several parts.
    """

    def __init__(self, runner: Runner, graph: Graph, independent: bool = False) -> None:
        self._runner = runner
        self._graph = graph
        self._independent = independent

    def answers(self, batch: Sequence[EncodedRequest]) -> Sequence[Answer]:
        inputs = self._graph.inputs
        profiles = self._runner.profiles
        pieces = [(row, piece) for row, one in enumerate(batch) for piece in self._pieces(one)]
        requests = [piece for _, piece in pieces]
        sizes = [request_sizes(inputs, request) for request in requests]
        groups = split(sizes, profiles, self._graph.file)
        started: list[Pending] = []
        for part in groups:
            arrays = collate([tensor.spec for tensor in inputs], [requests[i] for i in part.rows])
            full = padded(inputs, arrays, part.sizes)
            started.append(self._runner.start(part.profile, part.sizes, full))
        outputs: dict[int, npt.NDArray[Any]] = {}
        for part, pending in zip(groups, started, strict=True):
            found = pending.result()
            for place, i in enumerate(part.rows):
                outputs[i] = _own(self._graph, found, place, requests[i])
        own: list[list[npt.NDArray[Any]]] = [[] for _ in batch]
        for i, (row, _) in enumerate(pieces):
            own[row].append(outputs[i])
        return [Answer(some[0] if len(some) == 1 else np.concatenate(some)) for some in own]

    def close(self) -> None:
        self._runner.close()

    def _pieces(self, request: EncodedRequest) -> Iterator[EncodedRequest]:
        """The request itself, or with some of its candidates each."""
        profiles = self._runner.profiles
        most = max((p.axes[CANDIDATE].most for p in profiles if CANDIDATE in p.axes), default=0)
        if not self._independent or not most:
            yield request
            return
        for arrays in parts(self._graph, request.arrays, most):
            yield replace(request, arrays=arrays)


class PlanSession:
    """A plan that is run as `gr_trt.onnx_runtime.session.Session` is: batched arrays at once."""

    def __init__(self, runner: Runner, graph: Graph) -> None:
        self._runner = runner
        self._graph = graph

    def run(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name, in the sizes of the feeds."""
        sizes = array_sizes(self._graph.inputs, feeds)
        index = choose(sizes, self._runner.profiles, self._graph.file)
        rounded = round_up(sizes, self._runner.profiles[index])
        full = padded(self._graph.inputs, feeds, rounded)
        outputs = self._runner.start(index, rounded, full).result()
        return {
            tensor.name: outputs[tensor.name][_cut((BATCH, *tensor.axes), sizes)]
            for tensor in self._graph.outputs
        }

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """What fits in a plan's profiles, implements `gr_trt.execution.passes.Limits`."""

    profiles: Sequence[Profile]
    width: int

    def fits(self, count: int, size: Size) -> bool:
        """Of several requests; one alone is tried in any size."""
        history = size.keys - 1
        return any(
            profile.batch >= count
            and all(
                profile.axes[axis].most >= most
                for axis, most in ((PAST, history), (TOKEN, history), (CANDIDATE, size.rows))
                if axis in profile.axes
            )
            for profile in self.profiles
        )

    def candidates_at_once(self, tokens: int, keys: int) -> int:
        """More are scored in several runs."""
        return max(p.axes[CANDIDATE].most for p in self.profiles if CANDIDATE in p.axes)


def _own(graph: Graph, outputs: Arrays, place: int, request: EncodedRequest) -> npt.NDArray[Any]:
    """A request's own part of the outputs of its part, a copy."""
    if request.task is Task.RETRIEVE:
        return outputs[USER][place].copy()
    tensor = next(tensor for tensor in graph.inputs if CANDIDATE in tensor.axes)
    candidates = request.arrays[tensor.name].shape[tensor.axes.index(CANDIDATE)]
    return outputs[SCORES][place, :candidates].copy()


def _cut(axes: Sequence[str | int], sizes: Mapping[str, int]) -> tuple[slice, ...]:
    return tuple(slice(sizes[axis]) if isinstance(axis, str) else slice(None) for axis in axes)
