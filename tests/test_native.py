"""The engine `native` on the models of gr-hstu: exact, whatever a cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import Task
from gr_core.contracts import Artifact, Cache, EngineOptions, InferenceResult
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.testing import EngineSuite
from gr_hstu.model import HSTUModel
from gr_hstu.testing import (
    CASES,
    CONFIGS,
    KINDS,
    Users,
    a_request,
    encode,
    load,
    random_module,
    write,
)
from gr_kernels.cache.paged import PagedCache
from gr_kernels.engine import NativeEngine
from gr_kernels.ops.hstu_stack import make_stack

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def everything() -> Registry:
    return PluginHost.discover().registry


def can(registry: Registry, dtype: str) -> bool:
    return dtype in registry.engines["native"].dtypes


class _Suite(EngineSuite):
    engine = "native"

    @pytest.fixture(params=KINDS)
    def bundle(self, request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
        return write(tmp_path, request.param)

    @pytest.fixture(autouse=True)
    def _this_processor_has_it(self, everything: Registry) -> None:
        if not can(everything, self.dtype):
            pytest.skip(f"no kernels for {self.dtype} on this processor")


class TestInFloat32(_Suite):
    dtype = "float32"


class TestInBfloat16(_Suite):
    dtype = "bfloat16"


def engine_of(model: HSTUModel, dtype: str, cache: Cache | None = None, **extra: Any) -> Any:
    engine = NativeEngine()
    caches = {"user_kv": cache} if cache is not None else {}
    options = EngineOptions(dtype=dtype, caches=caches, extra=extra)
    engine.load(Artifact("torch", model.bundle.path), model, model.tasks, options)
    return engine


def assert_equal(
    found: Sequence[InferenceResult], right: Sequence[InferenceResult], where: str = ""
) -> None:
    """Bit for bit."""
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores, err_msg=where)
        if other.indices is not None:
            np.testing.assert_array_equal(one.indices, other.indices, err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_pass_in_pieces_is_one_pass(
    tmp_path: Path, everything: Registry, kind: str, task: Task, dtype: str
) -> None:
    """Long histories and many candidates in micro-batches (M-FALCON), and requests together."""
    if not can(everything, dtype):
        pytest.skip(f"no kernels for {dtype} on this processor")
    model = load(write(tmp_path, kind))
    engine = engine_of(model, dtype)
    batch = [
        encode(model, task, a_request(seed=i, length=length, candidates=candidates))
        for i, (length, candidates) in enumerate([(24, 40), (0, 1), (3, 60), (24, 7), (11, 2)])
    ]
    batch.append(batch[0])
    at_once = engine.infer(batch)
    for tokens in (1, 5, 16):
        split = NativeEngine()
        options = EngineOptions(dtype=dtype, max_batch_tokens=tokens)
        split.load(Artifact("torch", model.bundle.path), model, [task], options)
        assert_equal(split.infer(batch), at_once, f"{tokens} tokens at once")
        split.close()
    engine.close()


def test_a_gpu_that_failed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA answers nothing any more then; an error of another kind is over with its batch."""
    model = load(write(tmp_path, "ranking"))
    engine = engine_of(model, "float32")
    batch = [encode(model, Task.RANK, a_request(seed=1, length=5, candidates=3))]
    before = engine.infer(batch)
    for error, ok in ((RuntimeError("once"), True), (torch.AcceleratorError("CUDA\nmore"), False)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(engine._layers[Task.RANK].runner, "run", fail)
            with pytest.raises(type(error)):
                engine.infer(batch)
        assert engine.health().ok is ok
        assert_equal(engine.infer(batch), before)
    assert engine.health().reason == "the GPU failed, restart the server: CUDA"
    engine.close()


def a_version(folder: Path, kind: str, number: int) -> HSTUModel:
    """Versions have other weights."""
    state = random_module(CONFIGS[kind], seed=number).state_dict()
    return load(write(folder, kind, version=str(number), state=state))


def under_fire(folder: Path, kind: str, task: Task, dtype: str, *, requests: int) -> None:
    """Random requests to two versions of a model behind a tiny cache, compared with no cache."""
    models = [a_version(folder, kind, number) for number in (1, 2)]
    stack = make_stack(models[0].stack(task), dtype)
    cache = PagedCache(24 * stack.block_bytes)
    stack.close()
    cached = [engine_of(model, dtype, cache) for model in models]
    fresh = [engine_of(model, dtype) for model in models]
    users = Users(seed=requests, users=12)
    reused = done = 0
    while done < requests:
        version = int(users.random.integers(2))
        count = int(users.random.integers(1, 5))
        batch = [encode(models[version], task, users.request()) for _ in range(count)]
        found = cached[version].infer(batch)
        assert_equal(found, fresh[version].infer(batch), f"request {done} of {kind}")
        reused += sum(result.tokens_reused for result in found)
        done += count
        if users.random.random() < 0.002:  # a rollout: what a version wrote is never read again
            cached[version].close()
            models[version] = a_version(folder, kind, done + 3)
            cached[version] = engine_of(models[version], dtype, cache)
            fresh[version].close()
            fresh[version] = engine_of(models[version], dtype)
    statistics = cache.statistics()
    assert reused > requests // 5, f"{reused} tokens of {requests} requests"
    assert statistics.hits > requests // 5
    assert statistics.evictions > requests // 10
    assert statistics.bytes <= statistics.capacity_bytes
    for engine in (*cached, *fresh):
        engine.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_reuse_under_fire(
    tmp_path: Path, everything: Registry, kind: str, task: Task, dtype: str
) -> None:
    if not can(everything, dtype):
        pytest.skip(f"no kernels for {dtype} on this processor")
    under_fire(tmp_path, kind, task, dtype, requests=500)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_reuse_under_fire_for_long(
    tmp_path: Path, everything: Registry, kind: str, task: Task
) -> None:
    under_fire(tmp_path, kind, task, everything.engines["native"].dtypes[0], requests=5000)
