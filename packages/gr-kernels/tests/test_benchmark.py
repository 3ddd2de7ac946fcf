"""``gr bench-stack``: real sides at tiny points, and what is not reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core.errors import UserError
from gr_core.stack import Stack
from gr_kernels.benchmark import peers
from gr_kernels.benchmark.command import bench_stack
from gr_kernels.benchmark.dense import dense_mask
from gr_kernels.benchmark.growth import measure_growth
from gr_kernels.benchmark.measure import Settings, measure_point, relative_error
from gr_kernels.benchmark.memory import peak_bytes
from gr_kernels.benchmark.peers import Side, reference_rows
from gr_kernels.benchmark.points import GRID, TARGETS_MS, Point, demanded_ratios
from gr_kernels.benchmark.transformer import CausalTransformer, User
from gr_kernels.benchmark.work import make_work
from gr_kernels.ops.hstu_stack import HSTUStack, make_stack

TINY = "1/64/40/6"
QUICK = Settings(rounds=2, seconds=0.2)
LIGHT = ("native-bf16", "native-fp32", "blocked-bf16", "dense-fp32", "dense-bf16", "sdpa-bf16")
"""Sides that need neither a compiler nor another runtime."""


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(bench_stack, arguments, standalone_mode=False)


def kinds(*names: str) -> Sequence[type[Side]]:
    return [kind for kind in peers.SIDES if kind.name in names]


class WrongDense(peers.DenseBFloat16):
    """Off by a tenth."""

    name = "wrong-bf16"

    def rows(self) -> torch.Tensor:
        return super().rows() * 1.1


class WrongNative(peers.NativeBFloat16):
    """Its attention divides by too much."""

    def make(self, stack: Stack) -> HSTUStack:
        return make_stack(replace(stack, divisor=3 * stack.divisor), "bfloat16")


# ── Points ───────────────────────────────────────────────────────────────────────────────────────


def test_the_grid_is_written_as_it_is_read():
    assert [point.label for point in GRID] == list(TARGETS_MS)
    eight = Point.parse("4/256/8x1024/64")
    assert eight.lengths == (256, 366, 475, 585, 695, 805, 914, 1024)
    cached = Point.parse("4/512/2000+48/256")
    assert (cached.cached, cached.lengths, cached.candidates) == (2000, (48,), 256)
    assert cached.recomputed == Point.parse("4/512/2048/256")


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("4/256/2048", "expected layers/width/history/candidates"),
        ("4/100/2048/256", "width is 100; expected a multiple of 64"),
        ("0/256/2048/256", "layers is 0; expected from 1 to 64"),
        ("4/256/2048/99999", "candidates is 99999"),
        ("4/256/99x2048/1", "users is 99"),
        ("4/256/8x100+20/1", "cached tokens are for one user"),
    ],
)
def test_what_is_no_point_is_refused(label: str, what: str):
    with pytest.raises(ValueError, match=what):
        Point.parse(label)
    with pytest.raises(UserError, match=what):
        raise bench("--point", label).exception  # type: ignore[misc]


def test_demands_are_those_of_the_grid():
    assert demanded_ratios(Point.parse("4/256/512/256")) == {"sdpa-bf16": 2}
    assert demanded_ratios(Point.parse("4/256/1024/256"))["dense-bf16"] == 6
    assert demanded_ratios(Point.parse("4/256/2000+48/256"))["dense-bf16"] == 6
    assert demanded_ratios(Point.parse("8/512/1024/256"))["dense-bf16"] == 3


@settings(max_examples=40)
@given(
    users=st.integers(1, 4),
    cached=st.integers(0, 9),
    new=st.integers(1, 20),
    candidates=st.integers(1, 7),
)
def test_pairs_are_those_of_the_mask(users: int, cached: int, new: int, candidates: int):
    point = Point(2, 64, users, cached if users == 1 else 0, new, candidates)
    assert Point.parse(point.label) == point
    mask_BTS = dense_mask(make_work(point))
    pairs = 0
    for mask_TS, length in zip(mask_BTS, point.lengths, strict=True):
        padding = slice(length, point.new)
        assert not mask_TS[:length, point.cached + length :].any()
        assert not mask_TS[point.new :, point.cached + length : point.cached + point.new].any()
        pairs += int(mask_TS.sum() - mask_TS[padding].sum())
    assert point.pairs == pairs
    assert point.gflops(all_rows=False) < point.gflops(all_rows=True)


# ── Sides ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("label", [TINY, "2/64/3x45/5", "1/64/37+20/6"])
def test_sides_agree(label: str):
    work = make_work(Point.parse(label))
    expected_CD = reference_rows(work)
    for kind in kinds(*LIGHT, "native-bf16-all", "native-bf16-anew", "dense-bf16-anew"):
        side = kind(work, 1)
        for _ in range(2):  # once more, on what the first run left
            side.before()
            side.run()
        error = relative_error(side.rows(), expected_CD)
        assert side.rows().shape == expected_CD.shape
        if kind.limit is None:
            continue
        # Half precision of the smallest layers is not that of the grid.
        assert error <= max(kind.limit, 0.015 if kind.dtype is torch.bfloat16 else 0), kind.name
        side.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inductor-bf16", "onnx-fp32"])
@pytest.mark.parametrize("label", [TINY, "1/64/37+20/6"])
def test_sides_of_other_tools_agree(name: str, label: str):
    (kind,) = kinds(name)
    if reason := kind.unavailable():
        pytest.skip(reason)
    work = make_work(Point.parse(label))
    side = kind(work, 1)
    side.run()
    assert kind.limit is not None
    assert relative_error(side.rows(), reference_rows(work)) <= kind.limit
    side.close()


def test_the_transformer_is_causal_and_its_candidates_see_the_history():
    torch.manual_seed(0)
    history, candidates = 9, 4
    model = CausalTransformer(2, 64, torch.float32).requires_grad_(False)
    x_TD = torch.randn(history + candidates, 64)
    user = User.of(0, 0, history, candidates, model)
    before_TD = model(x_TD, [user])
    changed_TD = x_TD.clone()
    changed_TD[[5, history]] = torch.randn(2, 64)
    after_TD = model(changed_TD, [User.of(0, 0, history, candidates, model)])
    same_T = torch.isclose(before_TD, after_TD, atol=1e-6).all(dim=1)
    # Tokens before the changed one do not see it; all candidates do, but never each other.
    assert same_T.tolist() == [True] * 5 + [False] * (history - 5 + candidates)
    only_TD = x_TD.clone()
    only_TD[history] = torch.randn(64)
    other_TD = model(only_TD, [User.of(0, 0, history, candidates, model)])
    same_T = torch.isclose(before_TD, other_TD, atol=1e-6).all(dim=1)
    assert same_T.tolist() == [True] * history + [False] + [True] * (candidates - 1)


def test_cached_tokens_do_not_change_the_transformer():
    (kind,) = kinds("sdpa-bf16")
    work = make_work(Point.parse("2/64/21+8/5"))
    rows = []
    for given_work in (work, work.recomputed):
        side = kind(given_work, 1)
        side.run()
        rows.append(side.rows())
    assert relative_error(rows[0], rows[1]) < 0.02


# ── Parity ───────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_side_has_no_speed_up():
    result = measure_point(
        Point.parse(TINY), [*kinds("native-bf16", "dense-bf16"), WrongDense], QUICK
    )
    wrong, right = result.side("wrong-bf16"), result.side("dense-bf16")
    assert wrong is not None
    assert right is not None
    assert wrong.wrong
    assert wrong.error == pytest.approx(0.1, rel=0.1)
    assert wrong.faster is None
    assert wrong.withheld == "wrong-bf16 wrong"
    assert right.faster is not None
    assert right.faster > 0


def test_where_the_native_side_is_wrong_nothing_is_compared_with_it():
    result = measure_point(
        Point.parse(TINY), [WrongNative, *kinds("dense-bf16", "sdpa-bf16")], QUICK
    )
    native = result.side("native-bf16")
    assert native is not None
    assert native.wrong
    assert all(side.faster is None for side in result.sides)
    assert {side.withheld for side in result.sides} == {"", "native-bf16 wrong"}
    assert [demand.met for demand in result.demands] == [None]


def test_the_command_tells_of_wrong_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(peers, "SIDES", (*kinds("native-bf16"), WrongDense))
    file = tmp_path / "out.json"
    result = bench("--point", TINY, "--rounds", "1", "--no-memory", "--json", str(file))
    assert result.return_value == 1
    assert f"wrong: wrong-bf16 at {TINY}" in result.output
    (point,) = json.loads(file.read_text())["series"]["grid"]
    assert [(s["wrong"], s["faster"]) for s in point["sides"]] == [(False, None), (True, None)]


# ── The command ──────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_what_it_measured(tmp_path: Path):
    file, page = tmp_path / "new" / "out.json", tmp_path / "out.md"
    sides = [word for name in LIGHT for word in ("--side", name)]
    result = bench(
        *("--point", TINY, "--point", "1/64/40+9/6", *sides, "--rounds", "3", "--seconds", "0.3"),
        *("--no-memory", "--json", str(file), "--markdown", str(page)),
    )
    assert result.exception is None, result.output
    report = json.loads(file.read_text())
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["gemm_gflops_per_s"]["float32"] > 1
    points = {point["point"]: point for point in report["series"]["grid"]}
    assert list(points) == [TINY, "1/64/40+9/6"]
    for point in points.values():
        by_name = {side["name"]: side for side in point["sides"]}
        assert set(by_name) == set(LIGHT)
        for side in by_name.values():
            low, high = side["cpu_ms_quartiles"]
            assert 0 < low <= side["cpu_ms"] <= high
            assert 1 <= sum(seconds is not None for seconds in side["cpu_s"]) <= 3
        if not by_name["native-fp32"]["wrong"]:
            assert by_name["dense-fp32"]["compared_with"] == "native-fp32"
            assert by_name["dense-fp32"]["faster"] > 0
        assert by_name["sdpa-bf16"]["error"] is None
    text = page.read_text()
    assert f"| {TINY} | " in text
    assert "## Speed-up" in text
    assert "dense-bf16" in result.output


def test_mistakes_of_the_user_are_explained():
    for arguments, what in (
        (["--side", "nobody"], "no side 'nobody'; there are: native-bf16"),
        (["--growth", "--point", TINY], "--growth has points of its own"),
        (["--json", f"{__file__}/out.json"], "cannot be written"),
    ):
        with pytest.raises(UserError, match=what):
            raise bench(*arguments).exception  # type: ignore[misc]


def test_a_side_that_cannot_run_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = measure_point(Point.parse(TINY), kinds("native-bf16", "inductor-bf16"), QUICK)
    inductor = result.side("inductor-bf16")
    assert inductor is not None
    assert "no-such-compiler" in inductor.skipped
    assert inductor.cpu_ms is None


def test_a_tool_that_fails_is_left_out_with_its_reason():
    class Failing(peers.DenseBFloat16):
        name = "failing-bf16"

        def run(self) -> None:
            raise ValueError("no such operator\nand a long trace")

    result = measure_point(Point.parse(TINY), [*kinds("native-bf16", "dense-bf16"), Failing], QUICK)
    failing, dense = result.side("failing-bf16"), result.side("dense-bf16")
    assert failing is not None
    assert failing.failed
    assert failing.skipped == "ValueError: no such operator"
    assert dense is not None
    assert dense.cpu_ms is not None


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(tmp_path: Path):
    command = [
        *(sys.executable, "-c", "from gr_core.cli.app import main; main()", "bench-stack"),
        *("--point", "2/64/300/20", "--side", "dense-fp32", "--side", "native-fp32"),
        *("--seconds", "600", "--rounds", "1000", "--no-memory"),
        *("--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        status = Path(f"/proc/{running.pid}/status")
        if not status.exists():
            pytest.skip("no /proc, so the moment to interrupt cannot be known")
        deadline = time.monotonic() + 60
        # Torch is there and computes: the benchmark is in its rounds.
        while running.poll() is None and time.monotonic() < deadline:
            if _cpu_seconds(running.pid) > 6:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert list(tmp_path.iterdir()) == []


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_command_imports_nothing_heavy():
    code = "import sys, gr_kernels.benchmark.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ── Memory and growth ────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_run_is_that_of_its_temporaries():
    labels = ["1/64/512/8", "1/64/1024/8", "1/64/2000+48/16"]
    measured, trouble = peak_bytes("dense-fp32", labels, 1)
    assert not trouble
    for label in labels:
        point = Point.parse(label)
        scores = 4 * point.tokens * (point.cached + point.tokens) * 4
        # Scores in float32 are there once, and what else there is is small. The kernel counts
        # resident pages in batches.
        assert 0.95 * scores <= measured[label] <= 1.5 * scores + 2**23
    assert "ValueError" in peak_bytes("nobody", labels, 1)[1]


def test_growth_leaves_a_side_that_gets_slow():
    class Slow(peers.DenseFloat32):
        name = "slow"

        def run(self) -> None:
            end = time.process_time() + 0.002 * self.work.point.new
            while time.process_time() < end:
                super().run()

    series = {"history": [Point.parse(f"1/64/{length}/4") for length in (8, 16, 32, 64)]}
    measured = measure_growth(
        Settings(rounds=1, seconds=0.1), [*kinds("native-fp32"), Slow], series
    )
    ran = [result.side("slow") is not None for result in measured["history"]]
    assert ran == [True, True, False, False]
    assert all(result.side("native-fp32") is not None for result in measured["history"])
