"""The op `hstu_attention`: its implementations against a loop over pairs, and as a torch op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels import choice, native
from gr_kernels.ops.hstu_attention import (
    Intervals,
    blocked,
    causal,
    cpu,
    hstu_attention,
    joined,
    mtgr,
)
from gr_kernels.ops.hstu_attention import reference as reference_module

IMPLEMENTATIONS = {
    "reference": reference_module.hstu_attention,
    "blocked": blocked.hstu_attention,
    "op": hstu_attention,
    "avx2": cpu.hstu_attention,
    "avx512": cpu.hstu_attention,
    "auto": cpu.hstu_attention,
}


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; for instruction sets as far as this build and processor have them."""
    if IMPLEMENTATIONS[request.param] is cpu.hstu_attention:
        ok, reason = native.probe("float32")
        if not ok:
            pytest.skip(reason)
        if request.param not in {"auto"} | {
            s for d in native.DTYPES for s in native.instruction_sets(d)
        }:
            pytest.skip(f"this processor has no {request.param}")
        monkeypatch.setenv(choice.ISA_VARIABLE, request.param)
    return str(request.param)


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call, float64."""

    tensors: tuple[Tensor, ...]
    keywords: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        def convert(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        return Call(
            tuple(convert(tensor) for tensor in self.tensors),
            {name: convert(value) for name, value in self.keywords.items()},
        )

    def run(self, implementation: Any) -> Tensor:
        return implementation(*self.tensors, **self.keywords)


def random_call(
    seed: int,
    sizes: list[tuple[int, int]],
    *,
    heads: int = 2,
    d_qk: int = 8,
    d_v: int = 8,
    bias: bool = False,
    padding: int = 0,
) -> Call:
    """Sequences of (queries, keys) with arbitrary intervals, between poisoned rows."""
    rng = np.random.default_rng(seed)
    queries, keys = np.array(sizes, np.int64).reshape(-1, 2).T
    pairs = int((queries * keys).sum())

    def tensor(rows: int, columns: int) -> Tensor:
        values = rng.normal(size=(rows + 2 * padding, heads, columns))
        values[:padding] = values[padding + rows :] = np.nan
        return torch.from_numpy(values)

    low, high, own = [], [], []
    for count, total in sizes:
        low.append(rng.integers(0, total + 1, count))
        high.append(rng.integers(0, total + 1, count))
        own.append(rng.integers(-1, total, count))
    places = [
        torch.from_numpy(np.pad(np.concatenate([[], *p]), padding).astype(np.int32))
        for p in (low, high, own)
    ]
    offsets = [
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]) + padding)
        for lengths in (queries, keys)
    ]
    return Call(
        (
            tensor(int(queries.sum()), d_qk),
            tensor(int(keys.sum()), d_qk),
            tensor(int(keys.sum()), d_v),
            *offsets,
            *places,
        ),
        {
            "alpha": d_qk**-0.5,
            "divisor": 7.0,
            "bias": torch.from_numpy(rng.normal(size=pairs)) if bias else None,
        },
    )


def by_pairs(call: Call) -> Tensor:
    """The equation as loops, in Python's floats."""
    q, k, v, *rest = (tensor.tolist() for tensor in call.tensors)
    query_offsets, key_offsets, low, high, own = rest
    alpha, divisor, bias = (call.keywords[name] for name in ("alpha", "divisor", "bias"))
    heads, columns = call.tensors[2].shape[1:]
    a = np.zeros((len(q), heads, columns))
    pair = 0
    for b in range(len(query_offsets) - 1):
        for i in range(query_offsets[b], query_offsets[b + 1]):
            for place, j in enumerate(range(key_offsets[b], key_offsets[b + 1])):
                extra = 0.0 if bias is None else float(bias[pair])
                pair += 1
                if not (low[i] <= place < high[i] or place == own[i]):
                    continue
                for h in range(heads):
                    products = map(math.prod, zip(q[i][h], k[j][h], strict=True))
                    score = alpha * math.fsum(products) + extra
                    a[i, h] += score / (1 + math.exp(-score)) / divisor * np.array(v[j][h])
    return torch.from_numpy(a)


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / (right.norm() or 1))


# The fixture sets a variable for all examples alike.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_implementations_compute_the_equation(name: str, data: st.DataObject):
    size = st.tuples(st.integers(0, 9), st.integers(0, 12))
    call = random_call(
        data.draw(st.integers(0, 2**16)),
        data.draw(st.lists(size, max_size=4)),
        heads=data.draw(st.integers(1, 3)),
        d_qk=data.draw(st.integers(1, 5)),
        d_v=data.draw(st.integers(1, 5)),
        bias=data.draw(st.booleans()),
        padding=data.draw(st.integers(0, 2)),
    )
    right = by_pairs(call)
    if IMPLEMENTATIONS[name] is not cpu.hstu_attention:
        assert error(call.run(IMPLEMENTATIONS[name]), right) < 1e-12
    assert error(call.to(torch.float32).run(IMPLEMENTATIONS[name]), right) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_long_sequences_go_block_by_block(name: str, bias: bool):
    sizes = [(blocked.QUERY_BLOCK + 3, 2 * blocked.KEY_BLOCK + 5), (2 * blocked.QUERY_BLOCK, 1)]
    call = random_call(1, sizes, d_qk=20, d_v=33, bias=bias)
    right = call.run(reference_module.hstu_attention)
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        assert error(call.to(dtype).run(IMPLEMENTATIONS[name]), right) < allowed


def test_threads_change_nothing():
    if not native.probe("float32")[0]:
        pytest.skip(native.probe("float32")[1])
    call = random_call(6, [(70, 90)] * 5, heads=3).to(torch.float32)
    alone = call.run(cpu.hstu_attention)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(call.run(cpu.hstu_attention), alone)
    finally:
        torch.set_num_threads(before)


def test_large_scores_are_no_trouble(name: str):
    """SiLU of -1e4 is 0 and of 1e4 itself: no exponential may overflow on the way."""
    q, k, v = (torch.full((3, 1, 1), value) for value in (100.0, 100.0, 1.0))
    q[1] = -100.0
    offsets = torch.tensor([0, 3])
    found = IMPLEMENTATIONS[name](q, k, v, offsets, offsets, *causal(3), 1.0, 1.0)
    assert found.flatten().tolist() == pytest.approx([1e4, 0.0, 3e4], abs=1e-30)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    if not native.probe("float32")[0]:
        pytest.skip(native.probe("float32")[1])
    monkeypatch.setenv(choice.ISA_VARIABLE, "mmx")
    call = random_call(5, [(3, 5)]).to(torch.float32)
    with pytest.raises(PlanError, match="'mmx'; expected auto, torch, or one of this processor's"):
        call.run(hstu_attention)


class TestIntervals:
    """What the helpers say against the masks' rules, pair by pair."""

    @given(st.data())
    def test_causal(self, data: st.DataObject):
        history = data.draw(st.integers(0, 12))
        candidates = data.draw(st.integers(0, 4))
        contextual = data.draw(st.integers(0, history))
        window = data.draw(st.integers(0, 6))
        start = data.draw(st.integers(0, history + candidates))
        base = 1 if contextual else 0
        place = [
            0 if i < contextual else min(i, history) - contextual + base
            for i in range(history + candidates)
        ]

        def sees(i: int, j: int) -> bool:
            if i == j:
                return True
            if j >= history:
                return False
            if i < contextual:
                return True
            distance = place[i] - place[j]
            return distance > 0 and (not window or distance <= window)

        found = causal(history, candidates, start=start, window=window, contextual=contextual)
        assert_sees(found, sees, start, history + candidates)

    @given(st.data())
    def test_mtgr(self, data: st.DataObject):
        groups = data.draw(st.lists(st.sampled_from([0, 1]), max_size=6))
        realtime = sorted(data.draw(st.lists(st.integers(10, 15), max_size=6)))
        times = [0] * len(groups) + realtime
        groups += [2] * len(realtime)
        for _ in range(data.draw(st.integers(0, 3))):
            groups.append(3)
            times.append(data.draw(st.integers(9, 16)))
        start = data.draw(st.integers(0, len(groups)))

        def sees(i: int, j: int) -> bool:
            if i == j or groups[j] < 2:
                return True
            return groups[j] == 2 and groups[i] >= 2 and times[i] > times[j]

        assert_sees(mtgr(groups, times, start=start), sees, start, len(groups))

    @pytest.mark.parametrize(
        ("groups", "times", "message"),
        [
            ([2, 2], [5, 4], "sorted by time"),
            ([2, 1], [5, 4], "in the order"),
            ([3, 2], [5, 4], "in the order"),
            ([4], [5], "from 0 to 3"),
            ([0, 0], [5], "same"),
        ],
    )
    def test_what_is_no_interval_is_refused(
        self, groups: list[int], times: list[int], message: str
    ):
        with pytest.raises(ValueError, match=message):
            mtgr(groups, times)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"history": -1}, "history is -1"),
            ({"history": 3, "contextual": 4}, "contextual is 4; expected 0 to 3"),
            ({"history": 3, "window": -1}, "window is -1"),
            ({"history": 3, "candidates": 2, "start": 6}, "start is 6; expected 0 to 5"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, arguments: dict[str, int], message: str):
        with pytest.raises(ValueError, match=message):
            causal(**arguments)


def assert_sees(found: Intervals, sees: Any, start: int, total: int) -> None:
    low, high, own = (column.tolist() for column in found)
    assert len(low) == total - start
    for i in range(start, total):
        said = {*range(low[i - start], high[i - start]), own[i - start]}
        assert said == {j for j in range(total) if sees(i, j)}, i


def test_cached_keys_give_what_a_whole_pass_gives():
    """Two users, one with 30 of 40 tokens cached: queries of the new tokens alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(65, 2, 8, generator=generator) for _ in range(3))
    offsets = torch.tensor([0, 45, 65])
    whole = hstu_attention(
        q, k, v, offsets, offsets, *joined([causal(40, 5), causal(20)]), alpha=0.3, divisor=40.0
    )
    part = hstu_attention(
        q[30:],
        k,
        v,
        torch.tensor([0, 15, 35]),
        offsets,
        *joined([causal(40, 5, start=30), causal(20)]),
        alpha=0.3,
        divisor=40.0,
    )
    torch.testing.assert_close(part, whole[30:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_proper_torch_op(dtype: torch.dtype, bias: bool):
    call = random_call(2, [(3, 5), (4, 4)], bias=bias).to(dtype)
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, call.tensors, call.keywords)


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return hstu_attention(q, k, v, *rest, alpha=0.5, divisor=7.0) * 2


def test_export_and_compile_see_it():
    call = random_call(3, [(3, 5), (4, 4)]).to(torch.float32)
    eager = Attention()(*call.tensors)
    tokens = torch.export.Dim("tokens", max=1000)
    keys = torch.export.Dim("keys", max=1000)
    jagged = [{0: tokens}, {0: keys}, {0: keys}, None, None, *[{0: tokens}] * 3]
    exported = torch.export.export(
        Attention(), call.tensors, dynamic_shapes=(*jagged[:3], tuple(jagged[3:]))
    )
    assert "gr.hstu_attention" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*call.tensors), eager, rtol=0, atol=0)
    longer = random_call(4, [(8, 5), (4, 9)]).to(torch.float32)
    torch.testing.assert_close(
        exported.module()(*longer.tensors), Attention()(*longer.tensors), rtol=0, atol=0
    )
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*call.tensors), eager, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(7, 2)}, "three axes"),
        ({0: torch.zeros(7, 2, 9)}, r"q has \(heads, columns\) \(2, 9\), k \(2, 8\)"),
        ({2: torch.zeros(8, 2, 8)}, r"v \(8, 2\); expected the same"),
        ({2: torch.zeros(9, 2, 8).double()}, "one floating-point dtype"),
        ({3: torch.tensor([0, 3, 8])}, "query_offsets must be .* at most 7"),
        ({3: torch.tensor([3, 0])}, "must not decrease"),
        ({3: torch.tensor([0, 7])}, "of 1 sequences, key_offsets of 2"),
        ({5: torch.zeros(6, dtype=torch.int32)}, r"low is .* expected int32 of shape \(7,\)"),
        (
            {6: torch.full((7,), 5, dtype=torch.int32)},
            "sequence 1 has 4 keys; .* at most 4",
        ),
        ({7: torch.full((7,), 4, dtype=torch.int32)}, "own from -1 to 3"),
    ],
)
def test_mistakes_are_named(name: str, change: dict[int, Tensor], message: str):
    call = random_call(5, [(3, 5), (4, 4)]).to(torch.float32)
    tensors = [change.get(i, tensor) for i, tensor in enumerate(call.tensors)]
    with pytest.raises(ValueError, match=message):
        IMPLEMENTATIONS[name](*tensors, **call.keywords)
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\); expected \(31,\)"):
        IMPLEMENTATIONS[name](*call.tensors, alpha=1.0, divisor=1.0, bias=torch.zeros(3))
