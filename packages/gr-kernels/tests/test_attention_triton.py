"""Attention in Triton, with keys in blocks and not: its numbers, and that it compiles for GPUs.

See `.triton_kernels` for where they run. Shapes as in `gr_kernels.ops.hstu_attention.on_device`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core.testing.kernels import FLOOR, SLACK, relative_error
from gr_kernels.ops.hstu_attention import Intervals, causal, reference
from gr_kernels.ops.hstu_attention import triton as module
from gr_kernels.ops.hstu_attention.on_device import CachedKeys, TableBias
from gr_kernels.ops.hstu_stack.time_buckets import LOG_BUCKET_WIDTH, thresholds

from .test_attention import random_call
from .test_paged_attention import arbitrary, kinds
from .triton_kernels import (
    DEVICES,
    SHARED_BYTES,
    Recorded,
    device_for,
    needs_triton,
    not_interpreted,
    run_on_the_interpreter,
)

pytestmark = needs_triton

ALPHA, DIVISOR = 0.3, 7.0
BLOCK = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(16, 16), (64, 64), (25, 33), (7, 130), (256, 256), (128, 32)]
NAN = float("nan")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return device_for(request.param, monkeypatch)


@dataclass(frozen=True, slots=True)
class User:
    """One sequence in float64: its last T tokens, or those given, are queries; all are keys."""

    q_THK: Tensor
    k_SHK: Tensor
    v_SHV: Tensor
    low_T: Tensor
    high_T: Tensor
    own_T: Tensor
    bias_TS: Tensor | None = None
    history: int = 0
    times_S: Tensor | None = None
    next_times_T: Tensor | None = None


def user(
    seed: int,
    intervals: Intervals,
    keys: int | None = None,
    *,
    heads: int = 2,
    d_qk: int = 8,
    d_v: int = 8,
    bias: bool = False,
) -> User:
    rng = np.random.default_rng(seed)
    low_T, high_T, own_T = intervals
    queries = len(low_T)
    keys = queries if keys is None else keys

    def normal(*shape: int) -> Tensor:
        # What every precision can hold, so that all of them compute the same problem.
        return torch.from_numpy(rng.normal(size=shape)).bfloat16().double()

    return User(
        normal(queries, heads, d_qk),
        normal(keys, heads, d_qk),
        normal(keys, heads, d_v),
        low_T,
        high_T,
        torch.full_like(low_T, -1) if own_T is None else own_T,
        normal(queries, keys) if bias else None,
    )


def right(users: Sequence[User], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the op's definition says."""
    found = []
    for one in users:
        offsets = (torch.tensor([0, len(rows)]) for rows in (one.q_THK, one.k_SHK))
        rows = (x.to(dtype) for x in (one.q_THK, one.k_SHK, one.v_SHV))
        bias = None if one.bias_TS is None else one.bias_TS.flatten().to(dtype)
        places = (one.low_T, one.high_T, one.own_T)
        found.append(reference.hstu_attention(*rows, *offsets, *places, ALPHA, DIVISOR, bias))
    return found


def compute(
    users: Sequence[User],
    dtype: torch.dtype = torch.float32,
    *,
    device: str,
    counts: Sequence[int] | None = None,
    padding: int = 1,
    bias: TableBias | None = None,
    offsets_dtype: torch.dtype = torch.int32,
) -> list[Tensor]:
    """The users' rows of one call, the first ``counts`` keys of each in blocks.

    All that nobody sees is NaN: ``padding`` rows around q, k and v, what of the blocks is behind a
    sequence's keys or another layer's, and a's rows before the call. q, k and v are parts of wider
    rows.
    """
    heads = users[0].q_THK.shape[1]
    stored = [0] * len(users) if counts is None else list(counts)

    def rows(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts).to(dtype)
        wide = torch.nn.functional.pad(joined, (0, 0, 0, 0, padding, padding), value=NAN)
        # A part of a projection: other columns before and behind those of all heads.
        padded = torch.nn.functional.pad(wide.flatten(1), (8, 16), value=NAN).to(device)
        return padded[:, 8:-16].unflatten(1, (heads, -1))

    def offsets(lengths: list[int]) -> Tensor:
        ends = padding + np.concatenate([[0], np.cumsum(lengths)])
        return torch.from_numpy(ends).to(device, offsets_dtype)

    def places(name: str) -> Tensor:
        joined = torch.cat([getattr(one, name) for one in users])
        return torch.nn.functional.pad(joined, (padding, padding), value=2**30).to(device)

    q_THK = rows([one.q_THK for one in users])
    out_THV = torch.full((len(q_THK), heads, users[0].v_SHV.shape[2]), NAN, dtype=dtype)
    out_THV = out_THV.to(device)
    cached = None
    if counts is not None:
        _memory, cached = in_blocks(users, stored, dtype, device)
    pairs = None
    if users[0].bias_TS is not None:
        pairs = torch.cat([one.bias_TS.flatten() for one in users if one.bias_TS is not None])
        pairs = pairs.float().to(device)
    found = module.attend(
        q_THK,
        rows([one.k_SHK[count:] for one, count in zip(users, stored, strict=True)]),
        rows([one.v_SHV[count:] for one, count in zip(users, stored, strict=True)]),
        offsets([len(one.q_THK) for one in users]),
        offsets([len(one.k_SHK) - count for one, count in zip(users, stored, strict=True)]),
        places("low_T"),
        places("high_T"),
        places("own_T"),
        ALPHA,
        DIVISOR,
        max(len(one.q_THK) for one in users),
        cached,
        pairs if bias is None else bias,
        out_THV,
    )
    assert found is out_THV
    found = found.cpu()
    assert (found[:padding] == 0).all()
    assert (found[len(found) - padding :] == 0).all()
    return list(found[padding : len(found) - padding].split([len(one.q_THK) for one in users]))


def in_blocks(
    users: Sequence[User], counts: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[Tensor, CachedKeys]:
    """The second of three layers of blocks in any order; the memory has to outlive them."""
    heads, d_qk = users[0].k_SHK.shape[1:]
    d_v = users[0].v_SHV.shape[2]
    part = heads * BLOCK * (d_qk + d_v)
    numbers = [-(-count // BLOCK) for count in counts]
    memory = torch.full((sum(numbers) + 1, 3, part), NAN, dtype=dtype)
    order = np.random.default_rng(0).permutation(len(memory))
    taken = iter(order)
    # Behind the last address comes what is none.
    which = torch.full((len(users), max(numbers, default=0) + 3), -5)
    for b, (one, count) in enumerate(zip(users, counts, strict=True)):
        for m in range(numbers[b]):
            which[b, m] = block = int(next(taken))
            k_HK, v_HV = memory[block, 1].split([heads * BLOCK * d_qk, heads * BLOCK * d_v])
            tokens = slice(m * BLOCK, min(count, (m + 1) * BLOCK))
            size = tokens.stop - tokens.start
            k_HK.view(heads, BLOCK, d_qk)[:, :size] = one.k_SHK[tokens].transpose(0, 1)
            v_HV.view(heads, BLOCK, d_v)[:, :size] = one.v_SHV[tokens].transpose(0, 1)
    memory = memory.to(device)
    block_bytes = 3 * part * memory.element_size()
    addresses = torch.where(which < 0, 3, memory.data_ptr() + which * block_bytes)
    return memory, CachedKeys(
        addresses.to(device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        part * memory.element_size(),
    )


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return relative_error(*([torch.cat(x).double().numpy()] for x in (found, expected)))


def parts_of(users: Sequence[User]) -> list[list[int] | None]:
    """None, some and all of the keys in blocks."""
    lengths = [len(one.k_SHK) for one in users]
    return [None, [0] * len(users), [n // 2 for n in lengths], lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_qk", "d_v"), SHAPES)
def test_heads_of_any_size(device: str, d_qk: int, d_v: int, dtype: torch.dtype):
    """Many queries, and few: other tiles."""
    for intervals, count in ((causal(61, 9), 40), (causal(75, 4, start=67), 61)):
        keys = int(intervals.own_T.max()) + 1
        one = user(d_v, intervals, keys, d_qk=d_qk, d_v=d_v, bias=d_v == 33)
        expected = right([one])
        allowed = SLACK * error(right([one], dtype), expected) + FLOOR
        for counts in (None, [count]):
            assert error(compute([one], dtype, counts=counts, device=device), expected) < allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", kinds())
def test_masks(device: str, kind: str, bias: bool):
    intervals, _ = kinds()[kind]
    users = [user(seed, intervals, heads=1, d_qk=20, d_v=33, bias=bias) for seed in (1, 2)]
    expected = right(users)
    for counts in parts_of(users)[:: 2 - bias]:
        assert error(compute(users, counts=counts, device=device), expected) < 1e-5


@pytest.mark.parametrize("kind", kinds())
def test_the_last_tokens_alone(device: str, kind: str):
    """Queries after tokens that are keys only, in blocks."""
    intervals, _ = kinds()[kind]
    tokens = len(intervals.low_T)
    start = tokens * 2 // 3
    last = Intervals(*(None if x is None else x[start:] for x in intervals))  # type: ignore[arg-type]
    one = user(5, last, tokens, heads=1)
    found = compute([one], counts=[start], device=device)
    assert error(found, right([one])) < 1e-5


JAGGED = [(0, 0), (1, 1), (0, 7), (65, 65), (3, 0), (33, 131), (0, 0), (2, 64), (64, 31), (17, 1)]


def any_intervals(seed: int, queries: int, keys: int) -> Intervals:
    """Empty ones among them, and with an own key anywhere or none."""
    rng = np.random.default_rng(seed)
    columns = (
        rng.integers(0, keys + 1, queries),
        rng.integers(0, keys + 1, queries),
        rng.integers(-1, keys, queries),
    )
    return Intervals(*(torch.from_numpy(x.astype(np.int32)) for x in columns))


def test_jagged_lengths(device: str):
    """None, one and many queries beside each other: each finds its own block of rows."""
    users = [user(i, any_intervals(i, *sizes), sizes[1]) for i, sizes in enumerate(JAGGED)]
    expected = right(users)
    for padding, counts in zip((0, 70, 1, 0), parts_of(users), strict=True):
        found = compute(users, counts=counts, padding=padding, device=device)
        assert error(found, expected) < 1e-5


# The fixture sets a variable for all examples alike.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_it_computes_the_equation(device: str, data: st.DataObject):
    lengths = st.tuples(st.integers(0, 40), st.integers(0, 110))
    users = [
        user(seed, any_intervals(seed, *sizes), sizes[1], heads=1)
        for seed, sizes in enumerate(data.draw(st.lists(lengths, min_size=1, max_size=4)))
    ]
    counts = [data.draw(st.integers(0, len(one.k_SHK))) for one in users]
    found = compute(users, counts=counts, device=device)
    assert error(found, right(users)) < 1e-5


@pytest.mark.parametrize("launch", [(16, 128), (32, 16), (128, 64)])
def test_tiles_of_any_size(device: str, launch: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    config = {"M": launch[0], "N": launch[1], "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(module, "configuration", lambda *_: config)
    users = [user(i, arbitrary(i, n), heads=1, bias=True) for i, n in enumerate((131, 20))]
    for counts in parts_of(users)[::2]:
        assert error(compute(users, counts=counts, device=device), right(users)) < 1e-5


P, BUCKETS = 150, 60


def timed(seed: int, one: User, candidates: int, *, position: bool, time: bool) -> User:
    """With times of its tokens, and the bias that tables give its pairs; queries are all tokens.

    The bias is what the stack's reference computes, see its ``_Bias``.
    """
    rng = np.random.default_rng(seed)
    tokens = len(one.k_SHK)
    history = tokens - candidates
    times = 1_700_000_000 + np.cumsum(rng.integers(0, 2 ** rng.integers(1, 30, tokens)))
    next_times = np.append(times[1:], times[-1:])
    # Gaps at, before and behind each threshold.
    edges = np.repeat(thresholds(BUCKETS)[: tokens // 6], 3) + np.tile([-1, 0, 1], tokens // 6)
    next_times[: len(edges)] = times[tokens // 2] + edges
    position_S = np.minimum(np.arange(tokens), history)
    at = position_S - position_S[:, None] + P - 1
    gap = torch.from_numpy(np.maximum(np.abs(next_times[:, None] - times), 1))
    bucket = (gap.float().log() / LOG_BUCKET_WIDTH).long().clamp(max=BUCKETS - 1)
    by_position, by_time = tables()
    return replace(
        one,
        bias_TS=(by_position[at] * position + by_time[bucket] * time).double(),
        history=history,
        times_S=torch.from_numpy(times),
        next_times_T=torch.from_numpy(next_times),
    )


def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2 * P - 1, generator=generator), torch.randn(BUCKETS, generator=generator)


def table_bias(
    users: Sequence[User], device: str, *, position: bool, time: bool, padding: int = 1
) -> TableBias:
    by_position, by_time = (table.to(device) for table in tables())
    histories_B = torch.tensor([one.history for one in users]).int().to(device)
    bias = TableBias(histories_B)
    pad = (padding, padding)
    if position:
        positions = [torch.arange(len(one.q_THK)).clamp(max=one.history) for one in users]
        positions_T = torch.nn.functional.pad(torch.cat(positions).int(), pad, value=2**30)
        bias = replace(bias, position=by_position, positions_T=positions_T.to(device))
    if time:
        all_times = [one.times_S for one in users if one.times_S is not None]
        next_times = torch.cat([one.next_times_T for one in users if one.next_times_T is not None])
        starts = 3 + np.cumsum([0, *map(len, all_times[:-1])])
        bias = replace(
            bias,
            time=by_time,
            thresholds=torch.from_numpy(thresholds(BUCKETS)).to(device),
            times=torch.nn.functional.pad(torch.cat(all_times), (3, 0)).to(device),
            time_offsets_B=torch.from_numpy(starts).to(device),
            next_times_T=torch.nn.functional.pad(next_times, pad).to(device),
        )
    return bias


@pytest.mark.parametrize(("position", "time"), [(True, True), (True, False), (False, True)])
def test_biases_read_from_tables(device: str, position: bool, time: bool):
    parts = [(causal(90, 11), 11), (causal(1), 0), (any_intervals(2, 67, 67), 5)]
    users = []
    for seed, (intervals, candidates) in enumerate(parts):
        one = user(seed, intervals)
        users.append(timed(seed, one, candidates, position=position, time=time))
    expected = right(users)
    bias = table_bias(users, device, position=position, time=time)
    for counts in parts_of(users)[::2]:
        assert error(compute(users, counts=counts, bias=bias, device=device), expected) < 1e-5


@pytest.mark.parametrize("buckets", [1, 2, 3, 130])
def test_tables_by_time_of_any_size(device: str, buckets: int):
    """Gaps of all sizes, at and around the least of each bucket."""
    edges = [thresholds(130)[:, None] + np.arange(-1, 2), 2 ** np.arange(61), [0]]
    gap = np.unique(np.maximum(np.concatenate([np.ravel(x) for x in edges]), 0))
    bucket = np.searchsorted(thresholds(buckets), gap, side="right")
    table = torch.arange(buckets).float()
    # One key, whose score is the bias and value 1: a query's result tells its bucket.
    queries = len(gap)
    rows = (torch.zeros(queries, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    zeros, ones = torch.zeros(queries).int(), torch.ones(queries).int()
    for signed in (gap, -gap):
        bias = TableBias(
            torch.zeros(1).int().to(device),
            time=table.to(device),
            thresholds=torch.from_numpy(thresholds(buckets)).to(device),
            times=torch.zeros(1).long().to(device),
            time_offsets_B=torch.zeros(1).long().to(device),
            next_times_T=torch.from_numpy(signed).to(device),
        )
        places = (torch.tensor([0, queries]), torch.tensor([0, 1]), zeros, ones, -ones)
        tensors = (x.to(device) for x in (*rows, *places))
        found = module.attend(*tensors, 1.0, 1.0, queries, bias=bias)
        expected = torch.nn.functional.silu(table)[torch.from_numpy(bucket)]
        torch.testing.assert_close(found.flatten().cpu(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_the_op(device: str, bias: bool):
    """Its arguments need not be where the tensors are, nor contiguous."""
    call = random_call(3, [(5, 7), (0, 3), (70, 40), (1, 1)], d_v=20, bias=bias, padding=2)
    expected = call.run(reference.hstu_attention)
    q, k, v, *places = call.to(torch.float32).tensors
    q, k, v = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    keywords = call.to(torch.float32).keywords
    found = module.hstu_attention(q, k, v, *places, **keywords)
    assert error([found.cpu()], [expected]) < 1e-5
    moved = (x.to(device) for x in places)
    torch.testing.assert_close(module.hstu_attention(q, k, v, *moved, **keywords), found)


def test_nothing_to_do(device: str):
    for tokens, heads, sequences in ((0, 2, 3), (5, 2, 0), (5, 0, 1), (0, 2, 0)):
        rows = torch.full((tokens, heads, 8), NAN).to(device)
        offsets = torch.zeros(sequences + 1).int().to(device)
        places = torch.zeros(tokens).int().to(device)
        out = torch.full((tokens, heads, 8), NAN).to(device)
        call = (rows, rows, rows, offsets, offsets, places, places, places, ALPHA, DIVISOR)
        assert module.attend(*call, 5, out_THV=out) is out
        assert (out == 0).all()
        assert (module.hstu_attention(*call) == 0).all()


@pytest.mark.gpu
@not_interpreted
def test_in_a_cuda_graph():
    """So nothing waits for the device; other lengths may follow in the same tensors."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = [torch.randn(90, 2, 64, device="cuda") for _ in range(3)]
    offsets = torch.tensor([0, 40, 90], device="cuda")
    low = torch.zeros(90, device="cuda").int()
    own = torch.cat([torch.arange(40), torch.arange(50)]).int().cuda()
    pairs = torch.randn(90 * 90, device="cuda")

    def call() -> Tensor:
        tensors = (*rows, offsets, offsets, low, own, own)
        return module.attend(*tensors, ALPHA, DIVISOR, 90, bias=pairs)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    offsets.copy_(torch.tensor([0, 1, 90]))
    own.copy_(torch.cat([torch.arange(1), torch.arange(89)]))
    graph.replay()
    torch.testing.assert_close(found, call())


@pytest.mark.slow
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)


def compile_one(
    capability: int,
    dtype: torch.dtype,
    d_qk: int,
    d_v: int,
    queries: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """The kernel as a device of that capability runs it by default, with its tanh."""
    from gr_kernels.ops.hstu_attention import triton_kernels

    recorded = Recorded(triton_kernels)
    monkeypatch.setattr(module, "_kernels", lambda: recorded)
    monkeypatch.setattr(module, "_device", lambda: (capability, SHARED_BYTES[capability]))
    module._default.cache_clear()
    rows = [torch.zeros(64, 2, d, dtype=dtype) for d in (d_qk, d_qk, d_v)]
    places = [torch.zeros(64, dtype=torch.int32) for _ in range(3)]
    offsets = torch.tensor([0, 32, 64])
    cached = (
        CachedKeys(torch.zeros(2, 16).long(), torch.zeros(2).int(), 64) if "c" in kind else None
    )
    bias: TableBias | Tensor | None = torch.zeros(32 * 64) if "p" in kind else None
    if "t" in kind:
        long = [torch.zeros(n).long() for n in (63, 64, 2, 64)]
        bias = TableBias(torch.zeros(2).int(), torch.zeros(199), places[0], torch.zeros(64), *long)
    module.attend(*rows, offsets, offsets, *places, ALPHA, DIVISOR, queries, cached, bias)
    module._default.cache_clear()
    launches = recorded.launches["attend"]
    launches.given[0][1]["TANH"] = dtype != torch.float32
    return launches.compile(capability)


@not_interpreted
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(
    ("dtype", "d_qk", "d_v", "queries", "kind"),
    [
        (torch.bfloat16, 64, 64, 1000, "c"),
        (torch.float16, 25, 33, 20, "ct"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (torch.bfloat16, 64, 64, 5, "c"),
                (torch.bfloat16, 256, 256, 1000, "c"),
                (torch.float16, 32, 128, 300, "p"),
                (torch.float32, 128, 128, 1000, "ct"),
            )
        ),
    ],
)
def test_it_compiles(
    capability: int,
    dtype: torch.dtype,
    d_qk: int,
    d_v: int,
    queries: int,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    compiled = compile_one(capability, dtype, d_qk, d_v, queries, kind, monkeypatch)
    if d_qk * dtype.itemsize % 16 == 0:
        # Keys come in copies of 16 bytes that run ahead of the products.
        assert "cp.async" in compiled.asm["ptx"]
    if capability == 90 and queries >= 64 and dtype != torch.float32:
        assert "wgmma" in compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", module.DTYPES.values())
@pytest.mark.parametrize(("d_qk", "d_v"), [(16, 16), (64, 64), (128, 128), (256, 256), (32, 256)])
def test_configurations_are_what_products_take(d_qk: int, d_v: int, dtype: str):
    """tl.dot wants powers of two, from 16 on."""
    for queries in (1, 16, 64, 4096):
        sizes = {"d_qk": d_qk, "d_v": d_v, "queries": queries}
        found = module.configurations(dtype, sizes)
        assert len(found) > 1
        assert all(found.count(one) == 1 for one in found)
        for one in found:
            assert {"M", "N", "num_warps", "num_stages"} <= set(one)
            assert {one["M"], one["N"]} <= {16, 32, 64, 128}
            assert one["num_warps"] in (4, 8)


def test_what_it_does_not_compute_is_refused():
    def call(dtype: torch.dtype = torch.float32, d_qk: int = 8, d_v: int = 8, **others: Any) -> Any:
        rows = [torch.zeros(3, 1, d, dtype=dtype) for d in (d_qk, d_qk, d_v)]
        places = {name: torch.zeros(3).int() for name in ("low_T", "high_T", "own_T")}
        offsets = {name: torch.tensor([0, 3]) for name in ("query_offsets", "key_offsets")}
        return module.hstu_attention(*rows, **offsets | places | others, alpha=1.0, divisor=1.0)

    with pytest.raises(ValueError, match=r"q is torch\.float64.*hstu_attention-reference"):
        call(torch.float64)
    with pytest.raises(ValueError, match=r"300 columns of Q and K and 8 of V.*reference"):
        call(d_qk=300)
    with pytest.raises(ValueError, match="query_offsets are of 2 sequences, key_offsets of 1"):
        call(query_offsets=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"low is torch\.float32 \(3,\)"):
        call(low_T=torch.zeros(3))
    rows = torch.zeros(3, 1, 8)
    offsets, places = torch.tensor([0, 3]), torch.zeros(3).int()
    arguments = (rows, rows, rows, offsets, offsets, places, places, places, 1.0, 1.0, 3)
    with pytest.raises(ValueError, match=r"out is torch\.float32 \(3, 1, 9\)"):
        module.attend(*arguments, out_THV=torch.zeros(3, 1, 9))
    with pytest.raises(ValueError, match="q has columns 2 numbers apart"):
        module.attend(torch.zeros(3, 1, 16)[..., ::2], *arguments[1:])


def test_a_device_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch):
    sizes = {"d_qk": 256, "d_v": 256, "queries": 4096}
    monkeypatch.setattr(module, "_device", lambda: (89, 99 * 1024))
    assert module.configurations("bfloat16", sizes)[0]["M"] == 64
    monkeypatch.setattr(module, "_device", lambda: (75, 8 * 1024))
    assert module.configurations("bfloat16", sizes)[0]["M"] == 16
