"""Optimization profiles: which sizes of a graph's axes a plan is built for.

A profile has a range for the batch and for every jagged axis. TensorRT picks kernels for its
typical sizes and sets memory aside for its largest; a request beyond them cannot be run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gr_core.errors import PlanError
from gr_core.steps import CANDIDATE, PAST, TOKEN
from gr_trt.ensemble import Ensemble, Graph, Role, Tensor
from gr_trt.tensorrt.options import BuildOptions

BATCH, HISTORY, K = "batch", "history", "k"
_TYPICAL_NEW = 8
"""New tokens of a returning user in a decode step."""
_TYPICAL_K = 100


@dataclass(frozen=True, slots=True)
class Range:
    least: int
    typical: int
    most: int

    def within(self, size: int) -> bool:
        return self.least <= size <= self.most


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges by axis, ``batch`` and jagged ones; the name says its largest batch."""

    name: str
    axes: Mapping[str, Range]

    @property
    def batch(self) -> int:
        return self.axes[BATCH].most

    def fits(self, sizes: Mapping[str, int]) -> bool:
        return all(self.axes[axis].most >= size for axis, size in sizes.items())

    def __str__(self) -> str:
        ranges = (f"{axis} {r.least} to {r.most}" for axis, r in self.axes.items())
        return f"{self.name} ({', '.join(ranges)})"

    def as_dict(self) -> dict[str, Any]:
        axes = {axis: [r.least, r.typical, r.most] for axis, r in self.axes.items()}
        return {"name": self.name, "axes": axes}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Profile:
        """The reverse of `as_dict`."""
        axes = {str(axis): Range(*map(int, r)) for axis, r in data["axes"].items()}
        return Profile(str(data["name"]), axes)


def shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape at given sizes of its axes, with the batch if it has one."""
    own = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes)
    return (sizes[BATCH], *own) if tensor.batched else own


def jagged(graph: Graph) -> tuple[str, ...]:
    """Names of the axes whose sizes differ from request to request, in order of appearance."""
    names = [axis for tensor in graph.inputs for axis in tensor.axes if isinstance(axis, str)]
    names += [tensor.name for tensor in graph.inputs if is_k(tensor)]
    return tuple(dict.fromkeys(names))


def is_k(tensor: Tensor) -> bool:
    """Whether an input's value is a size: that of the axis of its name, for the whole batch."""
    return not tensor.batched and tensor.axes == ()


def profiles(ensemble: Ensemble, graph: Graph, options: BuildOptions) -> list[Profile]:
    """One profile for each of ``options.batches``, before they are made to fit in memory.

    Raises `PlanError` for an axis of which the ensemble does not say how long it is.
    """
    ranges = {axis: _range(ensemble, graph, axis, options) for axis in jagged(graph)}
    return [
        Profile(f"batch-{batch}", {BATCH: Range(1, batch, batch), **ranges})
        for batch in options.batches
    ]


def _range(ensemble: Ensemble, graph: Graph, axis: str, options: BuildOptions) -> Range:
    if axis == K:
        most = min(options.max_k, ensemble.catalogue_size)
        return Range(1, min(_TYPICAL_K, most), most)
    lengths = ensemble.axes.get(axis)
    if lengths is None:
        raise PlanError(
            f"graph {graph.name!r} has the axis {axis!r}, of which ensemble.json says no lengths; "
            "export the model to onnx again"
        )
    wanted = {
        HISTORY: options.max_history,
        TOKEN: options.max_history,
        PAST: options.max_history,
        CANDIDATE: options.max_candidates,
    }.get(axis, 0)
    most = max(1, min(lengths.maximum, wanted or lengths.maximum))
    typical = lengths.typical
    if graph.role is Role.DECODE and axis == TOKEN:
        typical = min(typical, _TYPICAL_NEW)
    return Range(1, min(max(1, typical), most), most)


def shrunk(profile: Profile) -> Profile | None:
    """A smaller profile of several requests: shorter ones down to the typical, then fewer.

    None where there is only one request left, which has to be possible at any length.
    """
    if profile.batch == 1:
        return None
    longest = max(
        (axis for axis in profile.axes if axis != BATCH),
        key=lambda axis: profile.axes[axis].most - profile.axes[axis].typical,
        default=BATCH,
    )
    r = profile.axes[longest]
    if longest != BATCH and r.most > r.typical:
        most = max(r.typical, r.most // 2)
        return replace(profile, axes={**profile.axes, longest: Range(r.least, r.typical, most)})
    most = profile.batch // 2
    return Profile(f"batch-{most}", {**profile.axes, BATCH: Range(1, most, most)})


def distinct(found: Sequence[Profile]) -> list[Profile]:
    """Without those that another one covers, which shrinking can lead to."""
    kept: list[Profile] = []
    for profile in found:
        sizes = {axis: r.most for axis, r in profile.axes.items()}
        if not any(other.fits(sizes) and other.batch == profile.batch for other in kept):
            kept.append(profile)
    return kept
