"""Stacks of layers: ours, all and cached and replayed from graphs, beside plain PyTorch.

Layers, tokens and weights are those of `gr_kernels.benchmark.work`. A run takes rows in float32 and
leaves the candidates' rows.

Shapes: B users, T tokens that are computed, R candidates of all users, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.stack import Stack
from gr_kernels.benchmark.dense import DenseStack, dense_mask, padded
from gr_kernels.benchmark.gpu.device import Device, Stamp
from gr_kernels.benchmark.gpu.measure import Case, Entry, Kind, Side
from gr_kernels.benchmark.gpu.plain import PlainStack, User, candidate_rows
from gr_kernels.benchmark.points import HEADS, Point
from gr_kernels.benchmark.work import Work, make_work
from gr_kernels.ops.hstu_attention.on_device import DeviceAttention
from gr_kernels.ops.hstu_stack.cuda import CudaStack, Ops
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment

OURS, ALL_ROWS, REPLAYED = "gr-kernels", "gr-kernels, all rows", "gr-kernels, graphs"
ANEW, ANEW_REPLAYED = "gr-kernels, nothing cached", "gr-kernels, nothing cached, graphs"
PLAIN, PLAIN_ALL = "torch", "torch, all rows"
PADDED, COMPILED = "torch, padded, all rows", "torch.compile, padded, all rows"
DTYPE, TORCH_DTYPE = "bfloat16", torch.bfloat16
_ALIGNMENT = 256

_Found = TypeVar("_Found")


# ── What is computed ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class LayersPoint(Point):
    """Layers over histories of given lengths; `Point.new` is the longest of them."""

    histories: tuple[int, ...] = ()
    """New tokens of each user."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.histories

    @property
    def recomputed(self) -> LayersPoint:
        new = tuple(self.cached + length for length in self.histories)
        return replace(self, cached=0, new=max(new), histories=new)

    @property
    def facts(self) -> Mapping[str, str]:
        """Sizes, for people."""
        lengths = sorted(set(self.histories))
        shown = ", ".join(map(str, self.histories if len(lengths) > 1 else lengths))
        return {
            "layers": str(self.layers),
            "width": f"{self.width}, {HEADS} heads of {self.width // HEADS}",
            "batch": str(self.users),
            "cached tokens of each history": str(self.cached),
            "new tokens of each history": shown,
            "candidates of each user": str(self.candidates),
            "dtype": DTYPE,
        }


def point(
    layers: int, width: int, histories: Sequence[int], candidates: int, cached: int = 0
) -> LayersPoint:
    return LayersPoint(
        layers, width, len(histories), cached, max(histories), candidates, tuple(histories)
    )


def mixed_lengths(users: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Uniform from a quarter of the mean to seven quarters, of exactly that mean."""
    rng = np.random.default_rng(seed)
    least, most = max(1, mean // 4), 2 * mean - max(1, mean // 4)
    lengths = rng.integers(least, most + 1, users)
    while (missing := users * mean - int(lengths.sum())) != 0:
        at = int(rng.integers(users))
        lengths[at] = np.clip(lengths[at] + missing, least, most)
    return tuple(lengths.tolist())


def segment(
    blocks: npt.NDArray[np.uintp], cached: int, new: int, candidates: int, rows: Rows
) -> Segment:
    """A causal history, of which ``cached`` tokens are in the blocks, and candidates."""
    keys = cached + new
    high = np.concatenate([np.arange(cached, keys) + 1, np.full(candidates, keys)])
    return Segment(
        blocks=blocks[: -(-keys // BLOCK_TOKENS)],
        cached=cached,
        new=new,
        candidates=candidates,
        low=np.zeros(new + candidates, np.int32),
        high=high.astype(np.int32),
        rows=rows,
    )


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Operations of a run, a multiplication and an addition being two.

    Products of weights and rows, scores and values of visible pairs. Norms, SiLU, gates, residuals
    and what kernels compute of pairs that nobody sees are left out.
    """

    projection: float
    attention: float
    output: float
    pairs: int
    """Of a query and a key that it sees, all layers together."""

    @property
    def total(self) -> float:
        return self.projection + self.attention + self.output


def arithmetic(stack: Stack, segments: Sequence[Segment], layers: int | None = None) -> Arithmetic:
    """What the segments need, counted from who sees whom; of all layers, or of so many full ones.

    Of the last layer, only K and V of tokens whose rows are not wanted.
    """
    f, k = stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk
    full = len(stack.layers) if layers is None else layers
    partial_layers = 0
    if layers is None and any(s.rows is not Rows.ALL and s.new for s in segments):
        full, partial_layers = full - 1, 1
    columns, pairs = 0.0, 0
    rows_all = rows_last = 0
    for one in segments:
        tokens = one.new + one.candidates
        wanted = tokens
        if one.rows is not Rows.ALL:
            last = one.rows is Rows.CANDIDATES_AND_LAST and one.new > 0
            wanted = one.candidates + last
        low, high = one.low.astype(np.int64), one.high.astype(np.int64)
        own = one.cached + np.arange(tokens)
        seen = np.maximum(high - low, 0) + ~((own >= low) & (own < high))
        pairs += full * int(seen.sum()) + partial_layers * int(seen[tokens - wanted :].sum())
        rows_all += tokens
        rows_last += wanted
        columns += (full + partial_layers) * tokens * (f + k)
        columns += (full * tokens + partial_layers * wanted) * (f + k)
    wide = stack.layers[0].output_weight.numel()
    return Arithmetic(
        projection=2.0 * columns * stack.d_model,
        attention=2.0 * pairs * (f + k),
        output=2.0 * (full * rows_all + partial_layers * rows_last) * wide,
        pairs=pairs,
    )


class LayersWork:
    """A point's stack, and tokens of users, fresh for each set."""

    def __init__(self, of: LayersPoint, sets: int, device: Device) -> None:
        self.point = of
        self.sets = sets
        work = make_work(of)
        self.stack = work.stack
        self._first = work
        self._device = device
        self._inputs = [
            torch.cat(list(users)).to(device.name)
            for users in (make_work(of, seed).users for seed in range(sets))
        ]
        """(users · (cached + new + candidates), D) float32, user after user."""

    def input(self, number: int, *, begin: str = "new", end: str = "candidates") -> Tensor:
        """Rows of each user from ``begin`` to ``end``, which are cached, new or candidates."""
        at = {"cached": 0, "new": 1, "candidates": 2}
        parts, row = [], 0
        for new in self.point.lengths:
            sizes = [self.point.cached, new, self.point.candidates]
            starts = np.cumsum([row, *sizes])
            parts.append(self._inputs[number][starts[at[begin]] : starts[at[end] + 1]])
            row = int(starts[-1])
        return torch.cat(parts)

    def right(self, number: int) -> Tensor:
        """The candidates' rows (R, D) by plain PyTorch in float32, nothing cached."""
        plain = PlainStack(self.stack, torch.float32, self._device.name)
        return plain(self.input(number, begin="cached"), self.users, all_rows=False)

    @property
    def users(self) -> list[User]:
        """Where users' tokens are if nothing is cached."""
        return User.all_of(self.point.recomputed.lengths, self.point.candidates)

    @property
    def first(self) -> Work:
        """The first set, as `gr_kernels.benchmark.dense` takes it."""
        return self._first


# ── Ours ─────────────────────────────────────────────────────────────────────────────────────────


class Blocks:
    """Memory for blocks of K and V on a device."""

    def __init__(self, stack: CudaStack, tokens: Sequence[int]) -> None:
        counts = [-(-count // BLOCK_TOKENS) for count in tokens]
        size = -(-stack.block_bytes // _ALIGNMENT) * _ALIGNMENT
        total = sum(counts) * size + _ALIGNMENT
        self._memory = torch.empty(total, dtype=torch.uint8, device=stack.device)
        first = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        # In no order, as after a day of eviction.
        order = np.random.default_rng(0).permutation(sum(counts))
        self.of_users = np.split((first + order * size).astype(np.uintp), np.cumsum(counts)[:-1])

    def poison(self) -> None:
        self._memory.fill_(0xFF)  # NaN in each format


class StackSide(Side):
    """`CudaStack`, with K and V of the cached tokens in its blocks, or nothing cached."""

    def __init__(
        self,
        work: LayersWork,
        device: Device,
        *,
        rows: Rows = Rows.CANDIDATES,
        anew: bool = False,
        graphs: bool = False,
        ops: Ops | None = None,
        kind: Callable[..., CudaStack] = CudaStack,
    ) -> None:
        self._work = work
        self._cached = 0 if anew else work.point.cached
        self._lengths = [work.point.cached - self._cached + new for new in work.point.lengths]
        stack = work.stack
        ops = ops or device.ops(DTYPE, (stack.d_qk, stack.d_v))
        self.runner = kind(stack, DTYPE, device=device.name, ops=ops)
        self.implementation = self.runner.name
        keys = [self._cached + new for new in self._lengths]
        # What is read from blocks must not stay in a cache; what is written there is written anew.
        self._blocks = [Blocks(self.runner, keys) for _ in range(work.sets if self._cached else 1)]
        self._segments = [
            [
                segment(own, self._cached, new, work.point.candidates, rows)
                for own, new in zip(blocks.of_users, self._lengths, strict=True)
            ]
            for blocks in self._blocks
        ]
        self.work = arithmetic(stack, self._segments[0])
        self.flops = self.work.total
        self._inputs = [
            work.input(number, begin="new" if self._cached else "cached")
            for number in range(work.sets)
        ]
        self._x_TD = torch.empty_like(self._inputs[0])
        users = User.all_of(self._lengths, work.point.candidates)
        self._rows_R = candidate_rows(users, self._x_TD.device)
        self._replayed = 0
        self._graphs = graphs
        self._fill()
        if graphs:
            most = max(map(len, self._blocks[0].of_users))
            record = device.recorder()

            def counted(step: Callable[[], None]) -> Callable[[], None]:
                replay = record(step)

                def run() -> None:
                    self._replayed += 1
                    replay()

                return run

            self.runner.record([len(self._x_TD)], len(self._lengths), most, counted)

    def _fill(self) -> None:
        """Computes K and V of the cached tokens."""
        for number, blocks in enumerate(self._blocks):
            blocks.poison()
            if self._cached:
                cached_TD = self._work.input(number, begin="cached", end="cached")
                self.runner.run(
                    cached_TD,
                    [segment(own, 0, self._cached, 0, Rows.ALL) for own in blocks.of_users],
                )

    def poison(self) -> None:
        if not self._cached:
            for blocks in self._blocks:
                blocks.poison()

    def before(self, number: int) -> None:
        self._x_TD.copy_(self._inputs[number])

    def run(self, number: int) -> None:
        self.runner.run(self._x_TD, self._segments[number % len(self._segments)])

    def output(self) -> Tensor:
        if self._graphs and not self._replayed:
            raise RuntimeError("no graph was replayed, although they were recorded for this size")
        return self._x_TD.index_select(0, self._rows_R)

    def close(self) -> None:
        self.runner.close()


# ── Plain PyTorch ────────────────────────────────────────────────────────────────────────────────


class PlainSide(Side):
    """`PlainStack`, nothing cached."""

    def __init__(self, work: LayersWork, device: Device, *, all_rows: bool) -> None:
        self._stack = PlainStack(work.stack, TORCH_DTYPE, device.name)
        self._users = work.users
        self._all_rows = all_rows
        self._inputs = [
            work.input(number, begin="cached").to(TORCH_DTYPE) for number in range(work.sets)
        ]
        self._rows_R = candidate_rows(self._users, self._inputs[0].device)
        self._output = self._inputs[0]
        self.flops = _flops_anew(work, all_rows)

    def run(self, number: int) -> None:
        self._output = self._stack(self._inputs[number], self._users, self._all_rows)

    def output(self) -> Tensor:
        return self._output.index_select(0, self._rows_R) if self._all_rows else self._output


class PaddedSide(Side):
    """`gr_kernels.benchmark.dense`: padded batches and a mask, in eager mode or compiled.

    Its inputs are of the first set: they are far larger than any cache.
    """

    def __init__(self, work: LayersWork, device: Device, *, compiles: bool) -> None:
        first = work.first.recomputed
        point = work.point.recomputed
        first = Work(point, first.stack, first.users)
        model = DenseStack(work.stack).to(device.name, TORCH_DTYPE).eval().requires_grad_(False)
        self._model: Callable[..., Tensor] = model
        if compiles:
            torch._dynamo.reset()
            self._model = torch.compile(model, fullgraph=True, dynamic=False)
        self._inputs = [_padded_input(work, number) for number in range(work.sets)]
        self._mask = dense_mask(first).to(device.name, TORCH_DTYPE)
        self._output = torch.empty(0)
        self._point = point
        self.flops = _flops_anew(work, True)

    def run(self, number: int) -> None:
        self._output = self._model(self._inputs[number], self._mask)

    def output(self) -> Tensor:
        return self._output[:, self._point.new :].flatten(0, 1)


def _padded_input(work: LayersWork, number: int) -> Tensor:
    rows_TD = work.input(number, begin="cached")
    point = work.point.recomputed
    sizes = [new + point.candidates for new in point.lengths]
    made = padded(Work(point, work.stack, [part.cpu() for part in torch.split(rows_TD, sizes)]))
    return made.to(rows_TD.device, TORCH_DTYPE)


def _flops_anew(work: LayersWork, all_rows: bool) -> float:
    nowhere = np.empty(0, np.uintp)
    rows = Rows.ALL if all_rows else Rows.CANDIDATES
    of = work.point.recomputed
    return arithmetic(
        work.stack, [segment(nowhere, 0, new, of.candidates, rows) for new in of.lengths]
    ).total


# ── Cases ────────────────────────────────────────────────────────────────────────────────────────


def case(of: LayersPoint, device: Device, *, sets: int, name: str, graphs: bool = True) -> Case:
    """Everything that computes a point. With cached tokens also what computes them anew."""
    work = LayersWork(of, sets, device)
    ours = partial(StackSide, work, device)
    entries = [Entry(OURS, Kind.OURS, ours)]
    if of.cached:
        entries.append(Entry(ANEW, Kind.OURS, partial(ours, anew=True)))
        if graphs:
            entries.append(Entry(REPLAYED, Kind.OURS, partial(ours, graphs=True)))
            again = partial(ours, anew=True, graphs=True)
            entries.append(Entry(ANEW_REPLAYED, Kind.OURS, again))
    else:
        entries.append(Entry(ALL_ROWS, Kind.OURS, partial(ours, rows=Rows.ALL)))
    entries.append(Entry(PLAIN, Kind.PLAIN, partial(PlainSide, work, device, all_rows=False)))
    if not of.cached:
        entries += [
            Entry(PLAIN_ALL, Kind.PEER, partial(PlainSide, work, device, all_rows=True)),
            Entry(PADDED, Kind.PEER, partial(PaddedSide, work, device, compiles=False)),
            Entry(COMPILED, Kind.PEER, partial(PaddedSide, work, device, compiles=True)),
        ]
    return Case(name, of.facts, sets, work.right, entries, OURS)


# ── Kernel by kernel ─────────────────────────────────────────────────────────────────────────────


class Marks:
    """Which part of a layer ran from when to when."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: list[tuple[str, Stamp, Stamp]] = []

    def around(self, name: str, function: Callable[..., _Found]) -> Callable[..., _Found]:
        def marked(*args: object, **keywords: object) -> _Found:
            begin = self._device.stamp()
            found = function(*args, **keywords)
            self._spans.append((name, begin, self._device.stamp()))
            return found

        return marked

    def take(self) -> list[tuple[str, float]]:
        """Milliseconds of what ran since the last time, in order."""
        self._device.synchronize()
        spans, self._spans = self._spans, []
        return [(name, self._device.milliseconds(*stamps)) for name, *stamps in spans]


class _MarkedOps(Ops):
    def __init__(self, ops: Ops, marks: Marks) -> None:
        self._ops, self._marks = ops, marks

    def attention(self, most_queries: int, *, biased: bool) -> DeviceAttention:
        return self._marks.around("attention", self._ops.attention(most_queries, biased=biased))

    def projection(self, rows: int, columns: int, width: int) -> Callable[..., Tensor]:
        return self._marks.around("projection", self._ops.projection(rows, columns, width))

    def output(self, rows: int, columns: int, width: int) -> Callable[..., None]:
        return self._marks.around("output", self._ops.output(rows, columns, width))


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of kernel of a layer that computes all rows."""

    name: str
    ms: float
    flops: float
    bytes: float
    """Read and written, where it computes nothing."""

    @property
    def rate(self) -> str:
        if self.flops:
            return f"{self.flops / self.ms / 1e9:.0f} TFLOP/s"
        return f"{self.bytes / self.ms / 1e6:.0f} GB/s"


def breakdown(of: LayersPoint, device: Device, rounds: int) -> Sequence[Part]:
    """Where the time of one layer of all rows goes: medians over rounds and layers.

    The parts follow each other as they do in any run, so a launch that the host is late with is
    part of them.
    """
    marks = Marks(device)
    work = LayersWork(of, 1, device)

    class Marked(CudaStack):
        def _store(self, *args: object) -> None:
            marks.around("store K and V", super()._store)(*args)

    ops = _MarkedOps(device.ops(DTYPE, (work.stack.d_qk, work.stack.d_v)), marks)
    with torch.no_grad():
        side = StackSide(work, device, rows=Rows.ALL, ops=ops, kind=Marked)
        marks.take()
        found: dict[str, list[float]] = {}
        for number in range(rounds + 2):
            side.before(0)
            side.run(0)
            for name, ms in marks.take():
                if number >= 2:  # the first ones warm up
                    found.setdefault(name, []).append(ms)
        one = arithmetic(work.stack, side._segments[0], layers=1)
    new = sum(of.lengths)
    width = work.stack.num_heads * (work.stack.d_qk + work.stack.d_v)
    flops = {"projection": one.projection, "attention": one.attention, "output": one.output}
    stored = 2.0 * new * width * TORCH_DTYPE.itemsize
    side.close()
    return [
        Part(name, float(np.median(ms)), flops.get(name, 0.0), stored) for name, ms in found.items()
    ]
