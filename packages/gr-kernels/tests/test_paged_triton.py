"""The op `hstu_paged_attention` in Triton: its numbers, and that it compiles for GPUs.

See `.triton_kernels` for where they run.
"""

from __future__ import annotations

import pytest
import torch

from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels.ops.hstu_attention import Intervals, causal
from gr_kernels.ops.hstu_paged_attention.reference import TorchPagedAttention
from gr_kernels.ops.hstu_paged_attention.triton import TritonPagedAttention, tiles

from .paged import ALPHA, DIVISOR, compute, error, random_user, right
from .test_paged_attention import arbitrary, in_steps, kinds
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(16, 16), (64, 64), (25, 33), (7, 130), (256, 256)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return device_for(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_qk", "d_v"), SHAPES)
def test_heads_of_any_size(device: str, d_qk: int, d_v: int, dtype: torch.dtype):
    """Two calls, many new tokens and few: other tiles."""
    users = [
        random_user(seed, intervals, d_qk=d_qk, d_v=d_v, stored=stored, bias=d_v == 33)
        for seed, (intervals, stored) in enumerate([(causal(61, 9), 61), (arbitrary(1, 75), 75)])
    ]
    expected = right(users)
    allowed = SLACK * error(right(users, dtype), expected) + FLOOR
    found = compute(TritonPagedAttention, users, [[58, 70], [12, 5]], dtype, device=device)
    assert error(found, expected) < allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", kinds())
def test_masks_in_one_call(device: str, kind: str, bias: bool):
    intervals, stored = kinds()[kind]
    users = [
        random_user(seed, intervals, heads=1, d_qk=20, d_v=33, stored=stored, bias=bias)
        for seed in (1, 2)
    ]
    steps = [[len(user) for user in users]]
    found = compute(TritonPagedAttention, users, steps, padding=1, device=device)
    assert error(found, right(users)) < 1e-5


@pytest.mark.parametrize("kind", ["candidates", "window", "short window"])
def test_masks_in_chunks(device: str, kind: str):
    intervals, stored = kinds()[kind]
    users = [
        random_user(seed, intervals, heads=1, d_qk=20, d_v=33, stored=stored) for seed in (1, 2)
    ]
    steps = in_steps([len(user) for user in users], 17, 50)
    found = compute(TritonPagedAttention, users, steps, views=True, device=device)
    assert error(found, right(users)) < 1e-5


def test_jagged_lengths(device: str):
    """None, one and many new tokens beside each other: each finds its own block of rows."""
    lengths = [0, 1, 65, 0, 33, 2, 64, 16]
    users = [
        random_user(i, arbitrary(i, n) if n else Intervals(*causal(0)), heads=1)
        for i, n in enumerate(lengths)
    ]
    for steps in ([lengths], in_steps(lengths, 1, 40, 7)):
        found = compute(TritonPagedAttention, users, steps, padding=2, device=device)
        assert error(found, right(users)) < 1e-5


def test_pages_are_those_of_the_reference(device: str):
    """What one has stored, the other can read."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(45, 2, 24, generator=generator).to(device) for _ in range(3))
    makers = (TorchPagedAttention, TritonPagedAttention)
    one, other = (make(2, 24, 24, torch.float32, ALPHA, DIVISOR) for make in makers)
    assert one.page_bytes == other.page_bytes
    pages = torch.full((4, one.page_bytes), 255, dtype=torch.uint8, device=device)
    place = torch.arange(45, device=device)
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=device)
    slots = table[0, place // 32].long() * 32 + place % 32
    found = []
    for first, second in ((one, other), (other, one)):
        pages.fill_(255)
        for attention, part in ((first, slice(0, 40)), (second, slice(40, 45))):
            low, high, _ = causal(part.stop, start=part.start)
            a = attention(
                q[part],
                k[part],
                v[part],
                pages,
                table,
                slots[part],
                torch.tensor([0, part.stop - part.start], device=device),
                torch.tensor([part.stop], dtype=torch.int32, device=device),
                low.to(device),
                high.to(device),
            )
        found.append(a.cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)


@not_interpreted
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_qk", "d_v", "sequences", "new", "bias"),
    [
        (64, 64, 3, 1, False),
        pytest.param(64, 64, 1, 64, True, marks=pytest.mark.slow),
        pytest.param(25, 33, 2, 20, True, marks=pytest.mark.slow),
        pytest.param(256, 256, 3, 64, False, marks=pytest.mark.slow),
    ],
)
def test_it_compiles(
    capability: int,
    dtype: torch.dtype,
    d_qk: int,
    d_v: int,
    sequences: int,
    new: int,
    bias: bool,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    attention = TritonPagedAttention(2, d_qk, d_v, dtype, ALPHA, DIVISOR)
    recorded = attention._kernels = Recorded(attention._kernels)  # type: ignore[assignment]
    tokens = sequences * new
    offsets = torch.arange(sequences + 1) * new
    attention(
        *(torch.zeros(tokens, 2, d, dtype=dtype) for d in (d_qk, d_qk, d_v)),
        torch.zeros(9, attention.page_bytes, dtype=torch.uint8),
        torch.zeros(sequences, 4, dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.int64),
        offsets,
        torch.full((sequences,), new, dtype=torch.int32),
        *(torch.zeros(tokens, dtype=torch.int32) for _ in range(2)),
        torch.zeros(sequences * new * new) if bias else None,
    )
    assert set(recorded.launches) == {"store_tokens", "attend"}
    for launches in recorded.launches.values():
        launches.compile(capability)


@pytest.mark.parametrize("tokens_each", [1, 17, 33, 1000])
def test_tiles_are_what_products_take(tokens_each: int):
    """tl.dot wants powers of two, from 16 on."""
    for dtype in DTYPES:
        for d in (1, 16, 17, 100, 256):
            found = tiles(d, d, dtype, tokens_each)
            for number in (found.k, found.v, found.m, found.n):
                assert number >= 16
                assert number & (number - 1) == 0
            assert found.k >= d


def test_what_it_does_not_compute_is_refused():
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        TritonPagedAttention(1, 8, 8, torch.float64, 1.0, 1.0)
    with pytest.raises(ValueError, match="d_qk is 300 and d_v 8; expected at most 256"):
        TritonPagedAttention(1, 300, 8, torch.float32, 1.0, 1.0)
