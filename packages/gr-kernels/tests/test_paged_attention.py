"""The op `hstu_paged_attention`: its implementations against the op on plain keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core.errors import PlanError
from gr_core.plugins.host import PluginHost
from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels import choice, native
from gr_kernels.ops.hstu_attention import Intervals, causal, mtgr
from gr_kernels.ops.hstu_paged_attention.cpu import CpuPagedAttention
from gr_kernels.ops.hstu_paged_attention.reference import TorchPagedAttention

from .paged import ALPHA, DIVISOR, User, compute, error, random_user, right

WAYS = {
    "float32": ("avx2", "avx512"),
    # The first two have no bfloat16 products: they widen it.
    "bfloat16": ("avx2", "avx512", "avx512bf16", "amxbf16"),
}

Make = Callable[..., Any]


def of_instruction_set(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    ok, reason = native.probe("float32")
    if not ok:
        pytest.skip(reason)
    if isa not in native.instruction_sets(dtype) + native.instruction_sets("float32"):
        pytest.skip(f"this processor has no {isa} for {dtype}")
    monkeypatch.setenv(choice.ISA_VARIABLE, isa)
    return CpuPagedAttention


@pytest.fixture(params=["reference", "avx2", "avx512"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An implementation in float32, as far as this build and processor have it."""
    if request.param == "reference":
        return TorchPagedAttention
    return of_instruction_set(request.param, "float32", monkeypatch)


@pytest.fixture(params=[(isa, dtype) for dtype in WAYS for isa in WAYS[dtype]], ids="-".join)
def way(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Make, torch.dtype]:
    """An instruction set in a precision."""
    isa, dtype = request.param
    return of_instruction_set(isa, dtype, monkeypatch), getattr(torch, dtype)


def arbitrary(seed: int, tokens: int, *, ahead: int = 0) -> Intervals:
    """Intervals that end at most ``ahead`` places after the token's own."""
    rng = np.random.default_rng(seed)
    place_N = np.arange(tokens)
    high_N = rng.integers(0, np.minimum(place_N + 1 + ahead, tokens) + 1)
    low_N = rng.integers(0, tokens + 1, tokens)
    return Intervals(*(torch.from_numpy(x.astype(np.int32)) for x in (low_N, high_N, place_N)))


def in_steps(lengths: list[int], *numbers: int) -> list[list[int]]:
    """Each user's tokens in calls of so many at most, those of the numbers in turn."""
    left, steps = list(lengths), []
    while any(left) or not steps:
        steps.append([min(n, numbers[(b + len(steps)) % len(numbers)]) for b, n in enumerate(left)])
        left = [n - taken for n, taken in zip(left, steps[-1], strict=True)]
    return steps


# The fixture sets a variable for all examples alike.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_it_computes_the_equation(make: Make, data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(0, 110), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 2**16))
    sizes = {name: data.draw(st.integers(1, 35)) for name in ("d_qk", "d_v")}
    sizes["heads"] = data.draw(st.integers(1, 3))
    bias = data.draw(st.booleans())
    users = [
        random_user(seed + i, arbitrary(seed + i, n), bias=bias, **sizes)
        for i, n in enumerate(lengths)
    ]
    numbers = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    options = {
        "padding": data.draw(st.integers(0, 2)),
        "views": data.draw(st.booleans()),
        "seed": seed,
    }
    found = compute(make, users, in_steps(lengths, *numbers), **options)
    assert error(found, right(users)) < 1e-5


def kinds() -> dict[str, tuple[Intervals, int]]:
    """Intervals of the usual masks, and how many tokens are stored: all but the candidates."""
    groups = [0] * 5 + [1] * 40 + [2] * 30 + [3] * 9
    times = [0] * 45 + sorted([*range(20), *range(10)]) + [3, 7, 7, 20, 0, 1, 15, 15, 30]
    return {
        "causal": (causal(131), 131),
        "candidates": (causal(70, 37), 70),
        "one token": (causal(1), 1),
        "window": (causal(150, 5, window=40), 150),
        "short window": (causal(100, 3, window=3), 100),
        "contextual": (causal(65, 4, contextual=7), 65),
        "mtgr": (mtgr(groups, times), 75),
        "arbitrary": (arbitrary(3, 97, ahead=97), 97),
        "nothing but itself": (Intervals(*(causal(40).own_T,) * 3), 40),
        "itself in the interval": (
            Intervals(torch.zeros(66).int(), causal(66).own_T + 1, None),
            66,
        ),
        "empty": (causal(0), 0),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", kinds())
def test_masks_in_one_call(make: Make, kind: str, bias: bool):
    intervals, stored = kinds()[kind]
    users = [
        random_user(seed, intervals, d_qk=20, d_v=33, stored=stored, bias=bias) for seed in (1, 2)
    ]
    found = compute(make, users, [[len(user) for user in users]], padding=1)
    assert error(found, right(users)) < 1e-5


@pytest.mark.parametrize("kind", ["causal", "candidates", "window", "short window"])
@pytest.mark.parametrize("chunk", [1, 31, 64])
def test_masks_in_chunks(make: Make, kind: str, chunk: int):
    """Pages behind a window are named no more, and what is not stored is never read."""
    intervals, stored = kinds()[kind]
    users = [random_user(seed, intervals, d_qk=20, d_v=33, stored=stored) for seed in (1, 2)]
    steps = in_steps([len(user) for user in users], chunk, 2 * chunk)
    found = compute(make, users, steps, views=True)
    assert error(found, right(users)) < 1e-5


def test_every_instruction_set_has_the_error_of_its_precision(way: tuple[Make, torch.dtype]):
    make, dtype = way
    for kind, (intervals, stored) in kinds().items():
        for d_qk, d_v in ((64, 64), (25, 33), (130, 16)):
            users = [random_user(5, intervals, d_qk=d_qk, d_v=d_v, stored=stored, bias=d_v == 33)]
            expected = right(users)
            allowed = SLACK * error(right(users, dtype), expected) + FLOOR
            found = compute(make, users, [[len(users[0])]], dtype, views=True)
            assert error(found, expected) < allowed, (kind, d_qk, d_v)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_the_same_bits_however_it_is_computed(way: tuple[Make, torch.dtype], data: st.DataObject):
    """Alone or with others, at once or in chunks, wherever the pages lie, on any threads."""
    make, dtype = way
    seed = data.draw(st.integers(0, 2**16))
    d_qk, d_v = data.draw(st.sampled_from([(64, 64), (16, 32), (5, 7), (33, 80)]))
    bias = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=3))
    users = [
        random_user(seed + i, arbitrary(seed + i, n), d_qk=d_qk, d_v=d_v, bias=bias)
        for i, n in enumerate(lengths)
    ]
    alone = [compute(make, [user], [[len(user)]], dtype)[0] for user in users]
    numbers = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    threads = data.draw(st.integers(1, 3))
    steps = in_steps(lengths, *numbers)
    together = compute(make, users, steps, dtype, seed=seed, views=True, threads=threads)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_layers_share_workers_but_not_each_other_s_memory(monkeypatch: pytest.MonkeyPatch):
    """Many at once, of different sizes, on the same two threads."""
    make = of_instruction_set("avx2", "float32", monkeypatch)
    problems = [
        [random_user(i, arbitrary(i, 90), heads=1 + i % 3, d_qk=8 + i, d_v=20, bias=i % 2 == 1)]
        for i in range(12)
    ]
    alone = [compute(make, users, [[50], [40]]) for users in problems]
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(compute, make, users, [[50], [40]], threads=2) for users in problems * 3
        ]
    for future, expected in zip(running, alone * 3, strict=True):
        assert torch.equal(future.result()[0], expected[0])


BOUND = """
import os, threading, torch
from gr_kernels.ops.hstu_paged_attention.cpu import CpuPagedAttention
everywhere = os.sched_getaffinity(0)
threading.Thread(target=threading.Event().wait, daemon=True).start()
os.sched_setaffinity(0, {min(everywhere)})
before = set(os.listdir("/proc/self/task"))
attention = CpuPagedAttention(1, 8, 8, torch.float32, 1.0, 1.0, threads=2)
(worker,) = set(os.listdir("/proc/self/task")) - before
assert os.sched_getaffinity(int(worker)) == everywhere
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to processors on Linux")
def test_workers_are_not_bound_to_the_caller_s_processor(monkeypatch: pytest.MonkeyPatch):
    """As it would be where OpenMP has bound its threads, of which the caller is one."""
    of_instruction_set("avx2", "float32", monkeypatch)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    subprocess.run([sys.executable, "-c", BOUND], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_reference_in_other_precisions(dtype: torch.dtype):
    users = [random_user(6, causal(70, 9), d_qk=24, d_v=40, stored=70, bias=True)]
    allowed = SLACK * error(right(users, dtype), right(users)) + FLOOR
    assert error(compute(TorchPagedAttention, users, [[40], [39]], dtype), right(users)) < allowed


@pytest.fixture
def arguments() -> dict[str, Tensor]:
    """A call of two sequences, one of them with 33 tokens cached that both share."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 2, 8, generator=generator) for _ in range(3))
    return {
        "q_THK": q,
        "k_THK": k,
        "v_THV": v,
        "pages": torch.zeros(6, 2 * 32 * (2 * 16) * 4, dtype=torch.uint8),
        "block_table": torch.tensor([[3, 4], [3, 5]], dtype=torch.int32),
        "slots_T": torch.tensor([4 * 32, 4 * 32 + 1, 4 * 32 + 2, 5 * 32, 5 * 32 + 1]),
        "query_offsets": torch.tensor([0, 3, 5], dtype=torch.int32),
        "key_counts": torch.tensor([35, 34], dtype=torch.int32),
        "low_T": torch.zeros(5, dtype=torch.int32),
        "high_T": torch.tensor([32, 33, 34, 32, 33], dtype=torch.int32),
    }


def test_sequences_may_share_pages(make: Make, arguments: dict[str, Tensor]):
    attention = make(2, 8, 8, torch.float32, ALPHA, DIVISOR)
    shared = random_user(1, causal(32))
    place_N = torch.arange(32)
    attention(
        *(x.float() for x in (shared.q_NHK, shared.k_NHK, shared.v_NHV)),
        arguments["pages"],
        arguments["block_table"][:1],
        3 * 32 + place_N,
        torch.tensor([0, 32]),
        torch.tensor([32]).int(),
        shared.low_N,
        shared.high_N,
    )
    together = attention(**arguments)
    users = []
    for part in (slice(0, 3), slice(3, 5)):
        rows = (
            torch.cat([of_shared, arguments[name][part].double()])
            for of_shared, name in (
                (shared.q_NHK, "q_THK"),
                (shared.k_NHK, "k_THK"),
                (shared.v_NHV, "v_THV"),
            )
        )
        low, high, _ = causal(32 + part.stop - part.start)
        users.append(User(*rows, low, high, len(low), None))
    expected = torch.cat([rows[32:] for rows in right(users)])
    assert error([together], [expected]) < 1e-5


def test_inputs_are_left_alone_and_outputs_are_its_own(make: Make, arguments: dict[str, Tensor]):
    attention = make(2, 8, 8, torch.float32, ALPHA, DIVISOR)
    first = attention(**arguments)
    kept = {name: tensor.clone() for name, tensor in (arguments | {"a": first}).items()}
    arguments["q_THK"].mul_(2)
    attention(**arguments)
    arguments["q_THK"].div_(2)
    for name, tensor in kept.items():
        assert torch.equal((arguments | {"a": first})[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THK": torch.zeros(5, 2, 9)}, r"q is .*\(5, 2, 9\); expected .* \(5, 2, 8\)"),
        ({"k_THK": torch.zeros(4, 2, 8)}, r"k is .*\(4, 2, 8\); expected .* \(5, 2, 8\)"),
        ({"v_THV": torch.zeros(5, 2, 8).half()}, "v is torch.float16"),
        ({"q_THK": torch.zeros(5, 2, 16)[..., ::2]}, "q has columns that are 2 apart"),
        ({"pages": torch.zeros(6, 100).byte()}, "pages are torch.uint8 .*with at least"),
        ({"pages": torch.zeros(6 * 9000 + 2).byte()[2:].view(6, 9000)}, "at multiples of 4"),
        ({"block_table": torch.zeros(2, 2).long()}, "block_table is torch.int64"),
        ({"block_table": torch.zeros(1, 2).int()}, "expected torch.int32 with 2 rows"),
        ({"block_table": torch.tensor([[3, 4], [9, 5]]).int()}, "block_table.* 9; expected 0 to 5"),
        ({"slots_T": torch.zeros(4).long()}, r"slots is .* \(4,\); expected torch.int64 \(5,\)"),
        ({"slots_T": torch.full((5,), 6 * 32)}, "slot 192.* beyond the 6 pages"),
        ({"query_offsets": torch.tensor([0, 5])}, r"query_offsets are .* of shape \(3,\)"),
        ({"query_offsets": torch.tensor([0, 3, 6])}, "query_offsets are .*to 5"),
        ({"key_counts": torch.tensor([35, 1]).int()}, "key_counts of sequence 1 is 1;"),
        ({"key_counts": torch.tensor([65, 34]).int()}, "key_counts of sequence 0 is 65;"),
        ({"low_T": torch.zeros(5)}, "low is torch.float32"),
        ({"high_T": torch.full((5,), 40).int()}, "expected low from 0.* high at most 35"),
        ({"bias": torch.zeros(3)}, r"bias has .*3.*; expected .*173"),
        ({"bias": torch.zeros(173).double()}, "bias is torch.float64"),
    ],
)
def test_mistakes_are_named(
    make: Make, arguments: dict[str, Tensor], change: dict[str, Tensor], message: str
):
    attention = make(2, 8, 8, torch.float32, ALPHA, DIVISOR)
    with pytest.raises(ValueError, match=message):
        attention(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0; expected at least 1"),
        ({"divisor": 0.0}, "divisor is 0"),
        ({"threads": -1}, "threads is -1; expected 0 to 1024"),
        ({"dtype": torch.int32}, "dtype is torch.int32; expected "),
    ],
)
def test_what_it_does_not_compute_is_refused(make: Make, change: dict[str, Any], message: str):
    sizes = {"heads": 1, "d_qk": 8, "d_v": 8, "dtype": torch.float32, "alpha": 1.0, "divisor": 1.0}
    with pytest.raises(ValueError, match=message):
        make(**sizes | change)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    if not native.probe("float32")[0]:
        pytest.skip(native.probe("float32")[1])
    monkeypatch.setenv(choice.ISA_VARIABLE, "mmx")
    with pytest.raises(PlanError, match=r"op hstu_paged_attention in float32: .*'mmx'"):
        CpuPagedAttention(1, 8, 8, torch.float32, 1.0, 1.0)


def test_a_page_of_the_reference_is_k_beside_v(arguments: dict[str, Tensor]):
    attention = TorchPagedAttention(2, 8, 8, torch.float32, ALPHA, DIVISOR)
    pages = torch.zeros(6, attention.page_bytes, dtype=torch.uint8)
    attention(**arguments | {"pages": pages})
    page_PHEC = pages.view(torch.float32).view(6, 2, 32, 16)
    assert torch.equal(page_PHEC[5, :, 1, :8], arguments["k_THK"][4])
    assert torch.equal(page_PHEC[5, :, 1, 8:], arguments["v_THV"][4])


def test_it_is_found_through_the_registry():
    kernels = PluginHost.discover().registry.kernels
    found = [k for k in kernels.declared() if k.op == "hstu_paged_attention"]
    assert {kernel.name.rpartition("-")[2] for kernel in found} == {"reference", "cpu", "triton"}
    for kernel in found:
        assert callable(kernel.resolve())
    assert choice.choose("hstu_paged_attention", "float16").name.endswith("-reference")
