"""From requests to parts of a batch that fit in a plan's profiles, and to padded arrays.

Sizes are rounded up, so that shapes repeat and their CUDA graphs can be replayed: by at most an
eighth. Rows that rounding adds to a batch repeat the last request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import EncodedRequest
from gr_core.errors import FailedPrecondition
from gr_trt.ensemble import Tensor
from gr_trt.tensorrt.profiles import BATCH, Profile, Range, is_k, shape

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Requests that are computed together."""

    profile: int
    rows: tuple[int, ...]
    """Which requests of the batch."""
    sizes: Sizes
    """Of the batch and of the jagged axes, rounded up."""


def request_sizes(inputs: Sequence[Tensor], request: EncodedRequest) -> dict[str, int]:
    """Sizes of the jagged axes of one request; an empty one is padded to 1."""
    sizes: dict[str, int] = {}
    for tensor in inputs:
        shape = request.arrays[tensor.name].shape
        for axis, size in zip(tensor.axes, shape, strict=True):
            if isinstance(axis, str):
                sizes[axis] = max(1, size)
    return sizes


def split(requests: Sequence[Sizes], profiles: Sequence[Profile], plan: str) -> list[Part]:
    """Parts of a batch, requests of like sizes together, as few as the profiles allow.

    Raises `FailedPrecondition` that names the profiles for a request that fits in none.
    """
    for sizes in requests:
        choose({BATCH: 1, **sizes}, profiles, plan)
    # The largest first: what follows is padded to no more than what is there already.
    order = sorted(range(len(requests)), key=lambda row: -sum(requests[row].values()))
    parts: list[Part] = []
    rows: list[int] = []
    most: dict[str, int] = {}
    for row in order:
        larger = _larger(most, requests[row])
        if rows and _profile({BATCH: len(rows) + 1, **larger}, profiles) is None:
            parts.append(_part(rows, most, profiles))
            rows, larger = [], dict(requests[row])
        rows, most = [*rows, row], larger
    if rows:
        parts.append(_part(rows, most, profiles))
    return parts


def choose(sizes: Sizes, profiles: Sequence[Profile], plan: str) -> int:
    """The number of the profile to run sizes with. Raises `FailedPrecondition` for none."""
    index = _profile(sizes, profiles)
    if index is None:
        raise FailedPrecondition(_too_large(sizes, profiles, plan))
    return index


def round_up(sizes: Sizes, profile: Profile) -> dict[str, int]:
    """To sizes that repeat, within a profile."""
    return {axis: rounded_up(size, profile.axes[axis]) for axis, size in sizes.items()}


def _part(rows: Sequence[int], most: Sizes, profiles: Sequence[Profile]) -> Part:
    sizes = {BATCH: len(rows), **most}
    index = _profile(sizes, profiles)
    assert index is not None
    return Part(index, tuple(rows), round_up(sizes, profiles[index]))


def _profile(sizes: Sizes, profiles: Sequence[Profile]) -> int | None:
    """The one of the smallest batch that fits, whose kernels were chosen for sizes like these."""
    fitting = [i for i, profile in enumerate(profiles) if profile.fits(sizes)]
    return min(fitting, key=lambda i: profiles[i].batch, default=None)


def _larger(one: Sizes, other: Sizes) -> dict[str, int]:
    return {axis: max(size, one.get(axis, 0)) for axis, size in other.items()}


def rounded_up(size: int, within: Range) -> int:
    """To eighths of a power of two: 1 to 16 as they are, 17 to 18, 33 to 36, 65 to 72, …"""
    size = max(size, within.least)
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return min(-(-size // step) * step, within.most)


def _too_large(sizes: Sizes, profiles: Sequence[Profile], plan: str) -> str:
    said = {axis: size for axis, size in sizes.items() if axis != BATCH or size > 1}
    found = ", ".join(f"{axis} {size}" for axis, size in said.items())
    axes = {axis: max(profile.axes[axis].most for profile in profiles) for axis in profiles[0].axes}
    beyond = [axis for axis, size in sizes.items() if size > axes[axis]]
    what = "batch" if sizes.get(BATCH, 1) > 1 else "request"
    options = " ".join(
        f"--option {option}={sizes[axis]}"
        for axis, option in (("history", "max_history"), ("candidate", "max_candidates"))
        if axis in beyond
    )
    remedy = f"export the model again with {options}" if options else "export the model again"
    return (
        f"a {what} of {found} fits in no profile of {plan}: {'; '.join(map(str, profiles))}; "
        f"send a smaller one, or {remedy}"
    )


def padded(
    inputs: Sequence[Tensor], arrays: Mapping[str, npt.NDArray[Any]], sizes: Sizes
) -> dict[str, npt.NDArray[Any]]:
    """Batched arrays in larger sizes: jagged axes padded, the last row repeated."""
    full = {}
    for tensor in inputs:
        array = arrays[tensor.name]
        if tensor.batched:
            wanted = shape(tensor, sizes)
            more = [(0, w - h) for w, h in zip(wanted[1:], array.shape[1:], strict=True)]
            if any(after for _, after in more):
                pad = np.asarray(tensor.pad, array.dtype)
                array = np.pad(array, [(0, 0), *more], constant_values=pad)
            if wanted[0] > len(array):
                array = np.concatenate([array, np.repeat(array[-1:], wanted[0] - len(array), 0)])
        full[tensor.name] = array
    return full


def array_sizes(inputs: Sequence[Tensor], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Sizes of the batch and of the jagged axes of batched arrays."""
    sizes: dict[str, int] = {}
    for tensor in inputs:
        array = arrays[tensor.name]
        if is_k(tensor):
            sizes[tensor.name] = int(array)
            continue
        axes = (BATCH, *tensor.axes) if tensor.batched else tensor.axes
        for axis, size in zip(axes, array.shape, strict=True):
            if isinstance(axis, str):
                sizes[axis] = size
    return sizes
