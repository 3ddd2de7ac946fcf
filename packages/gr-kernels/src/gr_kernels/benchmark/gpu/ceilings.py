"""What the device can do at best, measured: a large product of matrices, a large copy."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from gr_kernels.benchmark.gpu.device import Device


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Medians."""

    tflops_per_s: float
    """Of a product of two square matrices in bfloat16, by torch."""
    gb_per_s: float
    """Of a copy within the device's memory, bytes read and written."""
    size: int
    """Rows and columns of the matrices."""
    copied: int
    """Bytes."""


def measure_ceilings(
    device: Device, rounds: int, *, size: int = 8192, copied: int = 2**30
) -> Ceilings:
    """On random numbers: zeros are multiplied faster."""
    a, b = (
        torch.randn(size, size, device=device.name, dtype=torch.float32).bfloat16()
        for _ in range(2)
    )
    product = torch.empty_like(a)
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    products, copies = [], []
    for _ in range(rounds + 2):
        stamps = [device.stamp()]
        torch.matmul(a, b, out=product)
        stamps.append(device.stamp())
        target.copy_(source)
        stamps.append(device.stamp())
        device.synchronize()
        products.append(device.milliseconds(*stamps[:2]))
        copies.append(device.milliseconds(*stamps[1:]))
    # The first ones warm up.
    product_ms, copy_ms = (statistics.median(times[2:]) for times in (products, copies))
    del a, b, product, source, target
    device.forget()
    return Ceilings(2 * size**3 / product_ms / 1e9, 2 * copied / copy_ms / 1e6, size, copied)
