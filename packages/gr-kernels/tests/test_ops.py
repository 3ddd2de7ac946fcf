"""The op `hstu_layer` as a torch op, and how implementations are chosen."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_core import KernelDescriptor
from gr_core.errors import PlanError
from gr_core.stack import LayerWeights, Stack
from gr_kernels import choice
from gr_kernels.ops.hstu_stack import hstu_layer, make_stack
from gr_kernels.ops.hstu_stack.reference import TorchStack

from .stacks import Request, equations, random_request, random_stack

VARIANTS: dict[str, dict[str, Any]] = {
    "ranking": {},
    "research": {
        "gate": "u*norm(a)",
        "projection_silu": "all",
        "affine": False,
        "positions": 60,
        "time_buckets": 30,
    },
    "mtgr": {"gate": "norm(a*u)", "projection_silu": "all", "groups": 4},
}


WEIGHTS = tuple(f.name for f in fields(LayerWeights))
EXTRAS = ("groups_T", "times_T", "next_times_T")


class Layer(torch.nn.Module):
    """One layer of a stack as a module."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        for name in WEIGHTS:
            weight = getattr(stack.layers[0], name)
            parameter = None if weight is None else torch.nn.Parameter(weight)
            self.register_parameter(name, parameter)
        names = ("num_heads", "d_qk", "d_v", "alpha", "divisor", "norm_eps")
        names += ("projection_silu", "gate", "head_norm")
        self.settings = {name: getattr(stack, name) for name in names}

    def forward(self, x_TD: Tensor, *tokens: Tensor | None) -> Tensor:
        weights = {name: getattr(self, name) for name in WEIGHTS}
        extras = dict(zip(EXTRAS, tokens[4:], strict=True))
        return hstu_layer(x_TD, *tokens[:4], **weights, **extras, **self.settings)


def arguments(requests: list[Request]) -> tuple[Tensor | None, ...]:
    """Of `Layer.forward`, for requests side by side."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(request, name) for request in requests]
        if parts[0] is None:
            return None
        return torch.cat([torch.as_tensor(part) for part in parts])

    lengths = torch.tensor([len(request.low) for request in requests])
    x_TD = joined("x_TD")
    assert x_TD is not None
    return (
        x_TD.float(),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.tensor([request.history for request in requests]),
        joined("low"),
        joined("high"),
        joined("groups"),
        joined("times"),
        joined("next_times"),
    )


def some_requests(stack: Stack) -> list[Request]:
    sizes = [(37, 4), (0, 3), (50, 0)]
    return [random_request(stack, i, *size) for i, size in enumerate(sizes)]


class TestLayer:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_it_computes_the_equations_for_each_sequence(self, name: str):
        stack = random_stack(layers=1, **VARIANTS[name])
        requests = some_requests(stack)
        found = Layer(stack)(*arguments(requests))
        right = torch.cat([equations(stack, request) for request in requests])
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_it_is_a_proper_torch_op(self, name: str):
        stack = random_stack(layers=1, **VARIANTS[name])
        layer = Layer(stack).requires_grad_(False)
        x_TD, *tokens = arguments(some_requests(stack))
        weights = {name: getattr(layer, name) for name in WEIGHTS}
        extras = dict(zip(EXTRAS, tokens[4:], strict=True))
        torch.library.opcheck(
            torch.ops.gr.hstu_layer.default,
            (x_TD, *tokens[:4]),
            {**weights, **extras, **layer.settings},
        )

    def test_export_and_compile_see_it(self):
        stack = random_stack(layers=1)
        layer = Layer(stack).requires_grad_(False)
        given = arguments(some_requests(stack))
        eager = layer(*given)
        tokens, users = torch.export.Dim("tokens", max=4096), torch.export.Dim("users", max=64)
        shapes = ({0: tokens}, {0: users + 1}, {0: users}, {0: tokens}, {0: tokens})
        exported = torch.export.export(
            layer, given, dynamic_shapes=(shapes[0], (*shapes[1:], None, None, None))
        )
        assert "gr.hstu_layer" in str(exported.graph)
        torch.testing.assert_close(exported.module()(*given), eager, rtol=0, atol=0)
        other = arguments([random_request(stack, 9, 60, 7), random_request(stack, 10, 3, 1)])
        torch.testing.assert_close(exported.module()(*other), layer(*other), rtol=0, atol=0)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), eager, rtol=0, atol=0)

    def test_weights_are_converted_once_and_again_when_they_change(self, monkeypatch: Any):
        made = []

        def counting(*args: Any, **kwargs: Any) -> Any:
            made.append(make_stack(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr("gr_kernels.ops.hstu_stack.layer.make_stack", counting)
        stack = random_stack(layers=1)
        layer = Layer(stack).requires_grad_(False)
        given = arguments(some_requests(stack))
        before = layer(*given)
        assert torch.equal(layer(*given), before)
        assert len(made) == 1
        layer.output_weight.mul_(2)
        after = layer(*given)
        assert len(made) == 2
        torch.testing.assert_close(Layer(stack)(*given), after, rtol=0, atol=0)
        assert not torch.equal(before, after)

    def test_nothing_is_kept_of_weights_that_are_gone(self, monkeypatch: Any):
        kept = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            runner = make_stack(*args, **kwargs)
            kept.append(weakref.ref(runner))
            return runner

        monkeypatch.setattr("gr_kernels.ops.hstu_stack.layer.make_stack", watched)
        stack = random_stack(layers=1)
        given = arguments(some_requests(stack))
        layer = Layer(stack)
        layer(*given)
        del layer, stack
        gc.collect()
        assert [ref() for ref in kept] == [None]

    def test_mistakes_are_named(self):
        stack = random_stack(layers=1)
        layer = Layer(stack)
        x_TD, offsets, histories, low, high, *extras = arguments(some_requests(stack))
        with pytest.raises(ValueError, match="offsets must go from 0 to 94, the tokens, in 3"):
            layer(x_TD, offsets[:-1], histories, low, high, *extras)
        with pytest.raises(ValueError, match="histories must be"):
            layer(x_TD, offsets, histories + 5, low, high, *extras)
        with pytest.raises(ValueError, match="low and high"):
            layer(x_TD, offsets, histories, low, high + 50, *extras)
        layer.settings["gate"] = "a"
        with pytest.raises(ValueError, match="gate is 'a'"):
            layer(x_TD, offsets, histories, low, high, *extras)


def kernel(name: str, priority: int, probe: tuple[bool, str], *dtypes: str) -> KernelDescriptor:
    return KernelDescriptor(
        name=name,
        op="op",
        factory="builtins:len",
        device="cpu",
        dtypes=dtypes or ("float32",),
        priority=priority,
        probe=lambda: probe,
    )


class TestChoice:
    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A kernel in C++ for AVX2 that cannot be had, one that can, and one in torch."""
        monkeypatch.delenv(choice.ISA_VARIABLE, raising=False)
        monkeypatch.setattr(
            choice,
            "KERNELS",
            (
                kernel("torch", 1, (True, "torch is installed"), "float32", "float64"),
                kernel("better", 20, (False, "no compiler")),
                kernel("cpu", 10, (True, "this processor has AVX2")),
            ),
        )
        monkeypatch.setattr(choice, "NATIVE", frozenset({"cpu", "better"}))
        choice._choose.cache_clear()
        yield
        choice._choose.cache_clear()

    def test_the_best_usable_one_is_taken_and_said_once(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO):
            assert choice.choose("op", "float32").name == "cpu"
            assert choice.choose("op", "float32").name == "cpu"
        (line,) = caplog.messages
        assert line == (
            "op op in float32: cpu (this processor has AVX2; passed over: better: no compiler)"
        )

    def test_the_dtype_decides_too(self):
        assert choice.choose("op", "float64").name == "torch"

    @pytest.mark.parametrize(("isa", "name"), [("torch", "torch"), ("avx2", "cpu")])
    def test_the_instruction_set_may_be_asked_for(
        self, isa: str, name: str, monkeypatch: pytest.MonkeyPatch
    ):
        assert choice.choose("op", "float32", isa).name == name
        monkeypatch.setenv(choice.ISA_VARIABLE, isa)
        assert choice.choose("op", "float32").name == name

    def test_what_cannot_be_had_is_an_error_that_says_why(self):
        with pytest.raises(PlanError, match=r"'avx2' is not .*better: not in float64, but in fl"):
            choice.choose("op", "float64", "avx2")
        with pytest.raises(PlanError, match="no such op"):
            choice.choose("other", "float32")


def test_a_stack_is_made_by_what_is_chosen(monkeypatch: pytest.MonkeyPatch):
    stack = random_stack()
    assert isinstance(make_stack(stack, isa="torch"), TorchStack)
    monkeypatch.setenv(choice.ISA_VARIABLE, "torch")
    assert isinstance(make_stack(stack), TorchStack)
    assert make_stack(stack, "float64").name == "torch-float64"
