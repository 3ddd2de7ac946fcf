"""Which implementation of the op `hstu_stack` a machine gets."""

from __future__ import annotations

from gr_core.stack import Stack
from gr_kernels.choice import choose, wanted_isa
from gr_kernels.ops.hstu_stack.interface import HSTUStack


def make_stack(
    stack: Stack, dtype: str = "float32", *, threads: int = 1, isa: str = "auto"
) -> HSTUStack:
    """The best implementation for this processor, with the weights converted.

    ``isa`` is ``auto``, ``torch``, or an instruction set of the kernels in C++; the environment's
    ``GR_KERNELS_ISA`` stands for ``auto``. Raises `PlanError` for what cannot be had.
    """
    made: HSTUStack = choose("hstu_stack", dtype, isa).resolve()(
        stack, dtype, threads=threads, isa=wanted_isa(isa)
    )
    return made
