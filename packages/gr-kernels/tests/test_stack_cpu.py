"""The stack in C++, on every instruction set of this processor: right, and the same bits always."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core.errors import PlanError
from gr_core.stack import Stack
from gr_kernels.native import DTYPES, instruction_sets, probe
from gr_kernels.ops.hstu_stack.cpu import CpuStack
from gr_kernels.ops.hstu_stack.interface import Rows
from gr_kernels.ops.hstu_stack.reference import TorchStack

from .stacks import GATES, Blocks, Request, random_request, random_stack, run_whole
from .test_stack_reference import KINDS, VARIANTS, error

OK, REASON = probe("float32")
pytestmark = pytest.mark.skipif(not OK, reason=REASON)
WAYS = [(dtype, isa) for dtype in DTYPES for isa in (instruction_sets(dtype) if OK else ())]
"""Every precision on every instruction set."""
SIZES = {
    "heads of the usual width": {"d_model": 256, "num_heads": 4, "d_qk": 64, "d_v": 64},
    "wide heads": {"d_model": 96, "num_heads": 2, "d_qk": 256, "d_v": 130},
    "narrow heads": {"d_model": 50, "num_heads": 2, "d_qk": 25, "d_v": 25},
}


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    dtype, isa = request.param
    return dtype, isa


def cpu(stack: Stack, way: tuple[str, str], threads: int = 1) -> CpuStack:
    dtype, isa = way
    return CpuStack(stack, dtype, threads=threads, isa=isa)


def allowed(stack: Stack, request: Request, dtype: str, right: torch.Tensor) -> float:
    """Twice what plain torch is off by in this precision; torch's own may be small by chance."""
    plain = error(run_whole(TorchStack(stack, dtype), request), right)
    return 2 * plain + {"float32": 1e-6, "bfloat16": 1e-3}[dtype]


@pytest.mark.parametrize("name", [*VARIANTS, *SIZES])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_equations(name: str, kind: str, way: tuple[str, str]):
    stack = random_stack(**(VARIANTS | SIZES)[name])
    request = random_request(stack, 1, history=57, candidates=9, kind=kind)
    right = run_whole(TorchStack(stack, "float64"), request, torch.float64)
    runner = cpu(stack, way)
    assert runner.name == f"cpu-{way[1]}"
    assert error(run_whole(runner, request), right) <= allowed(stack, request, way[0], right)


@pytest.mark.parametrize("history", [0, 1, 2, 31, 32, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("candidates", [0, 1, 5, 47, 48, 49])
def test_any_length(history: int, candidates: int, way: tuple[str, str]):
    stack = random_stack()
    request = random_request(stack, history, history, candidates)
    right = run_whole(TorchStack(stack, "float64"), request, torch.float64)
    runner = cpu(stack, way)
    found = run_whole(runner, request)
    if history + candidates:
        assert error(found, right) <= allowed(stack, request, way[0], right)


@settings(max_examples=60)
@given(st.data())
def test_the_same_bits_however_it_is_computed(data: st.DataObject):
    """Cached or new, split anywhere, alone or in company, on any number of threads."""
    way = data.draw(st.sampled_from(WAYS))
    seed = data.draw(st.integers(0, 2**16))
    stack = random_stack(
        seed,
        layers=data.draw(st.integers(1, 3)),
        d_model=data.draw(st.sampled_from([1, 24, 40])),
        num_heads=data.draw(st.integers(1, 3)),
        d_qk=data.draw(st.sampled_from([1, 16, 25])),
        d_v=data.draw(st.sampled_from([2, 16, 33])),
        gate=data.draw(st.sampled_from(GATES)),
        projection_silu=data.draw(st.sampled_from(["none", "u", "all"])),
        head_norm=data.draw(st.booleans()),
        groups=data.draw(st.sampled_from([1, 3])),
        positions=data.draw(st.sampled_from([0, 300])),
        time_buckets=data.draw(st.sampled_from([0, 20])),
    )
    requests = [
        random_request(
            stack,
            seed + i,
            history=data.draw(st.integers(0, 150)),
            candidates=data.draw(st.integers(0, 60)),
            kind=data.draw(st.sampled_from(KINDS)),
        )
        for i in range(data.draw(st.integers(1, 3)))
    ]
    right = [run_whole(cpu(stack, way), request) for request in requests]
    found = in_turns(
        cpu(stack, way, threads=data.draw(st.integers(1, 3))),
        requests,
        [
            sorted(data.draw(st.sets(st.sampled_from(r.cuts()), max_size=3)) if r.cuts() else [])
            for r in requests
        ],
    )
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)


def in_turns(
    runner: CpuStack, requests: Sequence[Request], cuts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Computes the requests together, each piece by piece."""
    memory = Blocks(runner)
    blocks = [memory.of(request.history) for request in requests]
    ends = [[*c, len(r.low)] for c, r in zip(cuts, requests, strict=True)]
    found = [torch.full(r.x_TD.shape, torch.nan) for r in requests]
    starts = [0] * len(requests)
    while any(ends):
        pieces = [(i, starts[i], ends[i].pop(0)) for i, left in enumerate(ends) if left]
        x_TD = torch.cat([requests[i].x_TD[start:stop] for i, start, stop in pieces]).float()
        runner.run(x_TD, [requests[i].segment(blocks[i], a, b, Rows.ALL) for i, a, b in pieces])
        for i, start, stop in pieces:
            found[i][start:stop], x_TD = x_TD[: stop - start], x_TD[stop - start :]
            starts[i] = stop
    return found


@pytest.mark.parametrize("rows", [Rows.CANDIDATES, Rows.CANDIDATES_AND_LAST])
@pytest.mark.parametrize("candidates", [0, 7])
@pytest.mark.parametrize("layers", [1, 3])
def test_wanted_rows_are_those_of_a_full_pass(
    rows: Rows, candidates: int, layers: int, way: tuple[str, str]
):
    stack = random_stack(layers=layers)
    request = random_request(stack, 3, history=141, candidates=candidates)
    whole = run_whole(cpu(stack, way), request)
    found = run_whole(cpu(stack, way), request, rows=rows)
    first = 141 - (rows is Rows.CANDIDATES_AND_LAST)
    assert torch.equal(found[first:], whole[first:])


def test_blocks_are_good_for_later_after_a_pass_that_wanted_no_rows(way: tuple[str, str]):
    stack = random_stack()
    request = random_request(stack, 4, history=77, candidates=6)
    runner = cpu(stack, way)
    memory = Blocks(runner)
    blocks = memory.of(77)
    for start, stop in ((0, 33), (33, 77)):
        x_TD = request.x_TD[start:stop].float()
        runner.run(x_TD, [request.segment(blocks, start, stop, Rows.CANDIDATES)])
    x_TD = request.x_TD[77:].float()
    runner.run(x_TD, [request.segment(blocks, 77, 83)])
    assert torch.equal(x_TD, run_whole(runner, request)[77:])


def test_segments_of_one_run_may_read_what_another_writes(way: tuple[str, str]):
    stack = random_stack()
    request = random_request(stack, 5, history=45, candidates=8)
    runner = cpu(stack, way, threads=2)
    right = run_whole(runner, request)
    memory = Blocks(runner)
    blocks = memory.of(45)
    first, second = request.segment(blocks, 0, 48), request.segment(blocks, 48, 53)
    x_TD = torch.cat([request.x_TD[48:], request.x_TD[:48]]).float()
    runner.run(x_TD, [second, first])
    assert torch.equal(torch.cat([x_TD[5:], x_TD[:5]]), right)


def test_errors_against_float32_on_a_layer_stack_of_the_work_grid():
    """Not above 0.006 in bfloat16, of which plain torch makes more; 1e-5 in float32."""
    stack = random_stack(layers=4, d_model=256, num_heads=4, d_qk=64, d_v=64, divisor=256.0)
    request = random_request(stack, 7, history=256, candidates=64)
    right = run_whole(TorchStack(stack, "float64"), request, torch.float64)[256:]
    for dtype, isa in WAYS:
        found = run_whole(CpuStack(stack, dtype, isa=isa), request)[256:]
        assert error(found, right) < {"float32": 1e-5, "bfloat16": 6e-3}[dtype], (dtype, isa)


def test_a_bucket_of_time_begins_where_the_module_begins_it():
    """Gaps at the edges of buckets, where rounding decides, and beyond any bucket."""
    stack = random_stack(
        gate="u*norm(a)", projection_silu="all", affine=False, positions=60, time_buckets=129
    )
    request = random_request(stack, 1, history=57, candidates=0)
    gaps = np.unique(np.round(np.exp(0.301 * np.arange(1, 62))).astype(np.int64))
    times = np.zeros(57, np.int64)
    times[: len(gaps)] = -gaps[:57]
    request = replace(request, times=times, next_times=np.zeros(57, np.int64))
    right = run_whole(TorchStack(stack, "float64"), request, torch.float64)
    assert error(run_whole(CpuStack(stack), request), right) < 1e-6


def test_memory_stays_where_it_is_after_the_largest_batch(way: tuple[str, str]):
    stack = random_stack()
    runner = cpu(stack, way)
    run_whole(runner, random_request(stack, 0, 300, 40))
    largest = runner.workspace_bytes
    for length in (1, 299, 17, 300):
        run_whole(runner, random_request(stack, length, length, 40))
    assert 0 < runner.workspace_bytes == largest


def test_two_threads_cannot_run_one_stack(way: tuple[str, str]):
    """One waits for nobody: it is told, and nothing is written twice."""
    stack = random_stack(layers=3, d_model=128, d_qk=64, d_v=64)
    request = random_request(stack, 0, 800, 40)
    runner = cpu(stack, way)
    right = run_whole(runner, request)
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(20):
            try:
                assert torch.equal(run_whole(runner, request), right)
                outcomes.append("ran")
            except ValueError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 40
    assert set(outcomes) <= {"ran", "the stack is running already"}
    assert "ran" in outcomes


def test_mistakes_are_named(way: tuple[str, str]):
    stack = random_stack(groups=2)
    request = random_request(stack, 0, history=40, candidates=1)
    runner = cpu(stack, way)
    memory = Blocks(runner)
    segment = request.segment(memory.of(40), 0, 41)
    x_TD = torch.zeros(41, 24)
    cases = [
        (torch.zeros(40, 24), segment, "x has 40 rows, the segments have 41"),
        (torch.zeros(41, 23), segment, r"expected a contiguous float32 one \(tokens, 24\)"),
        (x_TD.double(), segment, "torch.float64"),
        (x_TD, replace(segment, blocks=segment.blocks[:1]), "segment.blocks is 1 long; expected 2"),
        (x_TD, replace(segment, blocks=segment.blocks + np.uintp(4)), "not aligned"),
        (x_TD, replace(segment, groups=None), "segment.groups is missing"),
        (x_TD, replace(segment, groups=segment.low.astype(np.uint8) + 2), "a group that"),
        (x_TD, replace(segment, high=segment.high + 9), "row 32 sees keys 0 to 41 of 40"),
        (x_TD, replace(segment, low=segment.low - 1), "row 0 sees keys -1"),
        (x_TD, replace(segment, cached=-1), "a negative count"),
    ]
    for x, wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            runner.run(x, [wrong])
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.run(x_TD, [segment])
    with pytest.raises(PlanError, match="'sse2' are not to be had; this processor has"):
        CpuStack(stack, isa="sse2")
    with pytest.raises(PlanError, match="for int3"):
        CpuStack(stack, "int3")
    with pytest.raises(PlanError, match="threads are not 1 to 1024"):
        CpuStack(stack, threads=0)
