"""The benchmark of the layers on a GPU: what it counts, what it refuses to tell, what it writes.

Its sides run on Triton's interpreter and on a cache whose device is played; see `.triton_kernels`
and `.late_copies`. No figure of theirs means anything.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core.errors import PlanError
from gr_kernels import tuning
from gr_kernels.benchmark.dense import dense_mask
from gr_kernels.benchmark.gpu import device as gpu_device
from gr_kernels.benchmark.gpu import layers, report, suite, tables, tuned
from gr_kernels.benchmark.gpu.attention import AttentionPoint, plain_attention
from gr_kernels.benchmark.gpu.device import found_by_nvidia_smi
from gr_kernels.benchmark.gpu.from_host import FIRST, OVERLAPPED, break_even
from gr_kernels.benchmark.gpu.layers import (
    ANEW,
    ANEW_REPLAYED,
    COMPILED,
    OURS,
    PLAIN,
    REPLAYED,
    arithmetic,
    mixed_lengths,
    point,
    segment,
)
from gr_kernels.benchmark.gpu.measure import (
    Case,
    CaseResult,
    Entry,
    Kind,
    Settings,
    Side,
    SideResult,
    measure,
)
from gr_kernels.benchmark.gpu.plain import PlainStack, User, candidate_rows
from gr_kernels.benchmark.gpu.suite import Outcome, Plan
from gr_kernels.benchmark.gpu.tables import GatherPoint, TopkPoint
from gr_kernels.benchmark.measure import relative_error
from gr_kernels.benchmark.peers import reference_rows
from gr_kernels.benchmark.work import make_work
from gr_kernels.cache.paged import PagedCache
from gr_kernels.choice import choose
from gr_kernels.descriptors import KERNELS
from gr_kernels.ops.hstu_attention import reference
from gr_kernels.ops.hstu_stack.cuda import GRAPH_QUERIES, Ops
from gr_kernels.ops.hstu_stack.interface import Rows, Segment
from gr_kernels.tune import Case as TuneCase

from .late_copies import LateCache
from .stacks import random_stack
from .triton_kernels import (
    INTERPRETED,
    device_for,
    needs_triton,
    not_interpreted,
    run_on_the_interpreter,
)

QUICK = Settings(rounds=2, slice_ms=0.01, most_runs=2, warm_ups=1, wall_runs=1)
NOWHERE = np.empty(0, np.uintp)


class PlayedDevice:
    """Implements `Device` on the CPU, with kernels in Triton and a cache whose copies are late."""

    name, cache_device = "cpu", "late:0"

    def __init__(self) -> None:
        self._caches: list[LateCache] = []

    def describe(self) -> Mapping[str, str]:
        return {"GPU": "none", "torch": torch.__version__}

    def synchronize(self) -> None:
        """Copies are waited for by events alone, as a stream waits for them."""

    def stamp(self) -> float:
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        return max(end - begin, 1e-9) * 1e3

    def ops(self, dtype: str, heads: tuple[int, int]) -> Ops:
        from .test_stack_cuda import Chosen

        return Chosen()

    def attention(self, kernel: str, dtype: str, sizes: Mapping[str, int]) -> Any:
        if not kernel.endswith("-triton"):
            raise PlanError(f"{kernel} is not to be had")
        choose("hstu_projection", dtype)
        from gr_kernels.ops.hstu_attention.triton import attend

        return attend

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        return lambda step: step

    def cache(self, device_bytes: int, host_bytes: int) -> PagedCache:
        return LateCache(device_bytes, host_bytes)

    def host_copies(self) -> float:
        return 1e9

    def forget(self) -> None:
        return


# ── What is counted ──────────────────────────────────────────────────────────────────────────────


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    cached, new, candidates = (draw(st.integers(0, 6)) for _ in range(3))
    keys, rows = cached + new, new + candidates
    places = st.lists(st.integers(0, keys), min_size=rows, max_size=rows)
    return Segment(
        blocks=NOWHERE,
        cached=cached,
        new=new,
        candidates=candidates,
        low=np.array(draw(places), np.int32),
        high=np.array(draw(places), np.int32),
        rows=draw(st.sampled_from(Rows)),
    )


@settings(max_examples=60)
@given(st.lists(segments(), min_size=1, max_size=3), st.integers(1, 3))
def test_arithmetic_is_counted_from_who_sees_whom(batch: list[Segment], count: int):
    stack = random_stack(layers=count, d_model=24, num_heads=2, d_qk=16, d_v=8)
    f, k, wide = 16, 32, 48
    projection = attention = output = 0
    for layer in range(count):
        for one in batch:
            for row in range(one.new + one.candidates):
                place = one.cached + row
                is_last_of_history = row == one.new - 1
                wanted = (
                    layer < count - 1
                    or one.rows is Rows.ALL
                    or row >= one.new
                    or (one.rows is Rows.CANDIDATES_AND_LAST and is_last_of_history)
                )
                projection += 2 * 24 * ((2 * f + 2 * k) if wanted else (f + k))
                if wanted:
                    seen = {*range(one.low[row], one.high[row]), place}
                    attention += len(seen) * 2 * (k + f)
                    output += 2 * 24 * wide
    found = arithmetic(stack, batch)
    assert (found.projection, found.attention, found.output) == (projection, attention, output)
    assert found.total == projection + attention + output


@pytest.mark.parametrize("rows", [Rows.ALL, Rows.CANDIDATES])
def test_arithmetic_of_causal_histories_is_that_of_the_grid(rows: Rows):
    of = point(3, 64, [5, 40, 17], 6)
    batch = [segment(NOWHERE, 0, new, 6, rows) for new in of.lengths]
    found = arithmetic(make_work(of).stack, batch)
    assert found.total == pytest.approx(of.gflops(all_rows=rows is Rows.ALL) * 1e9)
    one = arithmetic(make_work(of).stack, batch, layers=1)
    assert one.pairs == of.pairs
    mask = dense_mask(make_work(of))
    padding = sum(int(mask[i, new : of.new].sum()) for i, new in enumerate(of.lengths))
    assert of.pairs == int(mask.sum()) - padding


def test_pairs_of_attention_alone():
    of = AttentionPoint(length=7, sequences=3, columns=16, heads=2)
    assert of.pairs == 3 * int(torch.ones(7, 7).tril().sum())
    assert of.flops == 4 * of.pairs * 32


def test_lengths_are_mixed_and_of_the_mean():
    lengths = mixed_lengths(32, 1024)
    assert (len(lengths), sum(lengths)) == (32, 32 * 1024)
    assert lengths == mixed_lengths(32, 1024)
    assert len(set(lengths)) > 20
    assert min(lengths) >= 256
    assert max(lengths) <= 1792
    (dense,) = suite.FULL.stack
    assert (dense.layers, dense.width, dense.users, dense.candidates) == (5, 512, 32, 2048)
    assert dense.lengths == lengths


def test_what_the_layers_launch_is_what_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every size that a stack asks for at the points, with graphs and without."""
    points = [point(1, 64, [40, 17], 6), point(1, 64, [3] * 5, 9, cached=100)]
    rows, queries = tuned.rows_and_queries(points)
    asked: dict[str, set[int]] = {"rows": set(), "queries": set()}

    class Asking(Ops):
        def __init__(self) -> None:
            super().__init__("bfloat16", (16, 16), ())

        def _chosen(self, op: str, sizes: Any) -> Any:  # type: ignore[override]
            for name, size in sizes:
                asked.get(name, set()).add(size)

    for of in points:
        for one in (of, of.recomputed):
            most = max(one.lengths) + one.candidates
            for tokens in (one.tokens, one.users * one.candidates):
                Asking().projection(tokens, 128, 64)
                Asking().output(tokens, 192, 64)
            Asking().attention(most, biased=False)
            if of.cached:
                Asking().attention(GRAPH_QUERIES, biased=False)
    assert asked == {"rows": set(rows), "queries": set(queries)}

    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path))
    tuning.forget()
    kernel = next(kernel for kernel in KERNELS if kernel.name == "hstu_output-cublas")
    cases = [TuneCase(kernel, "bfloat16", {"rows": n}, lambda kernel: lambda: torch.ones(1))
             for n in rows]  # fmt: skip
    steps: list[str] = []
    assert tuned.tune(cases, lambda run: 7.0, steps.append) == len(rows) == len(steps)
    assert tuning.measured(kernel.name, "bfloat16", {"rows": rows[0]}) == 7.0
    assert tuned.tune(cases, lambda run: 7.0, steps.append) == 0  # all are there
    tuning.forget()


# ── Plain PyTorch ────────────────────────────────────────────────────────────────────────────────


def test_plain_torch_computes_the_layers():
    of = point(3, 64, [5, 41, 1], 6)
    work = make_work(of)
    users = User.all_of(of.lengths, of.candidates)
    x_TD = torch.cat(list(work.users))
    plain = PlainStack(work.stack, torch.float32, "cpu")
    right = reference_rows(work)
    rows_R = candidate_rows(users, x_TD.device)
    with torch.no_grad():
        assert relative_error(plain(x_TD, users, all_rows=False), right) < 1e-6
        assert relative_error(plain(x_TD, users)[rows_R], right) < 1e-6


def test_plain_attention_is_the_op():
    of = AttentionPoint(length=9, sequences=2, columns=16, heads=2)
    q, k, v = (torch.randn(18, 2, 16) for _ in range(3))
    offsets = torch.tensor([0, 9, 18])
    own = torch.arange(9).repeat(2)
    given = (offsets, offsets, torch.zeros_like(own), own + 1, own, of.alpha, 9.0)
    right = reference.hstu_attention(q.double(), k.double(), v.double(), *given)
    assert relative_error(plain_attention(q, k, v, of), right) < 1e-6


# ── Parity ───────────────────────────────────────────────────────────────────────────────────────


class Product(Side):
    """A product of matrices in some precision, right but for ``damage``."""

    flops = 2.0 * 64**3

    def __init__(self, a: Tensor, b: Tensor, damage: float = 0.0, after: int = 0) -> None:
        self._a, self._b, self._damage, self._after = a, b, damage, after
        self.out = torch.empty(0)
        self.runs = 0

    def run(self, number: int) -> None:
        self.runs += 1
        self.out = self._a @ self._b
        if self.runs > self._after:
            self.out = self.out * (1 + self._damage)

    def output(self) -> Tensor:
        return self.out


class Failing(Product):
    def run(self, number: int) -> None:
        raise ValueError("no such instruction\nand a long trace")


class Unfit(Product):
    def run(self, number: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def case_of(ours: Callable[[Tensor, Tensor], Side], peer: Any = Product) -> Case:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    a16, b16 = a.bfloat16(), b.bfloat16()
    return Case(
        "a product",
        {"size": 64},
        1,
        lambda number: a @ b,
        [
            Entry("ours", Kind.OURS, lambda: ours(a16, b16)),
            Entry("plain", Kind.PLAIN, lambda: Product(a16, b16)),
            Entry("peer", Kind.PEER, lambda: peer(a16, b16)),
            Entry("softmax", Kind.OTHER, lambda: Product(a16, b16, damage=9.0)),
        ],
        "ours",
    )


def outcome_of(case: CaseResult) -> Outcome:
    return Outcome(QUICK, {"GPU": "none"}, series={suite.TABLES: [(None, case)]})


def test_what_is_right_is_timed_and_compared():
    case = measure(case_of(Product), PlayedDevice(), QUICK)
    assert not case.red
    for side in case.sides:
        assert len(side.ms) == len(side.wall_ms) == 2
        assert side.tflops_per_s is not None
        assert side.tflops_per_s > 0
    assert [side.faster is not None for side in case.sides] == [False, True, True, True]
    assert case.sides[3].error is None
    page = report.as_markdown(outcome_of(case))
    assert "Parity is red" not in page
    assert "| softmax | " in page
    assert "another function" in page


@pytest.mark.parametrize("damage", [0.1, float("nan")])
def test_nothing_is_told_of_what_is_wrong(damage: float):
    case = measure(
        case_of(lambda a, b: Product(a, b, damage)), PlayedDevice(), replace(QUICK, rounds=1)
    )
    ours, *others = case.sides
    assert ours.wrong
    assert not ours.ms
    assert [side.faster for side in case.sides] == [None] * 4
    assert {side.withheld for side in others} == {"ours wrong"}
    outcome = outcome_of(case)
    assert outcome.red[0].startswith("a product: ours: its error is ")
    page = report.as_markdown(outcome)
    assert "**Parity is red**" in page
    assert "WRONG: its error is " in page
    assert json.loads(report.json_text(outcome))["series"]["tables"][0]["sides"][0]["wrong"]


def test_an_error_that_comes_later_is_seen():
    """As of a race: right when it is checked, wrong after the rounds."""
    case = measure(case_of(lambda a, b: Product(a, b, 0.1, after=4)), PlayedDevice(), QUICK)
    assert case.side("ours").wrong  # type: ignore[union-attr]
    assert all(side.faster is None for side in case.sides)
    (first, *_), *_ = [row[1:] for row in report.case_table(case, None)[1]]
    assert first == ""


def test_a_single_wrong_row_is_seen():
    """Which the error of all rows together would hide."""
    right = torch.randn(4096, 8)

    def rounded(bits: float, wrong_rows: int) -> Side:
        out = right + bits * torch.randn(4096, 8)
        out[:wrong_rows] *= 1.5
        return Given(out)

    case = Case(
        "rows",
        {},
        1,
        lambda number: right,
        [
            Entry("ours", Kind.OURS, lambda: rounded(0.005, 1)),
            Entry("plain", Kind.PLAIN, lambda: rounded(0.01, 0)),
            Entry("peer", Kind.PEER, lambda: rounded(0.01, 0)),
        ],
        "ours",
    )
    ours, _, peer = measure(case, PlayedDevice(), QUICK).sides
    assert ours.error is not None
    assert ours.limit is not None
    assert ours.error < ours.limit
    assert ours.wrong
    assert not peer.wrong


class Given(Side):
    """What it is given."""

    def __init__(self, out: Tensor) -> None:
        self._out = out

    def run(self, number: int) -> None:
        return

    def output(self) -> Tensor:
        return self._out


def test_a_wrong_peer_is_not_compared():
    case = measure(case_of(Product, lambda a, b: Product(a, b, 0.1)), PlayedDevice(), QUICK)
    peer = case.side("peer")
    assert peer is not None
    assert peer.wrong
    assert (peer.faster, peer.withheld) == (None, "peer wrong")
    assert case.side("plain").faster is not None  # type: ignore[union-attr]
    assert not case.red


def test_without_plain_torch_nothing_is_known_to_be_right():
    whole = case_of(Product)
    case = measure(
        replace(whole, entries=[whole.entries[0], whole.entries[3]]), PlayedDevice(), QUICK
    )
    assert [side.name for side in case.red] == ["ours"]
    assert all(side.faster is None for side in case.sides)
    assert "plain PyTorch has none" in outcome_of(case).red[0]


def test_what_fails_is_named_and_the_others_are_measured():
    case = measure(case_of(Failing, Unfit), PlayedDevice(), QUICK)
    ours, plain, peer, _ = case.sides
    assert ours.failed
    assert ours.skipped.startswith("ValueError at test_gpu_layers.py:")
    assert ours.skipped.endswith("no such instruction")
    assert (peer.failed, peer.skipped) == (False, "there is not enough memory on the device")
    assert plain.ms
    assert plain.withheld == "ours was not measured"
    outcome = outcome_of(case)
    assert len(outcome.red) == 1
    assert "- peer: there is not enough memory" in report.as_markdown(outcome)


# ── What is concluded ────────────────────────────────────────────────────────────────────────────


def measured(name: str, *ms: float, error: float = 0.001, kind: Kind = Kind.OURS) -> SideResult:
    return SideResult(
        name, kind, error=error, limit=0.01, worst=0, worst_limit=1, ms=list(ms), wall_ms=list(ms)
    )


def case_with(*sides: SideResult) -> CaseResult:
    return CaseResult("case", {}, sides[0].name, sides)


def test_copying_pays_from_where_it_pays_for_all_that_is_longer():
    def at(users: int, cached: int, anew: float, copied: float, error: float = 0.001) -> Any:
        of = point(1, 64, [8] * users, 4, cached)
        return of, case_with(measured(OVERLAPPED, copied, error=error), measured(ANEW, anew))

    found = [
        at(1, 64, 1, 2),
        at(1, 128, 3, 2),
        at(1, 256, 2, 3),
        at(1, 512, 6, 3),
        at(1, 1024, 9, 4),
    ]
    assert break_even(found) == {1: "from 512 tokens on"}
    assert break_even([at(8, 64, 1, 2), at(8, 128, 1, 2)]) == {8: "never"}
    assert break_even([at(8, 64, 3, 2), at(8, 128, 3, 2, error=0.1)]) == {}
    columns, rows = report.host_table(found)
    assert columns[-1] == "anew by layer by layer"
    assert rows[1][:2] == ("1", "128")
    assert rows[1][-1] == "1.50"


def test_targets_are_judged_by_what_is_fastest_and_right():
    returning = (point(8, 1024, [128] * 8, 256, 3968),)
    sides = [
        measured(OURS, 2.0, 2.0),
        measured(REPLAYED, 1.0, 1.0),
        measured(ANEW, 8.0, 8.0),
        measured(ANEW_REPLAYED, 9.0, 9.0),
    ]
    dense = case_with(measured(OURS, 7.5, 6.9, 6.8))
    outcome = Outcome(
        QUICK,
        series={
            suite.STACK: [(suite.DENSE, dense)],
            suite.RETURNING: [(returning[0], case_with(*sides))],
        },
    )
    _, (first, second) = report.targets_table(outcome)
    assert first[1:] == ("at most 7 ms", "6.90", "met")
    assert second[1:] == ("at least 7.7 times faster than anew", "8.00 times", "met")
    sides[1].error = 0.1
    dense.sides[0].error = 0.1
    _, (first, second) = report.targets_table(outcome)
    assert first[2:] == second[2:] == ("", "")


def test_what_nvidia_smi_tells_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found_by_nvidia_smi("1-2") == {}  # there is none
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --id=GPU-1-2 ] || exit 6\n'
        "echo 580.1, 1980 MHz, 1981 MHz, 2619 MHz, 700.00 W, 31\n"
    )
    program.chmod(0o755)
    told = found_by_nvidia_smi("1-2")
    assert (told["driver"], told["SM clock"], told["power limit"]) == (
        *("580.1", "1980 MHz", "700.00 W"),
    )
    assert found_by_nvidia_smi("3") == {}  # it fails


# ── The real sides ───────────────────────────────────────────────────────────────────────────────

TINY = Plan(
    stack=[point(1, 64, [9, 3], 2)],
    returning=[point(1, 64, [2, 1], 1, cached=5)],
    host=[point(2, 64, [1], 1, cached=32)],
    attention=[AttentionPoint(length=35, sequences=2, columns=16, heads=1)],
    gather=[GatherPoint(3, 20, 16, 9)],
    topk=[TopkPoint(300, 32, 3, 7)],
    matrix=32,
    copied=1024,
    sets=1,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    device_for("cpu", monkeypatch)

    def no_compiler(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    return PlayedDevice()


@needs_triton
def test_all_sides_agree(device: PlayedDevice):
    outcome = suite.run(TINY, device, replace(QUICK, rounds=1))
    assert not outcome.red
    assert not outcome.broken
    assert list(outcome.series) == list(suite.SERIES)
    [(_, returning)] = outcome.series[suite.RETURNING]
    assert {s.name for s in returning.sides if s.ms} == {
        *(OURS, ANEW, REPLAYED, ANEW_REPLAYED, PLAIN)
    }
    [(_, host)] = outcome.series[suite.HOST]
    assert {s.name for s in host.sides if s.ms} == {OVERLAPPED, FIRST, ANEW, OURS, PLAIN}
    assert sorted({part.name for part in outcome.parts}) == [
        *("attention", "output", "projection", "store K and V")
    ]
    assert any(line.startswith("op hstu_projection in bfloat16: ") for line in outcome.chosen)
    page = report.as_markdown(outcome)
    for title in (*report.TITLES.values(), "Kernel by kernel", "Machine", "Targets"):
        assert f"# {title}\n" in page
    assert f"- {COMPILED}: RuntimeError" in page
    raw = json.loads(report.json_text(outcome))
    assert raw["series"]["stack"][0]["point"]["histories"] == [9, 3]


@needs_triton
@pytest.mark.gpu
def test_all_sides_agree_on_a_gpu():
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from gr_kernels.benchmark.gpu.device import CudaDevice

    outcome = suite.run(replace(TINY, sets=2), CudaDevice(), replace(QUICK, wall_runs=2))
    assert not outcome.red
    assert not outcome.broken
    assert outcome.machine["GPU"] == torch.cuda.get_device_name(0)
    for case in outcome.cases:
        assert all(side.ms for side in case.sides if side.kind in (Kind.OURS, Kind.PLAIN)
                   and not side.skipped)  # fmt: skip
    assert report.as_markdown(outcome)


class Damaged(Ops):
    """Attention whose heads are confused."""

    def __init__(self, ops: Ops) -> None:
        self.projection, self.output = ops.projection, ops.output  # type: ignore[method-assign]
        self._ops = ops

    def attention(self, most_queries: int, *, biased: bool) -> Any:
        attend = self._ops.attention(most_queries, biased=biased)
        return lambda *args: attend(*args).roll(1, 1)


@needs_triton
def test_damaged_kernels_are_found_out(device: PlayedDevice, monkeypatch: pytest.MonkeyPatch):
    ops = device.ops("bfloat16", (16, 16))
    monkeypatch.setattr(device, "ops", lambda dtype, heads: Damaged(ops))
    outcome = suite.run(TINY, device, replace(QUICK, rounds=1), [suite.RETURNING])
    wrong = [side.name for case in outcome.cases for side in case.red]
    assert wrong == [OURS, ANEW, REPLAYED, ANEW_REPLAYED]
    assert all(side.faster is None for case in outcome.cases for side in case.sides)
    _, targets = report.targets_table(outcome)
    assert [row[2:] for row in targets] == [("", "")]


@needs_triton
def test_graphs_that_are_not_replayed_do_not_pass_for_it(
    device: PlayedDevice, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        layers.CudaStack, "record", lambda self, *args: None
    )  # as if none had the size
    (of,) = TINY.returning
    made = layers.case(of, device, sets=1, name="returning")
    entries = [entry for entry in made.entries if entry.name in (REPLAYED, OURS)]
    case = measure(replace(made, entries=entries), device, replace(QUICK, rounds=1))
    replayed = case.side(REPLAYED)
    assert replayed is not None
    assert "no graph was replayed" in replayed.skipped


# ── The script ───────────────────────────────────────────────────────────────────────────────────

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_layers.py"


@pytest.fixture
def script() -> Any:
    if not SCRIPT.exists():
        pytest.skip("is not in this checkout")
    spec = importlib.util.spec_from_file_location("gpu_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_says_what_it_needs(
    script: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--quick"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    for wrong in (["--rounds", "-1"], ["--only", "everything"]):
        with pytest.raises(SystemExit):
            script.main(wrong)


@needs_triton
@pytest.mark.parametrize("damaged", [False, True])
def test_the_script_measures_and_writes(
    script: Any,
    damaged: bool,
    device: PlayedDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(script, "unusable", lambda number: "")
    monkeypatch.setattr(gpu_device, "CudaDevice", lambda number: device)
    small = replace(TINY, stack=(), returning=(), host=(), attention=(), topk=())
    monkeypatch.setattr(suite, "QUICK", small)
    if damaged:
        gather = tables.TritonEmbeddingGather.__call__

        def wrong(self: Any, ids: Tensor, places: Any, out: Tensor) -> Tensor:
            return gather(self, ids, places, out).mul_(1.01)

        monkeypatch.setattr(tables.TritonEmbeddingGather, "__call__", wrong)
    json_file, page = tmp_path / "new" / "out.json", tmp_path / "out.md"
    arguments = ["--quick", "--rounds", "1", "--json", str(json_file), "--markdown", str(page)]
    assert script.main(arguments) == int(damaged)
    raw = json.loads(json_file.read_text())
    [case] = raw["series"]["tables"]
    ours, plain = case["sides"]
    assert (ours["wrong"], plain["faster"] is None) == (damaged, damaged)
    assert ("**Parity is red**" in page.read_text()) == damaged
    assert ("wrong: 3 tables of 20 x 16" in capsys.readouterr().err) == damaged


@pytest.mark.slow
@not_interpreted
@pytest.mark.timeout(600)
def test_on_the_interpreter():
    run_on_the_interpreter(__file__)
