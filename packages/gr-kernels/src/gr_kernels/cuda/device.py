"""Launching where a tensor is."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's CUDA device the current one; on the interpreter, whose is the CPU, nothing.

    Triton launches on the current device, wherever its arguments are.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
