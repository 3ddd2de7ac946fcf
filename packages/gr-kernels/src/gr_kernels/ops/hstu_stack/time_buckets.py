"""Buckets of time gaps, as numbers that code without torch's logarithm can compare with."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

# The public code divides by 0.301, about log10(2), so a bucket is a factor of 1.35 in time.
LOG_BUCKET_WIDTH = 0.301
_LONGEST_GAP = 2**62


@functools.cache
def thresholds(buckets: int) -> npt.NDArray[np.int64]:
    """Least gap in seconds of each bucket but the first, by the formula as torch rounds it."""

    def bucket(gap: int) -> int:
        seconds = torch.tensor([gap]).clamp(min=1).float()
        return int((torch.log(seconds) / LOG_BUCKET_WIDTH).long())

    least = []
    for number in range(1, buckets):
        low, high = 1, _LONGEST_GAP
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if bucket(middle) >= number else (middle + 1, high)
        least.append(low)
    return np.array(least, np.int64)
