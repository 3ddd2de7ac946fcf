"""Which implementation of the op `hstu_stack` a machine gets."""

from __future__ import annotations

from gr_core.stack import Stack
from gr_kernels.ops.hstu_stack.interface import HSTUStack


def make_stack(
    stack: Stack, dtype: str = "float32", *, threads: int = 1, isa: str = "auto"
) -> HSTUStack:
    """The stack on the kernels of the instruction set ``isa``: ``auto``, ``torch``, or a name."""
    from gr_kernels.ops.hstu_stack.reference import TorchStack

    return TorchStack(stack, dtype)
