"""The engine `native` on a GPU: on a real one where there is one, else on Triton's interpreter.

The interpreter stands for the GPU with the memory of the host: the layers are those of a GPU, kept
K and V are in the cache, and requests go in pieces. What is CUDA's own is not part of that: copies
beside the computing, graphs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import Task
from gr_core.contracts import Artifact, Cache, EngineOptions
from gr_core.repository import Bundle
from gr_core.stack import Stack
from gr_core.testing import EngineSuite
from gr_hstu.model import HSTUModel
from gr_hstu.testing import CASES, KINDS, Users, a_request, encode, load, write
from gr_hstu.testing import engine_of as torch_engine
from gr_kernels.cache.paged import PagedCache
from gr_kernels.engine import NativeEngine, native
from gr_kernels.engine.ends import HostEnds, SummedTokens
from gr_kernels.ops.hstu_attention import triton as attention
from gr_kernels.ops.hstu_output import triton as output
from gr_kernels.ops.hstu_projection import triton as projection
from gr_kernels.ops.hstu_stack.cuda import CudaStack, Ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; pip install gr-kernels[triton]"
)


class _Chosen(Ops):
    """Kernels in Triton, without a GPU."""

    def __init__(self) -> None:
        pass

    def attention(self, most_queries: int, *, biased: bool) -> Any:
        return attention.attend

    def projection(self, rows: int, columns: int, width: int) -> Any:
        return projection.hstu_projection_product

    def output(self, rows: int, columns: int, width: int) -> Any:
        return output.hstu_output_fused


def _stack(stack: Stack, dtype: str, **_: Any) -> CudaStack:
    return CudaStack(stack, dtype, device="cpu", ops=_Chosen())


def _record(
    model: object, task: Task, runner: CudaStack, space: object, tokens: Any, segments: int
) -> None:
    """As on a GPU, but for the replaying and the measuring."""

    def repeat(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    runner.record(tokens, segments, blocks=4, record=repeat)
    runner.prepared = True


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "interpreter"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        if INTERPRETED or not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    if not INTERPRETED:
        pytest.skip("test_on_the_interpreter runs it")
    monkeypatch.setattr(native, "make_stack", _stack)
    monkeypatch.setattr(native, "prepare", _record)
    return "cpu"


def engine_of(model: HSTUModel, device: str, cache: Cache | None = None, **extra: Any) -> Any:
    engine = NativeEngine()
    caches = {"user_kv": cache} if cache is not None else {}
    options = EngineOptions(device=device, caches=caches, max_batch_tokens=40, extra=extra)
    engine.load(Artifact("torch", model.bundle.path), model, model.tasks, options)
    return engine


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_it_answers_as_torch_does(tmp_path: Path, device: str, kind: str, task: Task) -> None:
    """Returning users on a small cache; in one pass, in pieces, and replayed from graphs."""
    model = load(write(tmp_path, kind))
    expected = torch_engine(model)
    cache = PagedCache(1 << 20, device_bytes=1 << 22, host_bytes=1 << 20)
    engines = [
        engine_of(model, device, cache, graph_tokens=[16, 64]),
        engine_of(model, device, graph_tokens=[]),
    ]
    for engine in engines:
        engine.warm_up()
    users = Users(seed=3, users=2)
    batches = [[encode(model, task, users.request()) for _ in range(2)] for _ in range(4)]
    batches.append(
        [
            encode(model, task, a_request(seed=i, length=length, candidates=candidates))
            for i, (length, candidates) in enumerate([(24, 50), (0, 1), (3, 2)])
        ]
    )
    reused = 0
    for batch in batches:
        right = expected.infer(batch)
        for engine in engines:
            for one, other in zip(engine.infer(batch), right, strict=True):
                np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-4)
                reused += one.tokens_reused
    assert reused
    for engine in engines:
        engine.close()


@pytest.mark.skipif(INTERPRETED, reason="nothing here is Triton's")
@pytest.mark.parametrize("task", [Task.RETRIEVE, Task.RANK])
@pytest.mark.parametrize("kind", ["summed", "on the host"])
def test_ends_that_are_made_for_a_device(tmp_path: Path, kind: str, task: Task) -> None:
    """Sums of tables, and the way to the CPU and back, against the model's own."""
    model = load(write(tmp_path, "research"))
    here = torch.device("cpu")
    ends = HostEnds(model, here)
    if kind == "summed":
        ends = SummedTokens(model, here, model.tasks)  # type: ignore[assignment]
    batch = [
        encode(model, task, a_request(seed=i, length=length, candidates=4))
        for i, length in enumerate([7, 0, 24])
    ]
    sequences = [model.sequence(request) for request in batch]
    for starts in ([3, 0, 24], [7, 0, 24]):
        found = ends.embed(batch, sequences, starts)
        torch.testing.assert_close(found, model.embed(batch, sequences, starts))
    rows = torch.randn(3, model.stack(task).d_model)
    rows[1] = 0
    answers = ends.outputs(task, batch, rows)
    for one, other in zip(answers, model.outputs(task, batch, rows), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.timeout(600)
def test_on_the_interpreter() -> None:
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", __file__), "-q", "-m", "not gpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.gpu
class TestOnCuda(EngineSuite):
    engine = "native"
    device = "cuda"

    @pytest.fixture(params=KINDS)
    def bundle(self, request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
        return write(tmp_path, request.param)


@pytest.mark.gpu
class TestInBfloat16OnCuda(TestOnCuda):
    dtype = "bfloat16"
