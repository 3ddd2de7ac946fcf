"""Batches of padded arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import Task
from gr_core.collate import collate
from gr_core.contracts import ArraySpec, EncodedRequest

SPECS = (
    ArraySpec("items", "int64", ("history",), pad=-1),
    ArraySpec("signals", "float32", ("history", 3), pad=0.5),
    ArraySpec("pairs", "int32", ("history", "candidate")),
    ArraySpec("length", "int64"),
    ArraySpec("user", "bool", (2,)),
    ArraySpec("nothing", "int64", (0,)),
)
lengths = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=6)


def encoded(history: int, candidates: int, seed: int) -> EncodedRequest:
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "items": random.integers(1, 100, history),
        "signals": random.normal(size=(history, 3)),
        "pairs": random.integers(1, 100, (history, candidates)),
        "length": np.array(history),
        "user": np.array([True, False]),
        "nothing": np.empty(0, np.int64),
    }
    return EncodedRequest(Task.RANK, arrays, tokens=history + candidates)


@given(lengths, st.integers(0, 1000))
def test_every_request_is_found_in_its_row_and_the_rest_is_padding(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    batch = [encoded(h, c, seed + row) for row, (h, c) in enumerate(sizes)]
    out = collate(SPECS, batch)
    longest = max(1, *(h for h, _ in sizes))
    widest = max(1, *(c for _, c in sizes))
    assert {name: array.shape for name, array in out.items()} == {
        "items": (len(batch), longest),
        "signals": (len(batch), longest, 3),
        "pairs": (len(batch), longest, widest),
        "length": (len(batch),),
        "user": (len(batch), 2),
        "nothing": (len(batch), 0),
    }
    for spec in SPECS:
        array = out[spec.name]
        assert array.dtype == np.dtype(spec.dtype)
        for row, request in enumerate(batch):
            own = request.arrays[spec.name]
            kept = np.zeros(array.shape[1:], bool)
            kept[tuple(slice(n) for n in own.shape)] = True
            np.testing.assert_array_equal(array[row][kept], own.astype(spec.dtype).ravel())
            assert np.all(array[row][~kept] == spec.pad)


def test_a_batch_does_not_share_memory_with_its_requests() -> None:
    """Engines may work in place; requests may be computed again after a failure."""
    one = encoded(4, 2, seed=0)
    before = one.arrays["items"].copy()
    collate(SPECS, [one])["items"][:] = 0
    np.testing.assert_array_equal(one.arrays["items"], before)


def test_only_the_inputs_of_the_task_are_taken() -> None:
    assert set(collate(SPECS[:1], [encoded(2, 2, seed=0)])) == {"items"}


def test_a_request_without_an_input_is_an_error() -> None:
    with pytest.raises(KeyError, match="items"):
        collate(SPECS, [EncodedRequest(Task.RANK, {}, tokens=0)])
