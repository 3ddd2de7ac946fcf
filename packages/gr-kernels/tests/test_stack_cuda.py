"""`CudaStack`: all layers on a GPU, against the equations; see `.triton_kernels` for where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from gr_core.stack import Stack
from gr_kernels.ops.hstu_stack.cuda import CudaStack, Ops
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows
from gr_kernels.ops.hstu_stack.reference import TorchStack

from .stacks import Request, equations, random_request, random_stack, run_whole
from .test_stack_reference import VARIANTS, error
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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With NaN and the largest numbers in memory that nobody has written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield device_for(request.param, monkeypatch)
    torch.use_deterministic_algorithms(False)


class Chosen(Ops):
    """Kernels in Triton, whether there is a GPU or not."""

    def __init__(self, way: str = "product") -> None:
        self.way = way

    def attention(self, most_queries: int, *, biased: bool) -> Any:
        from gr_kernels.ops.hstu_attention.triton import attend

        return attend

    def projection(self, rows: int, columns: int, width: int) -> Any:
        from gr_kernels.ops.hstu_projection import triton

        return getattr(triton, f"hstu_projection_{self.way}")

    def output(self, rows: int, columns: int, width: int) -> Any:
        from gr_kernels.ops.hstu_output import triton

        return getattr(triton, f"hstu_output_{self.way}")


@dataclass
class Blocks:
    """Memory for blocks on a device, every byte of it 0xFF: NaN in each format."""

    stack: CudaStack
    kept: list[Tensor] = field(default_factory=list)

    def of(self, tokens: int) -> npt.NDArray[np.uintp]:
        """Addresses of blocks for so many tokens, in no order."""
        count = -(-tokens // BLOCK_TOKENS)
        size = -(-self.stack.block_bytes // 256) * 256
        memory = torch.full((count * size + 256,), 255, dtype=torch.uint8, device=self.stack.device)
        self.kept.append(memory)
        first = -(-memory.data_ptr() // 256) * 256
        order = np.random.default_rng(len(self.kept)).permutation(count)
        return (first + order * size).astype(np.uintp)


def made(stack: Stack, device: str, dtype: str = "float32", way: str = "product") -> CudaStack:
    return CudaStack(stack, dtype, device=device, ops=Chosen(way))


def computed(
    stack: CudaStack,
    requests: Sequence[Request],
    starts: Sequence[Sequence[int]] | None = None,
    rows: Rows = Rows.ALL,
) -> list[Tensor]:
    """All rows of requests; request i is cut at ``starts[i]``, the n-th pieces run together."""
    blocks = Blocks(stack)
    own = [blocks.of(request.history) for request in requests]
    found = [request.x_TD.float().to(stack.device) for request in requests]
    cuts = [
        [0, *(starts[i] if starts else ()), len(request.x_TD)] for i, request in enumerate(requests)
    ]
    for step in range(max(map(len, cuts)) - 1):
        there = [i for i in range(len(requests)) if step + 1 < len(cuts[i])]
        parts = [found[i][cuts[i][step] : cuts[i][step + 1]] for i in there]
        x_TD = torch.cat(parts)
        stack.run(
            x_TD,
            [requests[i].segment(own[i], cuts[i][step], cuts[i][step + 1], rows) for i in there],
        )
        for part, row in zip(parts, x_TD.split([len(part) for part in parts]), strict=True):
            part.copy_(row)
    return [x_TD.cpu() for x_TD in found]


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "fused") for name in VARIANTS), ("ranking", "product"), ("mtgr", "product")],
)
def test_it_computes_the_equations(name: str, way: str, device: str):
    stack = random_stack(**VARIANTS[name])
    requests = [
        random_request(stack, i, history=n, candidates=c, kind=kind)
        for i, (n, c, kind) in enumerate(
            [(37, 5, "causal"), (0, 2, "causal"), (34, 0, "arbitrary"), (3, 1, "prefix")]
        )
    ]
    found = computed(made(stack, device, way=way), requests)
    for one, request in zip(found, requests, strict=True):
        assert error(one, equations(stack, request)) < 2e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_error_is_that_of_its_precision(dtype: str, device: str):
    stack = random_stack()
    request = random_request(stack, 3, history=45, candidates=7)
    right = equations(stack, request)
    theirs = TorchStack(stack, "bfloat16")
    allowed = 2 * error(run_whole(theirs, request), right) / (1 if dtype == "bfloat16" else 4)
    (found,) = computed(made(stack, device, dtype), [request])
    assert error(found, right) < allowed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ranking", "causal"),
        ("ranking", "window"),
        ("research", "arbitrary"),
        ("mtgr", "prefix"),
        ("mtgr", "arbitrary"),
    ],
)
def test_any_split_gives_the_same(name: str, kind: str, device: str):
    """What comes before is read from blocks; each request is cut where its mask allows it."""
    stack = random_stack(layers=2, **VARIANTS[name])
    requests = [
        random_request(stack, seed, history=n, candidates=4, kind=kind)
        for seed, n in ((1, 40), (2, 33), (3, 1))
    ]
    cuts = [[cut for cut in request.cuts() if cut % 11 == 3][:3] for request in requests]
    runner = made(stack, device)
    for one, request in zip(computed(runner, requests, cuts), requests, strict=True):
        assert error(one, equations(stack, request)) < 2e-6


@pytest.mark.parametrize("rows", Rows)
def test_what_nobody_wants_is_left_out_of_the_last_layer(rows: Rows, device: str):
    stack = random_stack(groups=3, gate="norm(a*u)", positions=50)
    requests = [
        random_request(stack, i, history=n, candidates=c)
        for i, (n, c) in enumerate([(35, 3), (7, 0), (0, 2)])
    ]
    found = computed(made(stack, device), requests, rows=rows)
    for one, request in zip(found, requests, strict=True):
        n = request.history
        first = {Rows.CANDIDATES: n, Rows.CANDIDATES_AND_LAST: max(n - 1, 0), Rows.ALL: 0}[rows]
        right = equations(stack, request)
        if len(right) > first:
            assert error(one[first:], right[first:]) < 2e-6


def test_segments_share_blocks(device: str):
    """One writes a history; the others read it, in the same call."""
    stack = random_stack()
    runner = made(stack, device)
    request = random_request(stack, 5, history=50, candidates=6)
    memory = Blocks(runner)
    blocks = memory.of(50)
    pieces = [(0, 50), (50, 53), (53, 56)]
    x_TD = request.x_TD.float().to(runner.device)
    runner.run(x_TD, [request.segment(blocks, *piece) for piece in pieces])
    assert error(x_TD.cpu(), equations(stack, request)) < 2e-6


class Waits:
    """Implements `Arrivals`: notes which layers were waited for."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def wait(self, layer: int) -> None:
        self.layers.append(layer)


def recorder(device: str) -> Callable[..., Any]:
    if device == "cuda":
        from gr_kernels.cuda.graphs import Recorder

        return Recorder()

    def repeat(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    return repeat


@pytest.mark.parametrize("name", ["ranking", "research", "mtgr"])
def test_replayed_batches_are_as_good(name: str, device: str):
    """Recorded for more than there is: the rest of the memory has no effect, run after run."""
    stack = random_stack(layers=2, **VARIANTS[name])
    runner, replays = made(stack, device), []
    record = recorder(device)

    def noted(step: Callable[[], None]) -> Callable[[], None]:
        replay = record(step)
        return lambda: (replays.append(1), replay())  # type: ignore[func-returns-value]

    runner.record([16, 48], segments=3, blocks=2, record=noted)
    for seed in range(3):
        requests = [
            random_request(stack, seed, history=n, candidates=c)
            for n, c in [(33, 4), (5 + seed, 0)][: 1 + seed % 2]
        ]
        cuts = [[30] if request.history > 30 else [] for request in requests]
        rows = Rows.ALL if seed else Rows.CANDIDATES
        for one, request in zip(computed(runner, requests, cuts, rows), requests, strict=True):
            first = 0 if rows is Rows.ALL else request.history
            assert error(one[first:], equations(stack, request)[first:]) < 2e-6
    assert len(replays) == 2 * (2 + 2 + 2)


def test_each_layer_waits_for_its_blocks(device: str):
    stack = random_stack(layers=3)
    request = random_request(stack, 1, history=5, candidates=1)
    for graphs in (False, True):
        runner, waits = made(stack, device), Waits()
        if graphs:
            runner.record([8], segments=1, blocks=1, record=recorder(device))
        blocks = Blocks(runner)
        segment = request.segment(blocks.of(5), 0, 6)
        runner.run(request.x_TD.float().to(runner.device), [segment], waits)
        assert waits.layers == [0, 1, 2]


def test_what_does_not_fit_together_is_refused(device: str):
    stack = random_stack(time_buckets=8)
    runner = made(stack, device)
    request = random_request(stack, 1, history=40, candidates=1)
    memory = Blocks(runner)
    blocks = memory.of(40)
    x_TD = request.x_TD.float().to(runner.device)
    with pytest.raises(ValueError, match=r"x is torch\.float32 \(40, 24\); .* say .*\(41, 24\)"):
        runner.run(x_TD[:40], [request.segment(blocks, 0, 41)])
    with pytest.raises(ValueError, match="40 tokens need 2 blocks; there are 1"):
        runner.run(x_TD, [request.segment(blocks[:1], 0, 41)])
    runner.run(x_TD[:0], [])
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.run(x_TD, [request.segment(blocks, 0, 41)])


@not_interpreted
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_keeps_tokens_with_compiles(
    dtype: str,
    capability: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    """For heads as models have them, it moves 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    stack = CudaStack(random_stack(d_model=64, d_qk=32, d_v=64), dtype, device="cpu", ops=Chosen())
    recorded = stack._kernels = Recorded(stack._kernels)  # type: ignore[assignment]
    kv_TW = torch.zeros(40, 2 * (32 + 64), dtype=stack._dtype)
    v_TF, k_TF = kv_TW.split([128, 64], dim=1)
    on = {"block_T": torch.zeros(40, dtype=torch.int64), "place_T": torch.zeros(40).int()}
    stack._store(1, k_TF.unflatten(1, (2, -1)), v_TF.unflatten(1, (2, -1)), on)
    ptx = recorded.launches["store_tokens"].compile(capability).asm["ptx"]
    assert re.search(r"st\.global\.v4\.b32", ptx)


@pytest.mark.slow
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)
