"""Which implementation of an op a machine gets, said once with the reason."""

from __future__ import annotations

import functools
import logging
import os

from gr_core import KernelDescriptor
from gr_core.errors import PlanError
from gr_kernels import native
from gr_kernels.descriptors import KERNELS, NATIVE

logger = logging.getLogger(__name__)

ISA_VARIABLE = "GR_KERNELS_ISA"


def wanted_isa(isa: str = "auto") -> str:
    """``auto``, ``torch``, or an instruction set: as asked for, else as the environment says."""
    return isa if isa != "auto" else os.environ.get(ISA_VARIABLE, "auto")


def choose(op: str, dtype: str, isa: str = "auto") -> KernelDescriptor:
    """The implementation for the CPU of highest priority that is usable here.

    With the instruction set ``torch`` that is none in C++; with one of those that the kernels in
    C++ know, it is one of these. Raises `PlanError` where there is none.
    """
    return _choose(op, dtype, wanted_isa(isa))


def plain_isa(op: str, dtype: str) -> str:
    """The instruction set to use for an op on plain tensors, which bfloat16 may widen to float32.

    Raises `PlanError` for one that is wanted and not here.
    """
    sets = tuple(
        dict.fromkeys((*native.instruction_sets(dtype), *native.instruction_sets("float32")))
    )
    wanted = wanted_isa()
    if wanted in ("auto", "torch"):
        return sets[0]
    if wanted not in sets:
        raise PlanError(
            f"op {op} in {dtype}: the instruction set asked for is {wanted!r}; expected "
            f"auto, torch, or one of this processor's: {', '.join(sets)}"
        )
    return wanted


@functools.cache
def _choose(op: str, dtype: str, isa: str) -> KernelDescriptor:
    passed_over: list[str] = []
    for kernel in sorted(KERNELS, key=lambda kernel: -kernel.priority):
        if kernel.op != op or kernel.device != "cpu":
            continue
        ok, reason = _usable(kernel, dtype, isa)
        if ok:
            others = f"; passed over: {'; '.join(passed_over)}" if passed_over else ""
            logger.info("op %s in %s: %s (%s%s)", op, dtype, kernel.name, reason, others)
            return kernel
        passed_over.append(f"{kernel.name}: {reason}")
    raise PlanError(
        f"op {op} in {dtype} on the instruction set {isa!r} is not to be had: "
        f"{'; '.join(passed_over) or 'there is no such op'}"
    )


def _usable(kernel: KernelDescriptor, dtype: str, isa: str) -> tuple[bool, str]:
    if dtype not in kernel.dtypes:
        return False, f"not in {dtype}, but in {', '.join(kernel.dtypes)}"
    is_native = kernel.name in NATIVE
    if isa != "auto" and is_native == (isa == "torch"):
        return False, f"the instruction set asked for is {isa}"
    return (True, "") if kernel.probe is None else kernel.probe()
