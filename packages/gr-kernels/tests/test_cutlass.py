"""The op `hstu_attention` in CUDA C++: its numbers, on an emulated GPU or on a real one.

See `.cutlass_emulated` for what is emulated. `test_cutlass_library` has how it is built.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core.errors import GrError
from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels.cuda import library, self_test
from gr_kernels.cuda.library import Call, Library
from gr_kernels.ops.hstu_attention import Intervals, causal, cutlass, mtgr, reference
from gr_kernels.ops.hstu_attention.on_device import CachedKeys

from .cutlass_emulated import ARCHITECTURES, emulated, needs_compiler

PAGE = 32
HEADS = 2
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu), *ARCHITECTURES]


@dataclass(frozen=True, slots=True)
class Machine:
    """A library and where its tensors are."""

    library: Library
    device: str


@pytest.fixture(params=ON_GPU)
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "cuda":
        ok, reason = library.probe()
        if not ok:
            pytest.skip(reason)
        return Machine(library.library_of(torch.cuda.current_device()), "cuda")
    if needs_compiler.args[0]:
        pytest.skip(needs_compiler.kwargs["reason"])
    return Machine(emulated()[request.param], "cpu")


@dataclass(frozen=True, slots=True)
class User:
    """A sequence of so many keys, the first ``stored`` of them in blocks."""

    keys: int
    sees: Intervals
    stored: int = 0


def arbitrary(seed: int, queries: int, keys: int) -> Intervals:
    """Intervals, many of them empty, and own keys anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def places(least: int, end: int) -> Tensor:
        return torch.randint(least, end, (queries,), generator=generator, dtype=torch.int32)

    return Intervals(places(0, keys + 1), places(0, keys + 1), places(-1, max(keys, 0)))


def compute(
    machine: Machine,
    users: list[User],
    columns: int,
    dtype: torch.dtype,
    *,
    padding: int = 2,
    offsets: torch.dtype = torch.int64,
    is_one_projection: bool = False,
    splits: int | None = None,
    is_guarded: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """The relative error of a call, and that which is allowed.

    All that must not be read is NaN: rows of no sequence, the rest of blocks, other layers. Rows of
    no sequence must be zero in the result.
    """

    def put(x: Tensor) -> Tensor:
        return guarded(x) if is_guarded else x.to(machine.device)

    generator = torch.Generator().manual_seed(seed)
    queries = [len(user.sees.low_T) for user in users]
    shapes = {"q": sum(queries), "k": sum(u.keys for u in users), "v": sum(u.keys for u in users)}
    values = {
        name: torch.randn(rows, HEADS, columns, generator=generator).to(dtype)
        for name, rows in shapes.items()
    }
    key_ends = torch.tensor([0, *(user.keys for user in users)]).cumsum(0)
    query_ends = torch.tensor([0, *queries]).cumsum(0)
    sees = [torch.cat(column) for column in zip(*(user.sees for user in users), strict=True)]
    numbers = (columns**-0.5, 37.0)
    given = (query_ends, key_ends, *sees, *numbers)
    right = reference.hstu_attention(*(x.double() for x in values.values()), *given)
    plain = reference.hstu_attention(*values.values(), *given)

    pages = blocks(users, values["k"], values["v"], key_ends, put)
    kept = torch.cat(
        [
            torch.arange(int(key_ends[b]) + user.stored, int(key_ends[b + 1]))
            for b, user in enumerate(users)
        ]
    )
    rows = {"q": values["q"], "k": values["k"][kept], "v": values["v"][kept]}
    longest = max(len(x) for x in rows.values()) + 2 * padding
    # Views of one projection: tokens and heads apart, other columns between.
    uvqk = torch.full((longest, 3, HEADS, columns), float("nan"), dtype=dtype)
    padded = {}
    for i, (name, x) in enumerate(rows.items()):
        view = uvqk[: len(x) + 2 * padding, i]
        view[padding : padding + len(x)] = x
        padded[name] = view if is_one_projection else view.contiguous()
    if is_one_projection:
        uvqk = uvqk.to(machine.device)
        padded = {name: uvqk[: len(x), i] for i, (name, x) in enumerate(padded.items())}
    left = torch.tensor([0, *(user.keys - user.stored for user in users)]).cumsum(0)
    low, high, own = (put(torch.nn.functional.pad(column, (padding, padding))) for column in sees)
    out = torch.full((len(padded["q"]), HEADS, columns), float("nan"), dtype=dtype)
    found = cutlass.attend_with(
        machine.library,
        *(x if is_one_projection else put(x) for x in padded.values()),  # type: ignore[arg-type]
        put((query_ends + padding).to(offsets)),
        put((left + padding).to(offsets)),
        low,
        high,
        own,
        *numbers,
        max(queries, default=0),
        cached=pages.cached if any(user.stored for user in users) else None,
        out_THV=put(out),
        splits=splits,
    ).cpu()
    assert not found[:padding].any()
    assert not found[len(found) - padding :].any()
    inside = found[padding : len(found) - padding].double()
    scale = float(right.norm()) or 1.0
    allowed = SLACK * float((plain.double() - right).norm()) / scale + FLOOR
    return float((inside - right).norm()) / scale, allowed


@dataclass(frozen=True, slots=True)
class Blocks:
    memory: Tensor
    """Kept, as only addresses point there."""
    cached: CachedKeys


def blocks(
    users: list[User],
    k: Tensor,
    v: Tensor,
    key_ends: Tensor,
    put: Callable[[Tensor], Tensor],
) -> Blocks:
    """Each user's stored keys in the middle one of three layers, blocks in a shuffled order."""
    heads, columns = k.shape[1:]
    counts = [user.stored for user in users]
    most = max(1, -(-max(counts, default=0) // PAGE))
    order = torch.randperm(len(users) * most, generator=torch.Generator().manual_seed(1))
    memory = torch.full(
        (len(users) * most, 3, 2, heads, PAGE, columns), float("nan"), dtype=k.dtype
    )
    for b, count in enumerate(counts):
        for i in range(0, count, PAGE):
            page = memory[order[b * most + i // PAGE], 1]
            tokens = slice(int(key_ends[b]) + i, int(key_ends[b]) + min(i + PAGE, count))
            page[0, :, : min(PAGE, count - i)] = k[tokens].transpose(0, 1)
            page[1, :, : min(PAGE, count - i)] = v[tokens].transpose(0, 1)
    memory = put(memory)
    layer = memory.stride(1) * memory.element_size()
    addresses = memory.data_ptr() + order.view(-1, most) * (3 * layer)
    return Blocks(
        memory,
        CachedKeys(put(addresses), put(torch.tensor(counts, dtype=torch.int32)), layer),
    )


def guarded(x: Tensor) -> Tensor:
    """A copy with memory behind it that nobody may touch: the process would end."""
    if not x.numel():
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(start + pages, mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size)
    return flat.view(x.shape).copy_(x)


@pytest.mark.slow
@pytest.mark.parametrize("columns", cutlass.COLUMNS)
@pytest.mark.parametrize("dtype", cutlass.DTYPES)
def test_heads_of_each_size(machine: Machine, columns: int, dtype: torch.dtype):
    """More rows than a block has, keys of some in blocks of others not, and nobody's rows."""
    users = [
        User(150, causal(141, 9, start=10), stored=70),
        User(0, causal(0)),
        User(133, arbitrary(1, 30, 133)),
    ]
    error, allowed = compute(machine, users, columns, dtype)
    assert error <= allowed


MASKS = {
    "causal": causal(140),
    "candidates": causal(129, 11),
    "window": causal(140, window=20),
    "short window": causal(140, window=1),
    "contextual": causal(133, 7, contextual=3),
    "new tokens": causal(135, 5, start=120),
    "mtgr": mtgr(
        [0] * 30 + [1] * 80 + [2] * 21 + [3] * 9,
        [0] * 110 + sorted(range(100, 121)) + [110] * 9,
    ),
    "nothing": Intervals(*(torch.full((9,), n, dtype=torch.int32) for n in (3, 3, -1))),
}


@pytest.mark.slow
@pytest.mark.parametrize("stored", [0, 37])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(machine: Machine, mask: str, stored: int):
    users = [User(140, MASKS[mask], stored)]
    error, allowed = compute(machine, users, 64, torch.bfloat16)
    assert error <= allowed


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(data=st.data())
def test_jagged_lengths(machine: Machine, data: st.DataObject):
    users = []
    for _ in range(data.draw(st.integers(1, 4))):
        keys = data.draw(st.sampled_from([0, 1, 31, 32, 33, 64, 65, 127, 128, 129, 200]))
        queries = data.draw(st.sampled_from([0, 1, 15, 16, 17, 64, 129])) if keys else 0
        stored = data.draw(st.integers(0, keys))
        users.append(User(keys, arbitrary(data.draw(st.integers(0, 99)), queries, keys), stored))
    error, allowed = compute(
        machine,
        users,
        64,
        torch.float16,
        padding=data.draw(st.integers(0, 2)),
        offsets=data.draw(st.sampled_from([torch.int32, torch.int64])),
    )
    assert error <= allowed


@pytest.mark.slow
def test_many_short_sequences(machine: Machine):
    """More than one look of a warp finds."""
    users = [User(n % 5, arbitrary(n, n % 3 if n % 5 else 0, n % 5)) for n in range(70)]
    error, allowed = compute(machine, users, 64, torch.bfloat16)
    assert error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_blocks_that_share_the_keys_of_a_row(machine: Machine, splits: int, columns: int):
    """Some get none: there are fewer tiles of keys than blocks."""
    users = [
        User(300, causal(280, 20, start=230), stored=200),
        User(0, causal(0)),
        User(5, arbitrary(1, 3, 5)),
    ]
    error, allowed = compute(machine, users, columns, torch.float16, splits=splits)
    assert error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_nothing_behind_a_tensor_is_touched(machine: Machine, splits: int, columns: int):
    if machine.device == "cuda":
        pytest.skip("compute-sanitizer tells on a device")
    users = [
        User(70, arbitrary(1, 20, 70), stored=33),
        User(131, causal(130, 1), stored=1),
        User(5, causal(5)),
    ]
    error, allowed = compute(
        machine, users, columns, torch.bfloat16, padding=0, splits=splits, is_guarded=True
    )
    assert error <= allowed


@pytest.mark.slow
def test_views_of_one_projection(machine: Machine):
    users = [User(130, causal(125, 5), stored=3), User(7, causal(7))]
    error, allowed = compute(machine, users, 64, torch.bfloat16, is_one_projection=True)
    assert error <= allowed


@pytest.mark.slow
def test_large_scores_are_no_trouble(machine: Machine):
    """SiLU of -1e4 is 0 and of 1e4 itself: no exponential may overflow on the way."""
    q, k, v = (torch.zeros(3, 1, 64, dtype=torch.bfloat16) for _ in range(3))
    q[:, 0, 0], k[:, 0, 0], v[:] = 100.0, 100.0, 1.0
    q[1] *= -1
    for dtype in cutlass.DTYPES:
        found = cutlass.attend_with(
            machine.library,
            *(x.to(machine.device, dtype) for x in (q, k, v)),  # type: ignore[arg-type]
            *(torch.tensor([0, 3], device=machine.device) for _ in range(2)),
            *(x.to(machine.device) for x in causal(3)),
            1.0,
            1.0,
            3,
        )
        expected = torch.tensor([1e4, 0.0, 3e4])
        torch.testing.assert_close(found[:, 0, 5].float().cpu(), expected, rtol=4e-3, atol=1e-30)


@pytest.mark.slow
def test_no_tokens_are_no_launch(machine: Machine):
    x = torch.zeros(0, HEADS, 64, dtype=torch.bfloat16, device=machine.device)
    none = torch.zeros(0, dtype=torch.int32, device=machine.device)
    offsets = torch.zeros(1, dtype=torch.int32, device=machine.device)
    found = cutlass.attend_with(
        machine.library, x, x, x, offsets, offsets, none, none, none, 1.0, 1.0, 0
    )
    assert found.shape == x.shape


@pytest.mark.gpu
class TestOnADevice:
    """What only a real one has."""

    @pytest.fixture(autouse=True)
    def needs_library(self) -> None:
        ok, reason = library.probe()
        if not ok:
            pytest.skip(reason)

    def test_in_a_cuda_graph(self):
        """So nothing waits for the device; other lengths may follow in the same tensors."""
        rows = [torch.randn(90, 2, 64, device="cuda").bfloat16() for _ in range(3)]
        offsets = torch.tensor([0, 40, 90], device="cuda")
        low, high, own = (x.cuda() for x in causal(90))
        high.clamp_(max=40)
        own.fill_(-1)

        def call() -> Tensor:
            return cutlass.attend(*rows, offsets, offsets, low, high, own, 0.125, 7.0, 90)  # type: ignore[arg-type]

        call()  # loads the kernel, which a graph cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        offsets.copy_(torch.tensor([0, 50, 90]))
        graph.replay()
        torch.testing.assert_close(found, call(), rtol=0, atol=0)

    def test_the_stream_is_the_current_one(self):
        rows = [torch.zeros(4096, 4, 128, device="cuda").bfloat16() for _ in range(3)]
        offsets = torch.tensor([0, 4096], device="cuda")
        sees = [x.cuda() for x in causal(4096)]
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(20):
                rows[0].normal_(), rows[1].normal_(), rows[2].normal_()
                found = cutlass.hstu_attention(*rows, offsets, offsets, *sees, 0.09, 4096.0)  # type: ignore[arg-type]
        other.synchronize()
        right = reference.hstu_attention(
            *(x.float() for x in rows),  # type: ignore[arg-type]
            offsets,
            offsets,
            *sees,
            0.09,
            4096.0,
        )
        assert float((found.float() - right).norm() / right.norm()) < 1e-2

    def test_few_rows_against_many_keys_are_shared(self):
        users = [User(5000, causal(4990, 10, start=4980), stored=4900)]
        there = Machine(library.library_of(torch.cuda.current_device()), "cuda")
        for columns in cutlass.COLUMNS:
            error, allowed = compute(there, users, columns, torch.bfloat16)
            assert error <= allowed


class TestRefusals:
    """What there is no kernel for is named before anything is launched."""

    @staticmethod
    def attend(change: dict[str, Any]) -> Tensor:
        arguments: dict[str, Any] = {
            name: torch.zeros(5, HEADS, 64, dtype=torch.bfloat16) for name in ("q", "k", "v")
        }
        arguments |= {name: torch.tensor([0, 5]) for name in ("query_offsets", "key_offsets")}
        arguments |= dict(zip(("low", "high", "own"), causal(5), strict=True))
        arguments |= {"alpha": 1.0, "divisor": 1.0, "most_queries": 5} | change
        options = {n: arguments.pop(n) for n in ("cached", "bias", "out_THV") if n in arguments}
        never: Any = None
        return cutlass.attend_with(never, *arguments.values(), **options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bias": torch.zeros(25)}, "bias is given; hstu_attention-cutlass has none"),
            ({"q": torch.zeros(5, 2, 64)}, "expected all bfloat16 or all float16"),
            (
                {name: torch.zeros(5, 2, 32, dtype=torch.bfloat16) for name in "qkv"},
                "heads have 32 columns; expected 64, 128, 256",
            ),
            ({"v": torch.zeros(5, 2, 128, dtype=torch.bfloat16)}, r"v \(5, 2, 128\); expected k"),
            (
                {"k": torch.zeros(5, 2, 65, dtype=torch.bfloat16)[:, :, :64]},
                "k must have contiguous columns, and rows at multiples of 16 bytes",
            ),
            ({"low": torch.zeros(5)}, "low is torch.float32"),
            ({"own": torch.zeros(4, dtype=torch.int32)}, r"own is torch.int32 \(4,\)"),
            ({"query_offsets": torch.tensor([0, 2, 5])}, r"query_offsets are .* \(3,\)"),
            ({"key_offsets": torch.tensor([0, 5]).float()}, "key_offsets is torch.float32"),
            ({"out_THV": torch.zeros(5, 2, 64)}, "out is torch.float32"),
            (
                {"cached": CachedKeys(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32), 0)},
                "addresses are torch.float32",
            ),
            (
                {
                    "cached": CachedKeys(
                        torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0
                    )
                },
                "counts are torch.int64",
            ),
            (
                {
                    "cached": CachedKeys(
                        torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), 32
                    )
                },
                "layer_offset is 32; expected a multiple of 64",
            ),
        ],
    )
    def test_they_name_it(self, change: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            self.attend(change)

    def test_other_devices(self):
        q = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
        offsets = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="q is on cpu; expected a CUDA device"):
            cutlass.hstu_attention(q, q, q, offsets, offsets, *causal(1), 1.0, 1.0)

    @needs_compiler
    def test_the_library_refuses_too(self):
        found = emulated()["sm_80"]
        call = Call(dtype=1, heads=1, columns=96, tokens=1, sequences=0, splits=1)
        with pytest.raises(ValueError, match="96 columns of a head; expected 64, 128 or 256"):
            found.hstu_attention(call, 0)
        call.columns, call.dtype = 64, 7
        with pytest.raises(ValueError, match="dtype 7"):
            found.hstu_attention(call, 0)
        call.splits = 2
        with pytest.raises(ValueError, match="2 splits; expected 1, or a workspace"):
            found.hstu_attention(call, 0)
        call.splits, call.heads = 1, 65536
        with pytest.raises(ValueError, match="65536 heads in 1 splits; expected at most 65535"):
            found.hstu_attention(call, 0)
        call.tokens = 2**31
        with pytest.raises(ValueError, match=r"more than 2\^30 tokens"):
            found.hstu_attention(call, 0)

    @needs_compiler
    def test_what_cuda_refuses_is_told(self):
        """Here a tensor map of rows that are not aligned."""
        found = emulated()["sm_90a"]
        call = Call(
            dtype=1, heads=1, columns=64, tokens=1, keys=2, k=8, k_token_stride=64, splits=1
        )
        with pytest.raises(GrError, match="the base is null or not aligned"):
            found.hstu_attention(call, 0)


@needs_compiler
class TestSelfTest:
    @pytest.mark.slow
    def test_what_is_right_passes(self):
        assert self_test.check(emulated()["sm_90a"], "cpu") == ""

    @pytest.mark.parametrize(
        ("field", "value"), [("alpha", 0.3), ("layer_offset", 0), ("own", None), ("scale", 0.011)]
    )
    def test_what_is_wrong_is_named(self, field: str, value: Any):
        class Wrong:
            def hstu_attention(self, call: Call, stream: int) -> None:
                if field == "own":
                    call.own = call.low
                else:
                    setattr(call, field, value)
                emulated()["sm_90a"].hstu_attention(call, stream)

        wrong: Any = Wrong()
        found = self_test.check(wrong, "cpu")
        assert found.startswith("bfloat16, 64 columns, with")
        assert "expected at most" in found
