"""The plugin and its kernels pass the conformance kit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gr_core.testing import KernelCase, KernelSuite, PluginSuite
from gr_kernels import native

from .test_attention import Call, random_call


class TestPlugin(PluginSuite):
    plugin = "kernels"


SIZES = {
    "usual": [(37, 61), (5, 5)],
    "one token": [(1, 1)],
    "empty sequences": [(0, 3), (3, 0), (0, 0), (4, 4)],
    "blocks and one more": [(33, 65), (64, 129)],
}


def arguments(call: Call) -> tuple[Any, ...]:
    return (*call.tensors, *(call.keywords[name] for name in ("alpha", "divisor", "bias")))


def attention_cases(dtype: torch.dtype) -> Sequence[KernelCase]:
    cases = []
    for name, sizes in SIZES.items():
        for bias in (False, True):
            call = random_call(7, sizes, d_qk=24, d_v=40, bias=bias, padding=3).to(dtype)
            exact = call.to(torch.float64)
            cases.append(KernelCase(f"{name}, {bias=}", arguments(call), arguments(exact)))
    return cases


@pytest.fixture
def native_attention() -> None:
    ok, reason = native.probe("float32")
    if not ok:
        pytest.skip(reason)


class TestBlockedInFloat32(KernelSuite):
    kernel = "hstu_attention-blocked"
    reference = "hstu_attention-reference"

    @pytest.fixture
    def cases(self) -> Sequence[KernelCase]:
        return attention_cases(torch.float32)


class TestBlockedInBfloat16(KernelSuite):
    kernel = "hstu_attention-blocked"
    reference = "hstu_attention-reference"

    @pytest.fixture
    def cases(self) -> Sequence[KernelCase]:
        return attention_cases(torch.bfloat16)


@pytest.mark.usefixtures("native_attention")
class TestNativeInFloat32(TestBlockedInFloat32):
    kernel = "hstu_attention-cpu"


@pytest.mark.usefixtures("native_attention")
class TestNativeInBfloat16(TestBlockedInBfloat16):
    kernel = "hstu_attention-cpu"
