"""Batches for engines that pad: named arrays of several requests as one array each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.contracts import ArraySpec, EncodedRequest


def collate(
    specs: Sequence[ArraySpec], batch: Sequence[EncodedRequest]
) -> dict[str, npt.NDArray[Any]]:
    """Arrays with a leading batch axis, jagged axes padded on the right to the longest.

    A jagged axis has at least length 1, so that kernels never see an empty one.
    """
    return {
        spec.name: _stack(spec, [request.arrays[spec.name] for request in batch]) for spec in specs
    }


def _stack(spec: ArraySpec, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    shape = [
        axis if isinstance(axis, int) else max(1, *(a.shape[i] for a in arrays))
        for i, axis in enumerate(spec.axes)
    ]
    out = np.full((len(arrays), *shape), spec.pad, spec.dtype)
    for row, array in enumerate(arrays):
        place: tuple[int | slice, ...] = (row, *(slice(n) for n in array.shape))
        out[place] = array
    return out
