"""What every model must do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gr_core.contracts import Encoding, InferenceResult, Model
from gr_core.errors import BundleError, InvalidRequest
from gr_core.generation import MAX_BEAM_WIDTH, CodeTrie, GenerativeModel
from gr_core.plugins.registry import Registry
from gr_core.repository import Bundle
from gr_core.repository.bundle import WEIGHTS
from gr_core.samples import for_task, sample_requests
from gr_core.testing.suite import Suite, assert_same_arrays
from gr_core.types import Candidates, History, ItemIds, RecommendRequest, Task

_MANY = 100_000


class ModelSuite(Suite):
    """Subclass it with a fixture ``bundle``: a small bundle of the architecture."""

    @pytest.fixture
    def bundle(self) -> Bundle:
        raise NotImplementedError("give a fixture `bundle`: a small bundle of the architecture")

    @pytest.fixture
    def model(self, registry: Registry, bundle: Bundle) -> Iterator[Model]:
        model: Model = registry.models[bundle.architecture].resolve()(bundle)
        yield model
        model.close()

    def test_it_is_a_model_of_its_descriptor(
        self, registry: Registry, bundle: Bundle, model: Model
    ) -> None:
        assert isinstance(model, Model)
        assert model.bundle is bundle
        assert model.tasks
        assert set(model.tasks) <= set(registry.models[bundle.architecture].tasks)
        assert set(model.tasks) <= set(bundle.tasks)
        assert bool(model.heads) or Task.RANK not in model.tasks
        assert len(set(model.heads)) == len(model.heads)
        assert all(isinstance(note, str) for note in model.notes)

    def test_the_catalogue_maps_ids_both_ways(self, model: Model) -> None:
        catalogue = model.catalogue
        indices = np.arange(1, len(catalogue) + 1)
        np.testing.assert_array_equal(catalogue.indices_of(catalogue.ids_of(indices)), indices)

    def test_arrays_are_as_declared(self, model: Model) -> None:
        for task in model.tasks:
            specs = {spec.name: spec for spec in model.inputs(task)}
            for request in sample_requests(model, 6, max_history=40):
                encoded = _encode(model, request, task).request
                assert encoded.task is task
                assert encoded.tokens >= 0
                assert encoded.arrays.keys() == specs.keys()
                lengths: dict[str, int] = {}
                for name, array in encoded.arrays.items():
                    spec = specs[name]
                    assert array.dtype == np.dtype(spec.dtype), name
                    assert array.ndim == len(spec.axes), name
                    for axis, size in zip(spec.axes, array.shape, strict=True):
                        if isinstance(axis, int):
                            assert size == axis, name
                        else:
                            assert lengths.setdefault(axis, size) == size, f"{name}, axis {axis}"

    def test_encoding_is_repeatable_and_leaves_the_request_alone(self, model: Model) -> None:
        for task in model.tasks:
            request = _request(model, [3, 1, 2])
            times = request.history.timestamps_ms.copy()
            first = _encode(model, request, task)
            assert_same_arrays(first.request.arrays, _encode(model, request, task).request.arrays)
            np.testing.assert_array_equal(request.history.timestamps_ms, times)

    def test_it_is_thread_safe(self, model: Model) -> None:
        for task in model.tasks:
            requests = list(sample_requests(model, 16, max_history=40))
            expected = [_encode(model, request, task) for request in requests]
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(partial(_encode, model, task=task), requests * 4))
            for encoding, right in zip(found, expected * 4, strict=True):
                assert_same_arrays(encoding.request.arrays, right.request.arrays)

    def test_an_empty_history_can_be_encoded(self, model: Model) -> None:
        for task in model.tasks:
            encoding = _encode(model, _request(model, []), task)
            assert encoding.unknown_items == 0

    def test_unknown_items_are_left_out_and_counted(self, model: Model) -> None:
        for task in model.tasks:
            known = _request(model, [1, 2, 3])
            ids, times = known.history.item_ids, known.history.timestamps_ms
            mixed = History(
                np.array([_unknown(model), ids[0], ids[1], _unknown(model), ids[2]], object),
                np.array([times[0] - 1, times[0], times[1], times[1] + 1, times[2]]),
            )
            encoding = _encode(model, replace(known, history=mixed), task)
            assert encoding.unknown_items == 2
            right = _encode(model, known, task).request.arrays
            assert_same_arrays(encoding.request.arrays, right)

    def test_ids_may_be_text_or_integers(self, model: Model) -> None:
        for task in model.tasks:
            request = _request(model, [1, 2])
            history = request.history
            text = np.array([str(item) for item in history.item_ids], object)
            other = replace(request, history=replace(history, item_ids=text))
            found = _encode(model, other, task)
            assert_same_arrays(found.request.arrays, _encode(model, request, task).request.arrays)

    def test_times_out_of_order_are_put_in_order(self, model: Model) -> None:
        for task in model.tasks:
            request = _request(model, [1, 2, 3, 1])
            order = np.array([2, 0, 3, 1])
            history = request.history
            shuffled = History(history.item_ids[order], history.timestamps_ms[order])
            found = _encode(model, replace(request, history=shuffled), task)
            assert_same_arrays(found.request.arrays, _encode(model, request, task).request.arrays)

    def test_a_hundred_thousand_behaviours(self, model: Model) -> None:
        rng = np.random.default_rng(0)
        items = rng.integers(1, len(model.catalogue) + 1, _MANY)
        request = _request(model, items)
        for task in model.tasks:
            encoding = _encode(model, request, task)
            assert encoding.request.tokens <= 3 * _MANY

    def test_signals_may_be_missing_or_unknown(self, model: Model) -> None:
        """One that the model does not know is ignored, or refused by its name."""
        for task in model.tasks:
            request = _request(model, [1, 2])
            column = np.array([np.nan, 1.0], np.float32)
            history = replace(request.history, signals={"conformance_signal": column})
            refused = ""
            try:
                found = _encode(model, replace(request, history=history), task)
            except InvalidRequest as error:
                refused = str(error)
            if refused:
                assert "conformance_signal" in refused
            else:
                right = _encode(model, request, task).request.arrays
                assert_same_arrays(found.request.arrays, right)

    def test_unknown_candidates_are_marked(self, model: Model) -> None:
        if Task.RANK not in model.tasks:
            pytest.skip("the model does not rank")
        known = model.catalogue.ids_of(np.array([2, 1]))
        ids = np.array([_unknown(model), known[0], _unknown(model), known[1]], object)
        request = replace(_request(model, [1]), candidates=Candidates(ids))
        encoding = model.encode(replace(request, task=Task.RANK), Task.RANK)
        np.testing.assert_array_equal(encoding.unscored, [True, False, True, False])
        np.testing.assert_array_equal(encoding.candidate_indices, [2, 1])
        none = replace(request, candidates=Candidates(ids[[0, 2]]))
        assert not len(model.encode(none, Task.RANK).candidate_indices)

    def test_decoded_scores_follow_the_heads(self, model: Model) -> None:
        rng = np.random.default_rng(0)
        for task in model.tasks:
            if not task.finds_items:
                continue
            count = min(5, len(model.catalogue))
            raw = np.sort(rng.normal(size=count).astype(np.float32))[::-1]
            result = InferenceResult(raw, np.arange(1, count + 1))
            scores, heads = model.decode(task, result, {})
            assert scores.shape == (count,)
            assert scores.dtype == heads.dtype == np.float32
            assert np.all(np.diff(scores) <= 0), "decoding must keep the engine's order"
        if Task.RANK in model.tasks:
            raw = rng.normal(size=(7, len(model.heads))).astype(np.float32)
            for place, head in enumerate(model.heads):
                scores, heads = model.decode(Task.RANK, InferenceResult(raw), {head: 1.0})
                assert scores.shape == (7,)
                assert heads.shape == (7, len(model.heads))
                assert scores.dtype == heads.dtype == np.float32
                order = np.argsort(-heads[:, place], kind="stable")
                assert np.all(np.diff(scores[order]) <= 0), f"a weight on {head} alone"

    def test_semantic_ids_are_tokens_of_levels(self, model: Model) -> None:
        if Task.GENERATE not in model.tasks:
            pytest.skip("the model does not generate")
        assert isinstance(model, GenerativeModel)
        tokens = model.item_tokens()
        assert tokens.dtype == np.int32
        assert tokens.shape == (len(model.catalogue) + 1, len(model.levels))
        assert not tokens[0].any(), "row 0 is padding"
        assert len(CodeTrie(tokens, model.levels)) == len(model.catalogue)
        every = [token for level in model.levels for token in level]
        assert len(set(every)) == len(every), "levels must not overlap"
        assert 1 <= model.beam_width <= MAX_BEAM_WIDTH
        vocabulary = len(model.readout().table)
        assert 1 <= min(every) <= max(every) < vocabulary, "row 0 stands for nothing that follows"
        for length in (0, 3):
            encoded = _encode(model, _request(model, [1] * length), Task.GENERATE).request
            ids = model.token_ids(model.sequence(encoded))
            assert ids.shape == (1 + length * len(model.levels), 1), "never none: a first token"
            assert ids.min() >= 0
            assert ids.max() < len(model.token_tables().tables[0])

    @pytest.mark.parametrize("keep", [0, 1, 100])
    def test_damaged_weights_are_refused(
        self, registry: Registry, bundle: Bundle, tmp_path: Path, keep: int
    ) -> None:
        copy = tmp_path / "damaged"
        shutil.copytree(bundle.path, copy)
        weights = copy / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(BundleError):
            registry.models[bundle.architecture].resolve()(Bundle.open(copy))

    def test_missing_weights_are_refused(
        self, registry: Registry, bundle: Bundle, tmp_path: Path
    ) -> None:
        copy = tmp_path / "incomplete"
        shutil.copytree(bundle.path, copy)
        (copy / WEIGHTS).unlink()
        with pytest.raises(BundleError):
            registry.models[bundle.architecture].resolve()(Bundle.open(copy))

    def test_it_can_be_closed_twice(self, model: Model) -> None:
        model.close()
        model.close()


def _encode(model: Model, request: RecommendRequest, task: Task) -> Encoding:
    return model.encode(for_task(request, task), task)


def _request(model: Model, indices: list[int] | np.ndarray) -> RecommendRequest:
    """A history of these items of the catalogue, an hour apart, with some candidates."""
    (sample,) = sample_requests(model, 1, candidates=3)
    items = (np.array(indices, np.int64) - 1) % len(model.catalogue) + 1
    assert sample.request_time_ms is not None
    times = sample.request_time_ms - 3_600_000 * np.arange(len(items), 0, -1, dtype=np.int64)
    history = History(model.catalogue.ids_of(items), times)
    return replace(sample, history=history)


def _unknown(model: Model) -> int | str:
    """An id that is not in the catalogue, of the kind that its ids have."""
    ids: ItemIds = model.catalogue.ids
    return int(ids.max()) + 1 if ids.dtype.kind == "i" else f"not-{'-'.join(ids[:3])}"
