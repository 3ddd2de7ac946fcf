"""Which implementation of an op a machine gets, said once with the reason."""

from __future__ import annotations

import functools
import logging
import os

from gr_core import KernelDescriptor
from gr_kernels.descriptors import KERNELS

logger = logging.getLogger(__name__)


def choose(op: str, dtype: str) -> KernelDescriptor:
    """The implementation of highest priority that is usable here. Raises `PlanError` if none is."""
    return _choose(op, dtype, os.environ.get("GR_KERNELS_ISA", "auto"))


@functools.cache
def _choose(op: str, dtype: str, isa: str) -> KernelDescriptor:
    del isa
    return next(
        k for k in sorted(KERNELS, key=lambda k: -k.priority) if k.op == op and dtype in k.dtypes
    )
