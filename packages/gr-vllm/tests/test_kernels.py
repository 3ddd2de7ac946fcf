"""Which implementation of the op runs: the best that can, and torch where none can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gr_core import KernelDescriptor
from gr_vllm.worker.kernels import OP, best
from gr_vllm.worker.torch_attention import TorchPagedAttention

LAYER = (2, 64, 64, torch.float32, 1.0, 10.0)


class Narrow(TorchPagedAttention):
    """Takes heads of up to 64 columns."""

    def __init__(self, *layer: Any) -> None:
        if layer[1] > 64:
            raise ValueError(f"d_qk is {layer[1]}; expected at most 64")
        super().__init__(*layer)


class Wide(TorchPagedAttention):
    pass


def kernel(name: str, priority: int, usable: bool = True, **facts: Any) -> KernelDescriptor:
    given: dict[str, Any] = {"op": OP, "device": "cpu", "dtypes": ("float32",)}
    return KernelDescriptor(
        name=name,
        factory=f"{__name__}:{name}",
        priority=priority,
        probe=lambda: (usable, "it is there" if usable else "there is no compiler"),
        **(given | facts),
    )


@pytest.mark.parametrize(
    ("kernels", "d_qk", "chosen"),
    [
        ([kernel("Wide", 1), kernel("Narrow", 2)], 64, Narrow),
        ([kernel("Wide", 3), kernel("Narrow", 2)], 64, Wide),
        ([kernel("Wide", 1), kernel("Narrow", 2)], 65, Wide),
        ([kernel("Wide", 1), kernel("Narrow", 2, usable=False)], 64, Wide),
        ([kernel("Narrow", 2)], 65, TorchPagedAttention),
        ([kernel("Narrow", 2, dtypes=("bfloat16",))], 64, TorchPagedAttention),
        ([kernel("Narrow", 2, device="cuda")], 64, TorchPagedAttention),
        ([kernel("Narrow", 2, op="hstu_attention")], 64, TorchPagedAttention),
        ([kernel("Narrow", 2, usable=False)], 64, TorchPagedAttention),
        ([], 64, TorchPagedAttention),
    ],
)
def test_the_best_that_can_run(kernels: list[KernelDescriptor], d_qk: int, chosen: type):
    _, make = best(kernels, torch.float32, "cpu", (2, d_qk, *LAYER[2:]))
    assert make.__name__ == chosen.__name__


def test_why_another_is_not_chosen_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    best([kernel("Narrow", 2), kernel("Wide", 3, usable=False)], torch.float32, "cpu", LAYER)
    assert "not Wide: there is no compiler" in caplog.text
