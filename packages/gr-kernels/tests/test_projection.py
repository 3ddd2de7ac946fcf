"""The op `hstu_projection`: the reference against the equations, kernels against the reference.

See `.triton_kernels` for where the kernels run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels.ops.hstu_projection import triton as in_triton
from gr_kernels.ops.hstu_projection.reference import hstu_projection
from gr_kernels.ops.hstu_projection.triton import (
    Norm,
    configurations,
    hstu_projection_fused,
    hstu_projection_product,
)

from .dense import DTYPES, Random, array, error, launch, specializations, within_poison
from .stacks import _norm, _silu
from .triton_kernels import (
    DEVICES,
    SHARED_BYTES,
    Recorded,
    device_for,
    needs_triton,
    not_interpreted,
    run_on_the_interpreter,
)

EPS = 1e-6
WAYS = [*Norm, "product"]


@dataclass(frozen=True)
class Call:
    """The op's arguments, float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    groups: Tensor | None
    rows: Tensor | None
    silu: tuple[int, int]

    def compute(
        self,
        op: Callable[..., Tensor],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """In ``dtype``, and all but the product in float32 at least; rows of no token are zero."""
        wide = torch.promote_types(dtype, torch.float32)

        def moved(x: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(device, to)

        y_RW = op(
            within_poison(self.x.to(device, wide)),
            within_poison(self.weight.to(device, dtype)),
            *(moved(x, wide) for x in (self.bias, self.norm_weight, self.norm_bias)),
            None if self.groups is None else self.groups.to(device),
            None if self.rows is None else self.rows.to(device),
            norm_eps=EPS,
            silu=self.silu,
            out=out,
        )
        assert y_RW.dtype == dtype
        return y_RW if self.rows is None else y_RW[self.rows.to(device) >= 0]

    def equations(self) -> Tensor:
        """(R, W), row by row."""
        rows = []
        weights = (self.norm_weight, self.norm_bias)
        for token in range(len(self.x)) if self.rows is None else self.rows.tolist():
            if token < 0:
                continue
            group = 0 if self.groups is None else int(self.groups[token])
            y = array(self.weight) @ _norm(array(self.x[token]), *weights, group, 1, EPS)
            if self.bias is not None:
                y = y + array(self.bias)
            first, end = self.silu
            rows.append(np.concatenate([y[:first], _silu(y[first:end]), y[end:]]))
        return torch.from_numpy(np.stack(rows))


def random_call(
    tokens: int,
    d: int,
    w: int,
    *,
    groups: int = 1,
    wanted: str = "all",
    bias: bool = True,
    affine: bool = True,
    silu: tuple[int, int] = (0, 0),
    mean: float = 0.5,
    seed: int = 0,
) -> Call:
    random = Random(seed)
    return Call(
        # In values that every dtype has, as rounding of the arguments is nobody's error.
        x=random.normal(tokens, d, around=mean).double(),
        weight=random.normal(w, d, scale=d**-0.5).half().bfloat16().double(),
        bias=random.normal(w, scale=0.3).double() if bias else None,
        norm_weight=random.normal(groups, d, scale=0.3, around=1).double() if affine else None,
        norm_bias=random.normal(groups, d, scale=0.3).double() if affine else None,
        groups=random.groups(tokens, groups),
        rows=random.rows(tokens, wanted),
        silu=silu,
    )


CALLS = {
    "one row": random_call(1, 40, 56, silu=(0, 56)),
    "some columns": random_call(17, 24, 50, silu=(7, 21)),
    "no parameters": random_call(17, 33, 33, bias=False, affine=False),
    "groups": random_call(33, 100, 40, groups=4, silu=(0, 16)),
    "rows": random_call(33, 40, 70, wanted="some"),
    "groups, rows and rows of none": random_call(33, 24, 40, groups=3, wanted="padded"),
    "large mean": random_call(5, 130, 24, mean=300),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_reference_is_the_equations(call: Call):
    assert error(call.compute(hstu_projection), call.equations()) < 1e-12


def test_groups_of_any_integer_dtype():
    call = CALLS["groups"]
    assert call.groups is not None
    for dtype in (torch.int32, torch.int64):
        other = replace(call, groups=call.groups.to(dtype))
        assert torch.equal(other.compute(hstu_projection), call.compute(hstu_projection))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8).t()}, "x has the shape .* contiguous rows"),
        ({"weight": torch.zeros(5, 4)}, r"weight has the shape \(5, 4\); expected \(W, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias has the shape \(4,\); expected \(5,\)"),
        ({"norm_weight": torch.zeros(3)}, r"norm_weight has .* expected \(G, 3\)"),
        ({"norm_bias": torch.zeros(1, 4)}, r"norm_bias has .* expected \(G, 3\)"),
        ({"groups": torch.zeros(7, dtype=torch.uint8)}, r"groups are \(7,\) of torch.uint8"),
        ({"groups": torch.zeros(8)}, "groups are .* of torch.float32; expected"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows are .* expected .* int64"),
        ({"silu": (2, 6)}, r"silu is \(2, 6\); expected 0 <= first <= end <= 5"),
        ({"out": torch.zeros(8, 4)}, r"out is \(8, 4\) .* expected \(8, 5\)"),
        (
            {"out": torch.zeros(8, 5).half()},
            r"of torch.float16; expected \(8, 5\) of torch.float32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str):
    given = {"x": torch.zeros(8, 3), "weight": torch.zeros(5, 3)} | change
    names = {"x": "x_TD", "weight": "weight_WD", "bias": "bias_W", "norm_weight": "norm_weight_GD"}
    names |= {"norm_bias": "norm_bias_GD", "groups": "groups_T", "rows": "rows_R"}
    with pytest.raises(ValueError, match=message):
        hstu_projection(norm_eps=EPS, **{names.get(name, name): x for name, x in given.items()})


@pytest.mark.parametrize("op", [hstu_projection_fused, hstu_projection_product])
def test_kernels_leave_float64_to_the_reference(op: Callable[..., Tensor]):
    with pytest.raises(ValueError, match=r"weight torch\.float64.*hstu_projection-reference"):
        op(torch.zeros(3, 4), torch.zeros(5, 4).double(), norm_eps=EPS)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        op(torch.zeros(3, 4).double(), torch.zeros(5, 4), norm_eps=EPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [16, 64, 256, 65536])
def test_configurations_are_what_products_take(rows: int, dtype: str):
    """tl.dot wants powers of two, from 16 on; and the default is among what is tried, first."""
    sizes = {"rows": rows, "columns": 2048, "width": 512}
    found = configurations(dtype, sizes)
    assert found[0] == in_triton.default(dtype, sizes)
    assert all(found.count(one) == 1 for one in found)
    assert {one["NORM"] for one in found} <= set(Norm)
    for one in found:
        for name in ("M", "N", "K"):
            assert one[name] >= 16
            assert one[name] & (one[name] - 1) == 0


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return device_for(request.param, monkeypatch)


@pytest.fixture(params=WAYS, ids=[*(way.name for way in Norm), "product"])
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    if request.param == "product":
        return hstu_projection_product
    monkeypatch.setattr(in_triton, "configuration", lambda *_: launch(request.param))
    return hstu_projection_fused


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_errors_are_those_of_the_dtype(
    device: str, op: Callable[..., Tensor], call: Call, dtype: torch.dtype
):
    right = call.compute(hstu_projection)
    allowed = SLACK * error(call.compute(hstu_projection, dtype), right) + FLOOR
    assert error(call.compute(op, dtype, device), right) < allowed


@needs_triton
def test_out_is_written_and_nothing_beside_it(device: str, op: Callable[..., Tensor]):
    call = CALLS["some columns"]
    wide = torch.full((19, 60), math.nan, device=device)
    inside = wide[1:18, 4:54]
    given = call.compute(op, torch.float32, device, out=inside)
    assert given.data_ptr() == inside.data_ptr()
    assert torch.equal(inside, call.compute(op, torch.float32, device))
    assert int(wide.isnan().sum()) == wide.numel() - inside.numel()


@needs_triton
def test_no_rows(device: str, op: Callable[..., Tensor]):
    x, weight = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert op(x[:0], weight, norm_eps=EPS).shape == (0, 5)
    assert op(x, weight, rows_R=none, norm_eps=EPS).shape == (0, 5)


@needs_triton
def test_defaults_on_more_rows(device: str):
    """As launched where nothing was measured."""
    for tokens in (20, 70):
        call = random_call(tokens, 72, 80, groups=2, silu=(0, 80), seed=tokens)
        right = call.compute(hstu_projection)
        assert error(call.compute(hstu_projection_fused, torch.float32, device), right) < 1e-6


@pytest.mark.slow
@needs_triton
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)


def recorded(monkeypatch: pytest.MonkeyPatch, config: dict[str, int] | None = None) -> Recorded:
    """Kernels that are not launched, but what they would be launched with is kept."""
    kernels = Recorded(in_triton.load())
    monkeypatch.setattr(in_triton, "load", lambda: kernels)
    if config is not None:
        monkeypatch.setattr(in_triton, "configuration", lambda *_: config)
    return kernels


@needs_triton
@not_interpreted
@pytest.mark.parametrize("rows", [(1, 15, 16), (65, 96, 128)])
def test_numbers_of_rows_share_a_kernel(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    for op in (hstu_projection_fused, hstu_projection_product):
        with monkeypatch.context() as patch:
            kernels = recorded(patch)
            for number in rows:
                weight, bias = torch.zeros(48, 32), torch.zeros(48)
                op(torch.zeros(number, 32), weight, bias, norm_eps=EPS, silu=(0, 48))
        for launches in kernels.launches.values():
            assert len(launches.given) == len(rows)
            assert len(specializations(launches)) == 1


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(
    ("tokens", "d", "dtype", "groups"),
    [
        (300, 512, torch.bfloat16, 1),
        (16, 256, torch.float32, 4),
        pytest.param(16, 512, torch.float16, 1, marks=pytest.mark.slow),
        pytest.param(20000, 512, torch.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param(20000, 512, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(300, 100, torch.float32, 3, marks=pytest.mark.slow),
        pytest.param(50, 33, torch.bfloat16, 3, marks=pytest.mark.slow),
    ],
)
def test_it_compiles(
    capability: int,
    tokens: int,
    d: int,
    dtype: torch.dtype,
    groups: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    kernels = recorded(monkeypatch)
    w = 2048
    given = (
        torch.zeros(tokens, d),
        torch.zeros(w, d, dtype=dtype),
        torch.zeros(w),
        torch.zeros(groups, d),
        torch.zeros(groups, d),
        Random(0).groups(tokens, groups),
    )
    hstu_projection_fused(*given, norm_eps=EPS, silu=(0, w))
    if tokens == 300:
        hstu_projection_product(*given, norm_eps=EPS, silu=(0, w))
    for name, launches in kernels.launches.items():
        compiled = launches.compile(capability)
        if name == "project" and capability == 90 and launches.given[0][1]["M"] >= 64:
            assert "wgmma.mma_async" in compiled.asm["ptx"]
