"""Which implementation of the op `hstu_stack` a machine gets."""

from __future__ import annotations

from collections.abc import Sequence

from gr_core.stack import Stack
from gr_kernels.choice import choose, wanted_isa
from gr_kernels.ops.hstu_stack.interface import HSTUStack


def make_stack(
    stack: Stack,
    dtype: str = "float32",
    *,
    threads: int = 1,
    isa: str = "auto",
    device: str = "cpu",
    kernels: Sequence[str] = (),
) -> HSTUStack:
    """The best implementation for a device, ``cpu`` or e.g. ``cuda:0``, with weights converted.

    ``isa`` is ``auto``, ``torch``, or an instruction set of the kernels in C++; the environment's
    ``GR_KERNELS_ISA`` stands for ``auto``. ``kernels`` and the environment's ``GR_KERNELS`` name
    implementations to be taken. Raises `PlanError` for what cannot be had.
    """
    kind = device.split(":")[0]
    make = choose("hstu_stack", dtype, isa, device=kind, kernels=kernels).resolve()
    more = {} if kind == "cpu" else {"device": device, "kernels": kernels}
    made: HSTUStack = make(stack, dtype, threads=threads, isa=wanted_isa(isa), **more)
    return made
