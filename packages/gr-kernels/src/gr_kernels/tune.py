"""What `gr kernels tune` does: tries launches of the kernels of a stack's layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr_core import KernelDescriptor
from gr_core.errors import GrError
from gr_core.stack import Stack
from gr_kernels import tuning
from gr_kernels.descriptors import KERNELS
from gr_kernels.ops.hstu_attention.on_device import CachedKeys
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS
from gr_kernels.tuning import Entry, Key, key_of, power_of_two

logger = logging.getLogger(__name__)

ROWS = (64, 256, 1024, 4096, 16384, 65536)
QUERIES = (16, 64, 256, 1024, 4096)
_CACHED = 1024
"""Tokens in blocks before a few new ones, as of a user who returns."""
_TOKENS = 8192
"""Of all sequences together, or one sequence's if that is more."""
_ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""By which results may differ from the default launch's, relative to their norm."""

Run = Callable[[], Tensor]
Timer = Callable[[Run], float]
"""Microseconds of a run, a median."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size."""

    kernel: KernelDescriptor
    dtype: str
    sizes: Mapping[str, int]
    make: Callable[[KernelDescriptor], Run]
    """Makes fresh inputs on the device, and what computes with them."""

    @property
    def key(self) -> Key:
        return key_of(self.kernel.name, self.dtype, self.sizes)

    def configurations(self) -> Sequence[Mapping[str, int]]:
        """Launches to try, the default first; of what has none to choose, none."""
        if not self.kernel.name.endswith("-triton"):
            return [{}]
        module = import_module(self.kernel.factory.partition(":")[0])
        found: Sequence[Mapping[str, int]] = module.configurations(self.dtype, self.sizes)
        return found


def is_usable(kernel: KernelDescriptor) -> bool:
    return kernel.probe is None or kernel.probe()[0]


def cases(
    stack: Stack,
    dtype: str,
    device: str,
    *,
    rows: Sequence[int] = ROWS,
    queries: Sequence[int] = QUERIES,
    usable: Callable[[KernelDescriptor], bool] = is_usable,
) -> Iterator[Case]:
    """What the layers of a stack launch, for every implementation that is usable here."""
    f, k = stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk
    y = stack.layers[0].output_weight.shape[1]
    for kernel in KERNELS:
        if kernel.device != "cuda" or dtype not in kernel.dtypes or not usable(kernel):
            continue
        if kernel.op == "hstu_cached_attention":
            heads = {
                "d_qk": power_of_two(stack.d_qk, least=16),
                "d_v": power_of_two(stack.d_v, least=16),
            }
            for most in queries:
                made = _attention(stack, dtype, device, most)
                yield Case(kernel, dtype, {**heads, "queries": most}, made)
        elif kernel.op == "hstu_projection":
            for count in rows:
                # All columns at once; in the last layer K and V, then Q and U.
                for columns in dict.fromkeys((2 * (f + k), f + k)):
                    sizes = {"rows": count, "columns": columns, "width": stack.d_model}
                    yield Case(kernel, dtype, sizes, _projection(stack, dtype, device, sizes))
        elif kernel.op == "hstu_output":
            for count in rows:
                sizes = {"rows": count, "columns": y, "width": stack.d_model}
                yield Case(kernel, dtype, sizes, _output(stack, dtype, device, sizes))


def best(case: Case, timer: Timer) -> Entry | None:
    """The fastest of a case's launches that gives what its default gives; None if none runs."""
    torch.manual_seed(0)
    try:
        run = case.make(case.kernel)
    except (GrError, ValueError) as error:
        logger.info("%s %s: %s", case.kernel.name, dict(case.sizes), error)
        return None
    expected: Tensor | None = None
    found: Entry | None = None
    for config in case.configurations():
        try:
            with tuning.trying(case.kernel.name, config):
                result = run().float()
                if expected is None:
                    expected = result
                difference = float((result - expected).norm() / expected.norm())
                if not difference <= _ALLOWED[case.dtype]:
                    logger.warning(
                        "%s with %s differs by %.2g from its default: passed over",
                        case.kernel.name,
                        dict(config),
                        difference,
                    )
                    continue
                took = timer(run)
        except Exception as error:
            if expected is None and not _is_resources(error):
                raise
            logger.info("%s with %s does not run: %s", case.kernel.name, dict(config), error)
            continue
        if found is None or took < found.microseconds:
            found = Entry(case.kernel.name, case.dtype, dict(case.sizes), dict(config), took)
    return found


def complete(
    path: Path,
    wanted: Iterable[Case],
    timer: Timer,
    report: Callable[[str], None],
    *,
    again: bool = False,
) -> int:
    """Measures what a table does not have yet, or with ``again`` all; how many entries that made.

    The file is written after each, so what is stopped goes on where it was.
    """
    found = {}
    if path.exists():
        found = {entry.key: entry for entry in tuning.parse(path.read_text(encoding="utf-8"))}
    todo = {case.key: case for case in wanted if again or case.key not in found}
    made = 0
    for number, (key, case) in enumerate(todo.items(), 1):
        sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items())
        label = f"[{number}/{len(todo)}] {case.kernel.name} {case.dtype}, {sizes}"
        entry = best(case, timer)
        if entry is None:
            report(f"{label}: does not run")
            continue
        found[key], made = entry, made + 1
        tuning.write(path, list(found.values()))
        report(f"{label}: {entry.microseconds:.0f} µs {dict(entry.config)}")
    tuning.forget()
    return made


def _is_resources(error: Exception) -> bool:
    """Whether a launch needs more of a processor's memory than it has."""
    return type(error).__name__ in ("OutOfResources", "OutOfMemoryError")


def cuda_timer(run: Run, repeats: int = 20) -> float:
    """By events around each of some runs; the cache of the device is not emptied between them."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


# ── Inputs ────────────────────────────────────────────────────────────────────────────────────


def _attention(
    stack: Stack, dtype: str, device: str, most: int
) -> Callable[[KernelDescriptor], Run]:
    def make(kernel: KernelDescriptor) -> Run:
        on = {"device": device, "dtype": getattr(torch, dtype)}
        heads, d_qk, d_v = stack.num_heads, stack.d_qk, stack.d_v
        sequences = max(1, _TOKENS // (most + _CACHED))
        rows = sequences * most
        q, k, v = (torch.randn(rows, heads, d, **on) for d in (d_qk, d_qk, d_v))
        blocks = _CACHED // BLOCK_TOKENS
        bytes_each = BLOCK_TOKENS * heads * (d_qk + d_v)
        memory = torch.randn(sequences * blocks, bytes_each, **on)
        step = bytes_each * memory.itemsize
        addresses = memory.data_ptr() + step * torch.arange(sequences * blocks)
        offsets = torch.arange(sequences + 1) * most
        place = torch.arange(most).repeat(sequences) + _CACHED
        counts = torch.full((sequences,), _CACHED)
        cached = CachedKeys(
            addresses.view(sequences, blocks).to(device), counts.int().to(device), 0
        )
        attend = kernel.resolve()
        low, high, own = (x.int().to(device) for x in (torch.zeros_like(place), place, place))
        offsets = offsets.to(device)

        def run() -> Tensor:
            # ``memory`` is held by this function, as only its address is in the arguments.
            assert memory is not None
            found: Tensor = attend(
                q, k, v, offsets, offsets, low, high, own, d_qk**-0.5, 2048.0, most, cached
            )
            return found

        return run

    return make


def _projection(
    stack: Stack, dtype: str, device: str, sizes: Mapping[str, int]
) -> Callable[[KernelDescriptor], Run]:
    def make(kernel: KernelDescriptor) -> Run:
        wide: dict[str, Any] = {"device": device}
        rows, columns, width = sizes["rows"], sizes["columns"], sizes["width"]
        x = torch.randn(rows, width, **wide)
        weight = (torch.randn(columns, width, **wide) * width**-0.5).to(getattr(torch, dtype))
        bias, groups = torch.randn(columns, **wide), _groups(stack, rows, device)
        norm = [torch.randn(stack.groups, width, **wide) for _ in range(2)]
        silu = (0, columns if stack.projection_silu == "all" else 0)
        project = kernel.resolve()

        def run() -> Tensor:
            found: Tensor = project(
                x, weight, bias, *norm, groups, norm_eps=stack.norm_eps, silu=silu
            )
            return found

        return run

    return make


def _output(
    stack: Stack, dtype: str, device: str, sizes: Mapping[str, int]
) -> Callable[[KernelDescriptor], Run]:
    def make(kernel: KernelDescriptor) -> Run:
        wide: dict[str, Any] = {"device": device}
        narrow = getattr(torch, dtype)
        rows, y, d = sizes["rows"], sizes["columns"], sizes["width"]
        f = stack.num_heads * stack.d_v
        x = torch.randn(rows, d, **wide)
        a = torch.randn(rows, stack.num_heads, stack.d_v, **wide).to(narrow)
        u = torch.randn(rows, f, **wide).to(narrow)
        weight = (torch.randn(d, y, **wide) * y**-0.5).to(narrow)
        bias, groups = torch.randn(d, **wide), _groups(stack, rows, device)
        norm = [torch.randn(stack.groups, f, **wide) for _ in range(2)]
        compute = kernel.resolve()

        def run() -> Tensor:
            target = x.clone()  # or it would grow with every run
            compute(
                target,
                a,
                u,
                weight,
                bias,
                *norm,
                groups,
                norm_eps=stack.norm_eps,
                head_norm=stack.head_norm,
                gate=stack.gate,
                silu_u=stack.projection_silu == "u",
            )
            return target

        return run

    return make


def _groups(stack: Stack, rows: int, device: str) -> Tensor | None:
    if stack.groups == 1:
        return None
    return torch.randint(stack.groups, (rows,), dtype=torch.uint8, device=device)
