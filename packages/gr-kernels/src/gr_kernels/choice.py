"""Which implementation of an op a machine gets, said once with the reason."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence

from gr_core import KernelDescriptor
from gr_core.errors import PlanError
from gr_kernels import native
from gr_kernels.descriptors import KERNELS, NATIVE
from gr_kernels.tuning import measured

logger = logging.getLogger(__name__)

ISA_VARIABLE = "GR_KERNELS_ISA"
KERNELS_VARIABLE = "GR_KERNELS"


def wanted_isa(isa: str = "auto") -> str:
    """``auto``, ``torch``, or an instruction set: as asked for, else as the environment says."""
    return isa if isa != "auto" else os.environ.get(ISA_VARIABLE, "auto")


def wanted_kernels(kernels: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of implementations: as asked for, else as the environment says, by commas.

    Raises `PlanError` for a name that there is not.
    """
    names = tuple(kernels) or tuple(filter(None, os.environ.get(KERNELS_VARIABLE, "").split(",")))
    known = {kernel.name for kernel in KERNELS}
    for name in names:
        if name not in known:
            raise PlanError(f"there is no kernel {name!r}; there are: {', '.join(sorted(known))}")
    return names


def choose(
    op: str,
    dtype: str,
    isa: str = "auto",
    *,
    device: str = "cpu",
    sizes: Mapping[str, int] | None = None,
    kernels: Sequence[str] = (),
) -> KernelDescriptor:
    """The implementation for a device, ``cpu`` or ``cuda``, that is usable here.

    If one of the ``kernels`` is of this op, it is that one. Else it is the one that was measured
    to be fastest for the ``sizes`` on this GPU (`gr_kernels.tuning`), else the one of highest
    priority. With the instruction set ``torch`` that is none in C++; with one of those that the
    kernels in C++ know, it is one of these. Raises `PlanError` where there is none.
    """
    names = wanted_kernels(kernels)
    of_op = [kernel.name for kernel in KERNELS if kernel.op == op]
    name = next((name for name in names if name in of_op), "")
    key = tuple(sorted(sizes.items())) if sizes else ()
    return _choose(op, dtype, wanted_isa(isa), device, key, name)


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
def _choose(
    op: str, dtype: str, isa: str, device: str, sizes: tuple[tuple[str, int], ...], name: str
) -> KernelDescriptor:
    usable: list[tuple[float, KernelDescriptor, str]] = []
    passed_over: list[str] = []
    for kernel in sorted(KERNELS, key=lambda kernel: -kernel.priority):
        if kernel.op != op or kernel.device not in (device, "any"):
            continue
        if name and kernel.name != name:
            continue
        ok, reason = _usable(kernel, dtype, isa, dict(sizes))
        if not ok:
            passed_over.append(f"{kernel.name}: {reason}")
            continue
        took = measured(kernel.name, dtype, dict(sizes)) if device == "cuda" else None
        usable.append((math.inf if took is None else took, kernel, reason))
    if not usable:
        asked = f" on the instruction set {isa!r}" if device == "cpu" else f" on {device}"
        raise PlanError(
            f"op {op} in {dtype}{asked} is not to be had: "
            f"{'; '.join(passed_over) or 'there is no such op'}"
        )
    # Of those that were not measured, or as fast, the first has the highest priority.
    took, kernel, reason = min(usable, key=lambda found: found[0])
    if took < math.inf:
        reason = f"measured: {took:.0f} µs"
    elif name:
        reason = "asked for"
    others = f"; passed over: {'; '.join(passed_over)}" if passed_over else ""
    at = "".join(f", {key} {value}" for key, value in sizes)
    where = "" if device == "cpu" else f" on {device}"
    logger.info("op %s in %s%s%s: %s (%s%s)", op, dtype, where, at, kernel.name, reason, others)
    return kernel


def _usable(
    kernel: KernelDescriptor, dtype: str, isa: str, sizes: Mapping[str, int]
) -> tuple[bool, str]:
    if dtype not in kernel.dtypes:
        return False, f"not in {dtype}, but in {', '.join(kernel.dtypes)}"
    if kernel.accepts is not None and sizes:
        ok, reason = kernel.accepts(sizes)
        if not ok:
            return False, reason
    is_native = kernel.name in NATIVE
    if isa != "auto" and kernel.device == "cpu" and is_native == (isa == "torch"):
        return False, f"the instruction set asked for is {isa}"
    return (True, "") if kernel.probe is None else kernel.probe()
