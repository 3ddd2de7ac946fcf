"""What every engine must do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from gr_core.artifacts import materialize
from gr_core.contracts import (
    AsyncEngine,
    EncodedRequest,
    Engine,
    EngineOptions,
    InferenceResult,
    Model,
)
from gr_core.engines import Only, RunningEngine, running
from gr_core.errors import DeadlineExceeded, GrError, Unavailable
from gr_core.generation import MAX_BEAM_WIDTH, GenerativeModel
from gr_core.parity import TOLERANCE, Parity, compare
from gr_core.planner import Plan, plan
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.samples import for_task, sample_requests
from gr_core.testing.suite import Suite
from gr_core.types import Candidates, History, RecommendRequest, Task

_K = 5


class EngineSuite(Suite):
    """Subclass it with ``engine``, its name, and a fixture ``bundle`` of a model that it can run.

    The model's catalogue should have at least 20 items. Scores are compared within the tolerance
    of ``dtype``; in float32, within a tenth of what other engines are allowed, since here only the
    batch differs.
    """

    engine: ClassVar[str]
    device: ClassVar[str] = "auto"
    dtype: ClassVar[str] = "auto"
    options: ClassVar[Mapping[str, Any]] = {}
    """Options that only this engine knows."""

    @pytest.fixture
    def bundle(self) -> Bundle:
        raise NotImplementedError("give a fixture `bundle`: a small model that the engine can run")

    @pytest.fixture
    def model(self, registry: Registry, bundle: Bundle) -> Iterator[Model]:
        model: Model = registry.models[bundle.architecture].resolve()(bundle)
        yield model
        model.close()

    @pytest.fixture
    def plans(self, registry: Registry, model: Model) -> Sequence[Plan]:
        """A plan for each task that both the model and the engine have."""
        tasks = [t for t in model.tasks if t in registry.engines[self.engine].tasks]
        assert tasks, f"engine {self.engine} has none of the model's tasks"
        return [
            plan(
                registry,
                model.bundle.architecture,
                task,
                strategy=self.engine,
                device=self.device,
                dtype=self.dtype,
            )
            for task in tasks
        ]

    def test_it_is_what_its_descriptor_says(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            with running(chosen, model, extra=self.options) as engine:
                asynchronous = asyncio.iscoroutinefunction(engine.engine.infer)
                assert asynchronous == chosen.engine.batches_itself
                kind = AsyncEngine if chosen.engine.batches_itself else Engine
                assert isinstance(engine.engine, kind)

    def test_results_have_the_promised_shapes(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            batch = _batch(model, chosen.task, 6)
            with running(chosen, model, extra=self.options) as engine:
                results = engine.infer(batch)
            assert len(results) == len(batch)
            for request, result in zip(batch, results, strict=True):
                _check_shape(model, chosen.task, request, result)

    def test_an_empty_history_and_one_item(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            with running(chosen, model, extra=self.options) as engine:
                for length in (0, 1):
                    request = _encoded(model, chosen.task, _history(model, length))
                    (result,) = engine.infer([request])
                    _check_shape(model, chosen.task, request, result)

    def test_one_candidate_and_many(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            if chosen.task is not Task.RANK:
                continue
            with running(chosen, model, extra=self.options) as engine:
                for count in (1, len(model.catalogue)):
                    ids = model.catalogue.ids_of(np.arange(1, count + 1))
                    ask = replace(_history(model, 5), candidates=Candidates(ids))
                    request = _encoded(model, Task.RANK, ask)
                    (result,) = engine.infer([request])
                    assert result.scores.shape == (count, len(model.heads))
                    assert np.isfinite(result.scores).all()

    def test_each_request_gets_its_own_k(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            if not chosen.task.finds_items:
                continue
            request = _batch(model, chosen.task, 4)[-1]
            batch = [replace(request, k=k) for k in (1, _deepest(model), 3)]
            with running(chosen, model, extra=self.options) as engine:
                results = engine.infer(batch)
            assert [len(r.scores) for r in results] == [r.k for r in batch]
            for one, three in zip(results[2].scores, results[1].scores, strict=False):
                assert one == pytest.approx(three, rel=self._tolerance(chosen), abs=1e-6)

    def test_every_item_can_be_generated(self, plans: Sequence[Plan], model: Model) -> None:
        """A search as wide as the catalogue finds all of it; the same codes have one score."""
        for chosen in plans:
            if chosen.task is not Task.GENERATE:
                continue
            assert isinstance(model, GenerativeModel)
            count = min(len(model.catalogue), MAX_BEAM_WIDTH)
            batch = [replace(r, k=count) for r in _batch(model, chosen.task, 3)]
            with running(chosen, model, extra=self.options) as engine:
                results = engine.infer(batch)
            for request, result in zip(batch, results, strict=True):
                _check_shape(model, chosen.task, request, result)
                assert result.indices is not None
                tokens = model.item_tokens()[result.indices]
                _, which = np.unique(tokens, axis=0, return_inverse=True)
                for group in range(int(which.max()) + 1):
                    assert len(np.unique(result.scores[which.reshape(-1) == group])) == 1

    def test_batch_mates_and_padding_never_change_scores(
        self, plans: Sequence[Plan], model: Model
    ) -> None:
        for chosen in plans:
            batch = _batch(model, chosen.task, 6)
            with running(chosen, model, extra=self.options) as engine:
                alone = [engine.infer([request])[0] for request in batch]
                together = engine.infer(batch)
            self._assert_same(chosen, together, alone)

    def test_the_order_of_a_batch_never_changes_scores(
        self, plans: Sequence[Plan], model: Model
    ) -> None:
        for chosen in plans:
            batch = _batch(model, chosen.task, 6)
            with running(chosen, model, extra=self.options) as engine:
                forward = engine.infer(batch)
                backward = engine.infer(batch[::-1])
            self._assert_same(chosen, forward, list(backward)[::-1])

    def test_the_same_request_twice_in_a_batch(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            request = _batch(model, chosen.task, 4)[-1]
            with running(chosen, model, extra=self.options) as engine:
                one, two = engine.infer([request, request])
            self._assert_same(chosen, [one], [two])

    def test_results_stay_as_they_are(self, plans: Sequence[Plan], model: Model) -> None:
        """Results and inputs are not buffers that the next batch overwrites."""
        for chosen in plans:
            batch = _batch(model, chosen.task, 6)
            inputs = [{k: a.copy() for k, a in r.arrays.items()} for r in batch]
            with running(chosen, model, extra=self.options) as engine:
                results = engine.infer(batch[:3])
                kept = [r.scores.copy() for r in results]
                engine.infer(batch[3:])
            for result, scores in zip(results, kept, strict=True):
                np.testing.assert_array_equal(result.scores, scores)
            for request, arrays in zip(batch, inputs, strict=True):
                for name, array in arrays.items():
                    np.testing.assert_array_equal(request.arrays[name], array, err_msg=name)

    def test_it_agrees_with_the_reference(
        self, registry: Registry, plans: Sequence[Plan], model: Model
    ) -> None:
        compared: list[Parity] = []
        for chosen in plans:
            only = Only([self.engine], chosen.device, [chosen.dtype])
            compared += compare(registry, model, chosen.task, only, requests=12, k=_K)
        if not compared:
            pytest.skip("it is the reference, or the only engine for this model")
        for parity in compared:
            assert parity.ok, f"{parity.task} on {parity.engine}: {parity.problem}"

    def test_unknown_options_are_refused(self, plans: Sequence[Plan], model: Model) -> None:
        chosen = plans[0]
        extra = {**self.options, "no_such_option": 1}
        with pytest.raises(GrError, match="no_such_option"), running(chosen, model, extra=extra):
            pass

    def test_its_life(self, plans: Sequence[Plan], model: Model) -> None:
        """Not healthy before it is loaded nor after it is closed, which may be done any time."""
        chosen = plans[0]
        engine = chosen.engine.resolve()()
        assert not engine.health().ok
        engine.close()
        engine = chosen.engine.resolve()()
        options = EngineOptions(chosen.device, chosen.dtype, extra=self.options)
        artifact = materialize(chosen, model, None, self.options)
        engine.load(artifact, model, [chosen.task], options)
        engine.warm_up()
        assert engine.health().ok
        engine.close()
        engine.close()
        assert not engine.health().ok
        assert engine.health().reason

    def test_a_closed_engine_is_unavailable(self, plans: Sequence[Plan], model: Model) -> None:
        for chosen in plans:
            batch = _batch(model, chosen.task, 1)
            with running(chosen, model, extra=self.options) as engine:
                engine.infer(batch)
                engine.engine.close()
                with pytest.raises(Unavailable):
                    engine.infer(batch)

    def test_a_passed_deadline_is_not_computed(self, plans: Sequence[Plan], model: Model) -> None:
        self._only_if_it_batches_itself(plans)
        for chosen in plans:
            (request,) = _batch(model, chosen.task, 1)
            with running(chosen, model, extra=self.options) as engine:
                assert isinstance(engine.engine, AsyncEngine)
                with pytest.raises(DeadlineExceeded):
                    engine.loop.run(engine.engine.infer(request, time.monotonic() - 1))

    def test_it_survives_cancellation(self, plans: Sequence[Plan], model: Model) -> None:
        self._only_if_it_batches_itself(plans)
        for chosen in plans:
            (request,) = _batch(model, chosen.task, 1)
            with running(chosen, model, extra=self.options) as engine:
                engine.loop.run(_cancel_one(engine, request))
                _check_shape(model, chosen.task, request, engine.infer([request])[0])

    def _only_if_it_batches_itself(self, plans: Sequence[Plan]) -> None:
        if not plans[0].engine.batches_itself:
            pytest.skip("the platform's batcher does this for it")

    def _tolerance(self, chosen: Plan) -> float:
        tolerance = TOLERANCE[chosen.dtype]
        return tolerance / 10 if chosen.dtype == "float32" else tolerance

    def _assert_same(
        self, chosen: Plan, found: Sequence[InferenceResult], right: Sequence[InferenceResult]
    ) -> None:
        for number, (one, other) in enumerate(zip(found, right, strict=True)):
            scale = max(float(np.abs(other.scores).max(initial=0.0)), 1e-6)
            np.testing.assert_allclose(
                one.scores / scale,
                other.scores / scale,
                rtol=0,
                atol=self._tolerance(chosen),
                err_msg=f"{chosen.task.value}, request {number}",
            )


def _history(model: Model, length: int) -> RecommendRequest:
    (sample,) = sample_requests(model, 1, candidates=8)
    items = np.arange(length) % len(model.catalogue) + 1
    assert sample.request_time_ms is not None
    times = sample.request_time_ms - 60_000 * np.arange(length, 0, -1, dtype=np.int64)
    return replace(sample, history=History(model.catalogue.ids_of(items), times))


def _encoded(model: Model, task: Task, request: RecommendRequest) -> EncodedRequest:
    encoded = model.encode(for_task(request, task), task).request
    return replace(encoded, k=min(_K, len(model.catalogue))) if task.finds_items else encoded


def _deepest(model: Model) -> int:
    """How many items can be asked for without changing which of them come first."""
    width = model.beam_width if isinstance(model, GenerativeModel) else len(model.catalogue)
    return min(width, len(model.catalogue))


def _batch(model: Model, task: Task, count: int) -> list[EncodedRequest]:
    """Requests of very different lengths, the empty history first."""
    samples = sample_requests(model, count, max_history=70, candidates=9)
    # As many candidates as requests differ in, so that these are padded too.
    return [
        _encoded(
            model,
            task,
            replace(
                sample,
                candidates=Candidates(sample.candidates.item_ids[: 1 + i]),
            ),
        )
        for i, sample in enumerate(samples)
        if sample.candidates is not None
    ]


def _check_shape(
    model: Model, task: Task, request: EncodedRequest, result: InferenceResult
) -> None:
    assert result.scores.dtype == np.float32
    assert np.isfinite(result.scores).all()
    if task is Task.RANK:
        assert result.indices is None
        assert result.scores.ndim == 2
        assert result.scores.shape[1] == len(model.heads)
        return
    assert result.indices is not None
    assert result.indices.dtype == np.int64
    assert result.indices.shape == result.scores.shape == (request.k,)
    assert len(set(result.indices.tolist())) == request.k
    assert result.indices.min() >= 1, "0 is padding and never an answer"
    assert result.indices.max() <= len(model.catalogue)
    assert np.all(np.diff(result.scores) <= 0), "best first"


async def _cancel_one(engine: RunningEngine, request: EncodedRequest) -> None:
    assert isinstance(engine.engine, AsyncEngine)
    task = asyncio.ensure_future(engine.engine.infer(request, None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
