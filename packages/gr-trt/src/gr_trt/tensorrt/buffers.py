"""Where tensors lie in one block of memory, so that one copy moves them all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gr_trt.ensemble import Tensor
from gr_trt.tensorrt.profiles import shape

ALIGNMENT = 256
"""Bytes, what TensorRT asks of addresses."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of one tensor."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in a block of uint8."""
        part = block[self.offset : self.offset + self.bytes]
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    places: Mapping[str, Place]
    bytes: int


def layout(tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> Layout:
    """Places of tensors at given sizes; larger sizes never take less."""
    places: dict[str, Place] = {}
    end = 0
    for tensor in tensors:
        place = Place(end, shape(tensor, sizes), getattr(torch, tensor.dtype))
        places[tensor.name] = place
        end += max(ALIGNMENT, -(-place.bytes // ALIGNMENT) * ALIGNMENT)
    return Layout(places, end)


def write(block: torch.Tensor, into: Layout, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Copies arrays to their places in a block of host memory, in the tensors' types."""
    for name, place in into.places.items():
        place.view(block).copy_(torch.from_numpy(np.asarray(arrays[name], order="C")))


def read(block: torch.Tensor, where: Layout) -> dict[str, npt.NDArray[Any]]:
    """Copies of the tensors; those of 16 bits as float32."""
    found = {}
    for name, place in where.places.items():
        tensor = place.view(block)
        tensor = tensor.float() if tensor.dtype in _HALVES else tensor.clone()
        found[name] = tensor.numpy()
    return found


_HALVES = (torch.float16, torch.bfloat16)
