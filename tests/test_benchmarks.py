"""The benchmarks measure what they say: their load, their statistics, and a short run of each."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks, as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name: str) -> ModuleType:
        pytest.importorskip("gr_hstu")
        return importlib.import_module(name)

    return module


async def test_latency_counts_from_when_a_request_was_due(module):
    arrivals = module("server_load.arrivals")
    one_at_a_time, latencies = asyncio.Lock(), []

    async def ask(number: int, due: float) -> None:
        async with one_at_a_time:  # a server that takes 20 ms for each, asked every 10 ms
            await asyncio.sleep(0.02)
        latencies.append(time.perf_counter() - due)

    seconds = await arrivals.open_loop(ask, [0.01 * i for i in range(20)])
    assert len(latencies) == 20
    assert latencies[0] >= 0.02
    # The last was due after 190 ms and answered when all were, 400 ms at the soonest.
    assert latencies[-1] == max(latencies) >= 0.2
    assert seconds >= 0.4


def test_arrivals_are_a_poisson_process(module):
    times = np.array(list(module("server_load.arrivals").poisson(200, 100, seed=3)))
    assert abs(len(times) - 20_000) < 5 * 20_000**0.5
    assert times[-1] < 100
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # of an exponential distribution


@pytest.mark.parametrize(("leak", "flat"), [(0.0, True), (0.5, True), (10.0, False)])
def test_memory_that_grows_is_told_from_memory_that_varies(module, leak: float, flat: bool):
    soak = module("server_load.soak")
    seconds = np.arange(480.0)
    wandering = np.cumsum(np.random.default_rng(5).normal(0, 0.05, len(seconds)))
    fitted = soak.slope(seconds, 1000 + leak / 60 * seconds + wandering - wandering.mean())
    assert fitted.is_flat is flat
    assert fitted.per_minute == pytest.approx(leak, abs=0.5)
    assert 0 < fitted.error < 0.5
    with pytest.raises(ValueError, match="run it longer"):
        soak.slope([0.0, 1.0], [1.0, 1.0])


def test_users_extend_their_histories(module):
    users = module("server_load.users")
    work = users.Visits(range(1000, 1500), first=40, new=8, returns=3, candidates=5)
    user, again, other = (users.User(work, number, seed=1) for number in (4, 4, 5))
    for visit in range(1, 4):
        before, whole = user.request(visit - 1), user.request(visit)
        new = user.request(visit, handle=b"h")
        assert len(whole.history) == 40 + 8 * visit
        np.testing.assert_array_equal(
            np.concatenate([before.history.item_ids, new.history.item_ids]), whole.history.item_ids
        )
        assert (np.diff(whole.history.timestamps_ms) > 0).all()
        assert whole.request_time_ms > whole.history.timestamps_ms[-1]
        same = again.request(visit)
        np.testing.assert_array_equal(same.history.item_ids, whole.history.item_ids)
        np.testing.assert_array_equal(same.candidates.item_ids, whole.candidates.item_ids)
        assert not np.array_equal(other.request(visit).history.item_ids, whole.history.item_ids)


def run(environment: Mapping[str, str], script: str, *arguments: str) -> str:
    pytest.importorskip("gr_hstu")
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_returning_users(environment: Mapping[str, str], tmp_path: Path):
    printed = run(environment, "returning_users.py", "--quick", "--out", str(tmp_path))
    assert printed.strip() == (tmp_path / "returning_users.md").read_text().strip()
    report: dict[str, Any] = json.loads((tmp_path / "returning_users.json").read_text())
    cells = {cell["side"]: cell for cell in report["measurements"]}
    assert "torch, whole history" in cells
    for side, cell in cells.items():
        assert cell["answered"] == cell["sent"] > 0, side
        assert 0 < cell["p50_ms"] <= cell["p99_ms"] <= cell["p99.9_ms"]
        assert cell["server_rss_mib"] > 10
        returns = side in ("native, handle", "native, whole history")
        assert (cell["reused"] > 0.5) is returns, side
    assert all(row["largest_error"] < row["tolerance"] for row in report["parity"])
    assert len(report["parity"]) == len({row["server"] for row in report["parity"]})


@pytest.mark.slow
def test_a_soak(environment: Mapping[str, str], tmp_path: Path):
    arguments = ("--soak", "0.1", "--soak-rate", "40", "--soak-users", "30")
    small = ("--soak-cache", "2MiB", "--soak-histories", "200KiB", "--out", str(tmp_path))
    command = [sys.executable, str(BENCHMARKS / "returning_users.py"), "--quick"]
    done = subprocess.run(
        [*command, *arguments, *small],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # six seconds prove nothing of memory
    report = json.loads((tmp_path / "returning_users_soak.json").read_text())
    assert report["result"]["answered"] == report["result"]["sent"] > 100
    assert report["result"]["users"] > 30
    rows = (tmp_path / "returning_users_soak.csv").read_text().splitlines()
    assert len(rows) > 32
    last = dict(zip(rows[0].split(","), map(float, rows[-1].split(",")), strict=True))
    assert last["histories.evictions"] > 0
    assert last["histories.bytes"] <= 200 * 1024
    assert last["rss_mib"] > 10


@pytest.mark.slow
def test_the_server_under_load(environment: Mapping[str, str]):
    printed = run(environment, "serving.py", "--quick", "--concurrency", "4", "--rows", "64")
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| 64 rows")]
    assert {row[3].strip() for row in rows} == {"bare", "server", "platform"}
    assert all(row[-2].strip() == "0" for row in rows)
