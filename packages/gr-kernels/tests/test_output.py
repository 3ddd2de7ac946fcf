"""The op `hstu_output`: the reference against the equations, kernels against the reference.

See `.triton_kernels` for where the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gr_core.stack import Gate
from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels.ops.hstu_output import triton as in_triton
from gr_kernels.ops.hstu_output.reference import hstu_output
from gr_kernels.ops.hstu_output.triton import (
    configurations,
    hstu_output_fused,
    hstu_output_product,
)
from gr_kernels.ops.hstu_projection.triton import Norm

from .dense import DTYPES, Random, array, error, launch, specializations, within_poison
from .stacks import GATES, _norm, _silu
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
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Call:
    """The op's arguments, float64."""

    x: Tensor
    a: Tensor
    u: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    groups: Tensor | None
    rows: Tensor | None
    head_norm: bool
    gate: Gate
    silu_u: bool

    def compute(
        self, op: Callable[..., None], dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> Tensor:
        """What x is afterwards, (T, D); in ``dtype``, and all but the product in float32 at least.

        Fails where what lies beside x, or a row of it that is not wanted, has changed.
        """
        wide = torch.promote_types(dtype, torch.float32)

        def moved(x: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(device, to)

        x_TD = within_poison(self.x.to(device, wide))
        f = self.u.shape[1]
        op(
            x_TD,
            within_poison(self.a.flatten(1).to(device, dtype)).unflatten(1, self.a.shape[1:]),
            within_poison(self.u.to(device, dtype), before=f, after=2 * f),
            within_poison(self.weight.to(device, dtype)),
            *(moved(x, wide) for x in (self.bias, self.norm_weight, self.norm_bias)),
            None if self.groups is None else self.groups.to(device),
            None if self.rows is None else self.rows.to(device),
            norm_eps=EPS,
            head_norm=self.head_norm,
            gate=self.gate,
            silu_u=self.silu_u,
        )
        around = x_TD.as_strided((len(x_TD), x_TD.stride(0)), (x_TD.stride(0), 1), 0)
        assert int(around.isnan().sum()) == around.numel() - x_TD.numel()
        if self.rows is not None:
            others = sorted({*range(len(self.x))} - {*self.rows.tolist()})
            assert torch.equal(x_TD[others].cpu(), self.x[others].to(wide))
        return x_TD

    def equations(self) -> Tensor:
        """(T, D), row by row."""
        x_TD = array(self.x).copy()
        parts = self.a.shape[1] if self.head_norm else 1
        for row, token in enumerate(
            range(len(self.x)) if self.rows is None else self.rows.tolist()
        ):
            if token < 0:
                continue
            group = 0 if self.groups is None else int(self.groups[token])
            a, u = array(self.a[row]).reshape(-1), array(self.u[row])
            if self.silu_u:
                u = _silu(u)
            normed = _norm(
                a * u if self.gate == "norm(a*u)" else a,
                self.norm_weight,
                self.norm_bias,
                group,
                parts,
                EPS,
            )
            gated = {
                "u*norm(a)": [u * normed],
                "u,norm(a),u*norm(a)": [u, normed, u * normed],
                "u,a,u*norm(a)": [u, a, u * normed],
                "norm(a*u)": [normed],
            }[self.gate]
            x_TD[token] += array(self.weight) @ np.concatenate(gated)
            if self.bias is not None:
                x_TD[token] += array(self.bias)
        return torch.from_numpy(x_TD)


def random_call(
    tokens: int,
    d: int,
    heads: int,
    d_v: int,
    gate: Gate,
    *,
    head_norm: bool = False,
    silu_u: bool = False,
    groups: int = 1,
    wanted: str = "all",
    bias: bool = True,
    affine: bool = True,
    seed: int = 0,
) -> Call:
    random = Random(seed)
    f = heads * d_v
    y = f * (3 if gate.count(",") else 1)
    rows_R = random.rows(tokens, wanted)
    rows = tokens if rows_R is None else len(rows_R)
    return Call(
        # In values that every dtype has, as rounding of the arguments is nobody's error. Little of
        # x, or its own rounding would hide that of what is added.
        x=random.normal(tokens, d, scale=0.1).float().double(),
        a=random.normal(rows, heads, d_v, around=0.3).half().bfloat16().double(),
        u=random.normal(rows, f).half().bfloat16().double(),
        weight=random.normal(d, y, scale=y**-0.5).half().bfloat16().double(),
        bias=random.normal(d, scale=0.3).double() if bias else None,
        norm_weight=random.normal(groups, f, scale=0.3, around=1).double() if affine else None,
        norm_bias=random.normal(groups, f, scale=0.3).double() if affine else None,
        groups=random.groups(tokens, groups),
        rows=rows_R,
        head_norm=head_norm,
        gate=gate,
        silu_u=silu_u,
    )


CALLS = {
    **{f"{gate}": random_call(17, 40, 3, 11, gate, silu_u=True) for gate in GATES},
    **{f"{gate} by head": random_call(17, 24, 3, 13, gate, head_norm=True) for gate in GATES},
    "one row": random_call(1, 24, 1, 40, "u*norm(a)", head_norm=True),
    "no parameters": random_call(33, 33, 2, 20, "u,a,u*norm(a)", bias=False, affine=False),
    "groups": random_call(33, 40, 2, 12, "u*norm(a)", groups=4),
    "heads of a step each": random_call(17, 24, 2, 64, "u,norm(a),u*norm(a)", head_norm=True),
    "rows": random_call(33, 24, 2, 12, "norm(a*u)", wanted="some", silu_u=True),
    "groups, rows and rows of none": random_call(
        33, 100, 2, 12, "u,norm(a),u*norm(a)", groups=3, head_norm=True, wanted="padded"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_reference_is_the_equations(call: Call):
    assert error(call.compute(hstu_output), call.equations()) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "u+a"}, r"gate is 'u\+a'; expected one of 'u\*norm\(a\)', "),
        ({"x": torch.zeros(5, 8).t()}, "x has the shape .* contiguous rows"),
        ({"a": torch.zeros(8, 2, 4)}, r"a has the shape .*expected \(8, H, V\), H·V being 6"),
        ({"a": torch.zeros(7, 2, 3)}, r"a has the shape .*expected \(8, H, V\), H·V being 6"),
        ({"a": torch.zeros(8, 3, 2).mT}, "a has the strides .* contiguous rows"),
        ({"u": torch.zeros(7, 6)}, r"u has the shape \(7, 6\); expected \(8, 6\)"),
        ({"weight": torch.zeros(5, 18)}, r"weight has the shape \(5, 18\); expected \(5, 6\)"),
        ({"u": torch.zeros(8, 6).half()}, "u torch.float16 .*; expected one dtype"),
        ({"bias": torch.zeros(6)}, r"bias has the shape \(6,\); expected \(5,\)"),
        ({"norm_weight": torch.zeros(6)}, r"norm_weight has .* expected \(G, 6\)"),
        ({"groups": torch.zeros(7, dtype=torch.uint8)}, r"groups are \(7,\) of torch.uint8"),
        ({"rows": torch.zeros(8)}, "rows are .* expected .* int64"),
        ({"rows": torch.zeros(7, dtype=torch.int64)}, r"a has the shape .* expected \(7, H, V\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str):
    shapes = {"x": (8, 5), "a": (8, 2, 3), "u": (8, 6), "weight": (5, 6)}
    given: dict[str, Any] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    given |= {"gate": "u*norm(a)"} | change
    names = {"x": "x_TD", "a": "a_RHV", "u": "u_RF", "weight": "weight_DY", "bias": "bias_D"}
    names |= {"norm_weight": "norm_weight_GF", "groups": "groups_T", "rows": "rows_R"}
    with pytest.raises(ValueError, match=message):
        hstu_output(norm_eps=EPS, **{names.get(name, name): x for name, x in given.items()})


@pytest.mark.parametrize("op", [hstu_output_fused, hstu_output_product])
def test_kernels_leave_float64_to_the_reference(op: Callable[..., None]):
    call = CALLS["u*norm(a)"]
    with pytest.raises(ValueError, match=r"weight torch\.float64.*hstu_output-reference"):
        call.compute(op)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [16, 64, 256, 65536])
def test_configurations_are_what_products_take(rows: int, dtype: str):
    """tl.dot wants powers of two, from 16 on; and the default is among what is tried, first."""
    sizes = {"rows": rows, "columns": 1536, "width": 512}
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
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    if request.param == "product":
        return hstu_output_product
    monkeypatch.setattr(in_triton, "configuration", lambda *_: launch(request.param))
    return hstu_output_fused


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_errors_are_those_of_the_dtype(
    device: str, op: Callable[..., None], call: Call, dtype: torch.dtype
):
    right = call.compute(hstu_output)
    allowed = SLACK * error(call.compute(hstu_output, dtype), right) + FLOOR
    assert error(call.compute(op, dtype, device), right) < allowed


@needs_triton
def test_no_rows(device: str, op: Callable[..., None]):
    x, weight = torch.ones(3, 5, device=device), torch.ones(5, 6, device=device)
    a, u = torch.zeros(0, 2, 3, device=device), torch.zeros(0, 6, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    op(x, a, u, weight, rows_R=none, norm_eps=EPS, gate="u*norm(a)")
    op(x[:0], a, u, weight, norm_eps=EPS, gate="u*norm(a)")
    assert torch.equal(x, torch.ones_like(x))


@needs_triton
def test_defaults_on_more_rows(device: str):
    """As launched where nothing was measured."""
    for tokens in (20, 70):
        call = random_call(tokens, 72, 2, 32, "u,a,u*norm(a)", groups=2, seed=tokens)
        right = call.compute(hstu_output)
        assert error(call.compute(hstu_output_fused, torch.float32, device), right) < 1e-6


@pytest.mark.slow
@needs_triton
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)


def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Kernels that are not launched, but what they would be launched with is kept."""
    kernels = Recorded(in_triton.load())
    monkeypatch.setattr(in_triton, "load", lambda: kernels)
    return kernels


def zeros(
    rows: int, d: int, heads: int, d_v: int, gate: Gate, dtype: torch.dtype, groups: int
) -> tuple[Tensor | None, ...]:
    f = heads * d_v
    return (
        torch.zeros(rows, d),
        torch.zeros(rows, heads, d_v, dtype=dtype),
        torch.zeros(rows, 4 * f, dtype=dtype)[:, f : 2 * f],
        torch.zeros(d, f * (3 if gate.count(",") else 1), dtype=dtype),
        torch.zeros(d),
        torch.zeros(groups, f),
        torch.zeros(groups, f),
        Random(0).groups(rows, groups),
    )


@needs_triton
@not_interpreted
@pytest.mark.parametrize("rows", [(1, 15, 16), (65, 96, 128)])
def test_numbers_of_rows_share_a_kernel(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    for op in (hstu_output_fused, hstu_output_product):
        with monkeypatch.context() as patch:
            kernels = recorded(patch)
            for number in rows:
                given = zeros(number, 32, 2, 16, "u*norm(a)", torch.float32, 1)
                op(*given, norm_eps=EPS, gate="u*norm(a)")
        for launches in kernels.launches.values():
            assert len(launches.given) == len(rows)
            assert len(specializations(launches)) == 1


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(
    ("rows", "d", "d_v", "gate", "dtype", "head_norm", "groups"),
    [
        (300, 512, 128, "u,a,u*norm(a)", torch.bfloat16, False, 1),
        (16, 256, 64, "norm(a*u)", torch.float32, False, 4),
        pytest.param(16, 512, 128, "u,a,u*norm(a)", torch.float16, False, 1, marks=SLOW),
        pytest.param(64, 512, 128, "u,norm(a),u*norm(a)", torch.bfloat16, False, 1, marks=SLOW),
        pytest.param(300, 512, 128, "u,a,u*norm(a)", torch.float32, False, 1, marks=SLOW),
        pytest.param(20000, 512, 128, "u,a,u*norm(a)", torch.bfloat16, True, 1, marks=SLOW),
        pytest.param(20000, 512, 128, "u*norm(a)", torch.float32, False, 1, marks=SLOW),
        pytest.param(300, 100, 25, "u*norm(a)", torch.bfloat16, True, 3, marks=SLOW),
    ],
)
def test_it_compiles(
    capability: int,
    rows: int,
    d: int,
    d_v: int,
    gate: Gate,
    dtype: torch.dtype,
    head_norm: bool,
    groups: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    kernels = recorded(monkeypatch)
    given = zeros(rows, d, 4, d_v, gate, dtype, groups)
    for op in (hstu_output_fused, hstu_output_product):
        op(*given, norm_eps=EPS, head_norm=head_norm, gate=gate, silu_u=True)
    for name, launches in kernels.launches.items():
        compiled = launches.compile(capability)
        if name == "add_product" and capability == 90 and launches.given[0][1]["M"] >= 64:
            assert "wgmma.mma_async" in compiled.asm["ptx"]
