"""`TorchStack` against the equations, written once more as loops over tokens in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_kernels.ops.hstu_stack.interface import HSTUStack, Rows
from gr_kernels.ops.hstu_stack.reference import TorchStack

from .stacks import GATES, Blocks, equations, random_request, random_stack, run_whole

VARIANTS = {
    "ranking": {"gate": "u,a,u*norm(a)", "projection_silu": "u"},
    "ranking with head norms": {"gate": "u,a,u*norm(a)", "head_norm": True},
    "research": {
        "gate": "u*norm(a)",
        "projection_silu": "all",
        "affine": False,
        "positions": 60,
        "time_buckets": 30,
    },
    "research, concatenated": {"gate": "u,norm(a),u*norm(a)", "affine": False, "positions": 60},
    "research, no activation": {"gate": "u*norm(a)", "projection_silu": "none", "biases": False},
    "mtgr": {"gate": "norm(a*u)", "projection_silu": "all", "groups": 4},
    "uneven heads": {"d_qk": 5, "d_v": 11, "num_heads": 3, "d_model": 17},
}
KINDS = ("causal", "window", "prefix", "arbitrary")


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_equations(name: str, kind: str):
    stack = random_stack(**VARIANTS[name])
    request = random_request(stack, 1, history=37, candidates=9, kind=kind)
    right = equations(stack, request)
    exact = run_whole(TorchStack(stack, "float64"), request, torch.float64)
    assert error(exact, right) < 1e-12
    assert error(run_whole(TorchStack(stack), request), right) < 1e-6
    # Roundings of 2**-9 at every step, which a norm of few summands makes larger.
    assert error(run_whole(TorchStack(stack, "bfloat16"), request), right) < 4e-2


@settings(max_examples=40)
@given(st.data())
def test_any_split_any_company_gives_the_same(data: st.DataObject):
    """Random stacks and requests; cached and new tokens split anywhere, candidates too."""
    seed = data.draw(st.integers(0, 2**16))
    stack = random_stack(
        seed,
        layers=data.draw(st.integers(1, 3)),
        d_model=data.draw(st.sampled_from([1, 8, 13])),
        num_heads=data.draw(st.integers(1, 3)),
        d_qk=data.draw(st.sampled_from([1, 4, 7])),
        d_v=data.draw(st.sampled_from([2, 5])),
        gate=data.draw(st.sampled_from(GATES)),
        projection_silu=data.draw(st.sampled_from(["none", "u", "all"])),
        head_norm=data.draw(st.booleans()),
        groups=data.draw(st.sampled_from([1, 3])),
        biases=data.draw(st.booleans()),
        affine=data.draw(st.booleans()),
        positions=data.draw(st.sampled_from([0, 200])),
        time_buckets=data.draw(st.sampled_from([0, 20])),
    )
    requests = [
        random_request(
            stack,
            seed + i,
            history=data.draw(st.integers(0, 70)),
            candidates=data.draw(st.integers(0, 5)),
            kind=data.draw(st.sampled_from(KINDS)),
        )
        for i in range(data.draw(st.integers(1, 3)))
    ]
    runner = TorchStack(stack, "float64")
    memory = Blocks(runner)
    blocks = [memory.of(request.history) for request in requests]
    ends = []
    for request in requests:
        cuts = request.cuts()
        chosen = data.draw(st.sets(st.sampled_from(cuts), max_size=3)) if cuts else set()
        ends.append([*sorted(chosen), len(request.low)])
    found = [torch.full_like(request.x_TD, torch.nan) for request in requests]
    starts = [0] * len(requests)
    while any(ends):
        turn = [i for i, left in enumerate(ends) if left]
        pieces = [(i, starts[i], ends[i].pop(0)) for i in turn]
        x_TD = torch.cat([requests[i].x_TD[start:stop] for i, start, stop in pieces])
        segments = [
            requests[i].segment(blocks[i], start, stop, Rows.ALL) for i, start, stop in pieces
        ]
        runner.run(x_TD, segments)
        for i, start, stop in pieces:
            found[i][start:stop], x_TD = x_TD[: stop - start], x_TD[stop - start :]
            starts[i] = stop
    for request, one in zip(requests, found, strict=True):
        torch.testing.assert_close(one, equations(stack, request), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rows", [Rows.CANDIDATES, Rows.CANDIDATES_AND_LAST])
@pytest.mark.parametrize("candidates", [0, 7])
def test_wanted_rows_are_those_of_a_full_pass(rows: Rows, candidates: int):
    stack = random_stack()
    request = random_request(stack, 3, history=41, candidates=candidates)
    runner = TorchStack(stack, "float64")
    whole = run_whole(runner, request, torch.float64)
    found = run_whole(runner, request, torch.float64, rows)
    first = 41 - (rows is Rows.CANDIDATES_AND_LAST)
    torch.testing.assert_close(found[first:], whole[first:], rtol=1e-12, atol=1e-12)


def test_keys_of_tokens_whose_rows_nobody_wants_are_kept():
    """After a pass for the candidates alone, later tokens and other candidates go on from it."""
    stack = random_stack()
    request = random_request(stack, 4, history=50, candidates=6)
    runner = TorchStack(stack, "float64")
    memory = Blocks(runner)
    blocks = memory.of(50)
    for start, stop in ((0, 33), (33, 50)):
        runner.run(
            request.x_TD[start:stop].clone(),
            [request.segment(blocks, start, stop, Rows.CANDIDATES)],
        )
    x_TD = request.x_TD[50:].clone()
    runner.run(x_TD, [request.segment(blocks, 50, 56, Rows.CANDIDATES)])
    torch.testing.assert_close(x_TD, equations(stack, request)[50:], rtol=1e-9, atol=1e-11)


def test_segments_of_one_run_may_read_what_another_writes():
    """Two requests with the same history: one computes it, both score their candidates on it."""
    stack = random_stack()
    request = random_request(stack, 5, history=45, candidates=8)
    runner = TorchStack(stack, "float64")
    memory = Blocks(runner)
    blocks = memory.of(45)
    x_TD = request.x_TD.clone()
    first = request.segment(blocks, 0, 48)
    second = request.segment(blocks, 48, 53)
    for order in ([first, second], [second, first]):
        parts = [request.x_TD[:48], request.x_TD[48:]]
        if order[0] is second:
            parts.reverse()
        x_TD = torch.cat(parts)
        runner.run(x_TD, order)
        if order[0] is second:
            x_TD = torch.cat([x_TD[5:], x_TD[:5]])
        torch.testing.assert_close(x_TD, equations(stack, request), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_histories_are_computed_block_by_block(dtype: str):
    """Longer than several blocks of queries and keys; against the same in float64."""
    stack = random_stack(layers=1)
    request = random_request(stack, 6, history=1500, candidates=140, kind="window")
    right = run_whole(TorchStack(stack, "float64"), request, torch.float64)
    allowed = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    assert error(run_whole(TorchStack(stack, dtype), request), right) < allowed
    causal = random_request(stack, 6, history=1500, candidates=140)
    right = run_whole(TorchStack(stack, "float64"), causal, torch.float64)
    assert error(run_whole(TorchStack(stack, dtype), causal), right) < allowed


def test_nothing_to_do_is_fine():
    stack = random_stack()
    runner = TorchStack(stack)
    x_TD = torch.empty(0, stack.d_model)
    runner.run(x_TD, [])
    request = random_request(stack, 0, history=0, candidates=0)
    runner.run(x_TD, [request.segment(np.empty(0, np.uintp), 0, 0)])


def test_mistakes_are_named():
    stack = random_stack(groups=2)
    request = random_request(stack, 0, history=40, candidates=1)
    runner: HSTUStack = TorchStack(stack)
    memory = Blocks(runner)
    segment = request.segment(memory.of(40), 0, 41)
    with pytest.raises(ValueError, match=r"x has the shape \(40, 24\).* \(41, 24\)"):
        runner.run(torch.zeros(40, 24), [segment])
    with pytest.raises(ValueError, match="need 2 blocks; there are 1"):
        runner.run(torch.zeros(41, 24), [replace(segment, blocks=segment.blocks[:1])])
    with pytest.raises(ValueError, match="no groups"):
        runner.run(torch.zeros(41, 24), [replace(segment, groups=None)])
    with pytest.raises(ValueError, match="'int3'; expected one of float32"):
        TorchStack(stack, "int3")
