"""Attention alone: ours, plain PyTorch, and causal softmax attention of the same size.

Shapes: T tokens of all sequences, B sequences of L tokens, H heads, K columns per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gr_kernels.benchmark.gpu.device import Device
from gr_kernels.benchmark.gpu.measure import Case, Entry, Kind, Side
from gr_kernels.descriptors import KERNELS
from gr_kernels.tuning import power_of_two

PLAIN = "torch"
FLASH, CUDNN = "softmax, FlashAttention of torch", "softmax, cuDNN"
OP = "hstu_cached_attention"
_SCORES = 2**29
"""That plain PyTorch has in memory at once."""


@dataclass(frozen=True, slots=True)
class AttentionPoint:
    """Causal attention over sequences of one length."""

    length: int
    sequences: int
    columns: int
    heads: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.sequences} x {self.length} tokens, {self.heads} heads of {self.columns}"

    @property
    def facts(self) -> Mapping[str, str]:
        return {
            "sequences": str(self.sequences),
            "tokens of each": str(self.length),
            "heads": f"{self.heads} of {self.columns}",
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees: those before it, and itself."""
        return self.sequences * self.length * (self.length + 1) // 2

    @property
    def flops(self) -> float:
        """Scores and values of visible pairs; softmax and SiLU are not counted."""
        return 4.0 * self.pairs * self.heads * self.columns

    @property
    def alpha(self) -> float:
        return float(self.columns**-0.5)


class AttentionWork:
    """Fresh q, k and v (T, H, K) for each set."""

    def __init__(self, of: AttentionPoint, sets: int, device: Device) -> None:
        self.point, self.sets = of, sets
        generator = torch.Generator(device.name).manual_seed(0)
        shape = (of.sequences * of.length, of.heads, of.columns)
        self.inputs = [
            [
                torch.randn(shape, generator=generator, device=device.name).to(of.dtype)
                for _ in range(3)
            ]
            for _ in range(sets)
        ]

    def right(self, number: int) -> Tensor:
        q, k, v = (x.float() for x in self.inputs[number])
        return plain_attention(q, k, v, self.point)


def plain_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, of: AttentionPoint) -> Tensor:
    """HSTU's attention with all scores in memory, of as many sequences at once as is sensible."""
    out_THK = torch.empty_like(q_THK)
    together = max(1, _SCORES // (of.heads * of.length**2))
    for first in range(0, of.sequences, together):
        rows = slice(first * of.length, (first + together) * of.length)
        q_BHLK, k_BHLK, v_BHLK = (
            x[rows].view(-1, of.length, of.heads, of.columns).transpose(1, 2)
            for x in (q_THK, k_THK, v_THK)
        )
        score_BHLL = (q_BHLK @ k_BHLK.transpose(2, 3)).mul_(of.alpha)
        score_BHLL = F.silu(score_BHLL, inplace=True).tril_()
        a_BHLK = (score_BHLL @ v_BHLK).mul_(1 / of.length)
        out_THK[rows] = a_BHLK.transpose(1, 2).flatten(0, 1)
    return out_THK


class KernelSide(Side):
    """An implementation of the op for devices."""

    def __init__(self, kernel: str, work: AttentionWork, device: Device) -> None:
        of = work.point
        columns, queries = max(16, power_of_two(of.columns)), power_of_two(of.length, most=4096)
        sizes = {"d_qk": columns, "d_v": columns, "queries": queries}
        self._attend = device.attention(kernel, str(of.dtype).removeprefix("torch."), sizes)
        self._work, self.flops = work, of.flops

        def int32(numbers: Tensor) -> Tensor:
            return numbers.to(device.name, torch.int32)

        self._own = int32(torch.arange(of.length).repeat(of.sequences))
        self._low, self._high = torch.zeros_like(self._own), self._own + 1
        offsets = torch.arange(of.sequences + 1) * of.length
        self._offsets = offsets.to(device.name)
        self._out = torch.empty_like(work.inputs[0][0])

    def poison(self) -> None:
        self._out.fill_(float("nan"))

    def run(self, number: int) -> None:
        of = self._work.point
        q_THK, k_THK, v_THK = self._work.inputs[number]
        self._attend(
            q_THK,
            k_THK,
            v_THK,
            self._offsets,
            self._offsets,
            self._low,
            self._high,
            self._own,
            of.alpha,
            float(of.length),
            of.length,
            out_THV=self._out,
        )

    def output(self) -> Tensor:
        return self._out


class PlainSide(Side):
    def __init__(self, work: AttentionWork) -> None:
        self._work, self.flops = work, work.point.flops
        self._out = torch.empty(0)

    def run(self, number: int) -> None:
        q_THK, k_THK, v_THK = self._work.inputs[number]
        self._out = plain_attention(q_THK, k_THK, v_THK, self._work.point)

    def output(self) -> Tensor:
        return self._out


class SoftmaxSide(Side):
    """`F.scaled_dot_product_attention` with one backend, causal, on tensors as it likes them."""

    def __init__(self, work: AttentionWork, backend: SDPBackend) -> None:
        of = work.point
        self._backend, self.flops = backend, of.flops
        shape = (of.sequences, of.length, of.heads, of.columns)
        self._inputs = [
            [x.view(shape).transpose(1, 2).contiguous() for x in one] for one in work.inputs
        ]
        self._out = torch.empty(0)
        self.run(0)
        if not torch.isfinite(self._out).all():
            raise RuntimeError("softmax attention gave what is not finite")

    def run(self, number: int) -> None:
        q, k, v = self._inputs[number]
        with sdpa_kernel(self._backend):
            self._out = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def output(self) -> Tensor:
        return self._out


def kernels() -> Sequence[str]:
    """Names of the implementations there are for devices, the preferred one first."""
    found = [kernel for kernel in KERNELS if kernel.op == OP and kernel.device == "cuda"]
    return [kernel.name for kernel in sorted(found, key=lambda kernel: -kernel.priority)]


def case(of: AttentionPoint, device: Device, *, sets: int = 3) -> Case:
    """Others are compared with the implementation in Triton, which is always there."""
    work = AttentionWork(of, sets, device)
    entries = [
        Entry(name, Kind.OURS, partial(KernelSide, name, work, device)) for name in kernels()
    ]
    entries.append(Entry(PLAIN, Kind.PLAIN, partial(PlainSide, work)))
    backends = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
    entries += [
        Entry(name, Kind.OTHER, partial(SoftmaxSide, work, backend))
        for name, backend in backends.items()
    ]
    return Case(of.name, of.facts, sets, work.right, entries, f"{OP}-triton")
