"""What is decided without a GPU: parts of batches, shapes that repeat, places in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr_core.errors import FailedPrecondition
from gr_trt.ensemble import Tensor
from gr_trt.tensorrt.batches import array_sizes, padded, round_up, split
from gr_trt.tensorrt.buffers import ALIGNMENT, layout, read, write
from gr_trt.tensorrt.profiles import Profile, Range, distinct, shrunk
from gr_trt.tensorrt.slots import Slots, Step

LONG, MANY = 512, 32
PROFILES = [
    Profile("one", {"batch": Range(1, 1, 1), "history": Range(1, 40, LONG)}),
    Profile("many", {"batch": Range(1, MANY, MANY), "history": Range(1, 40, 64)}),
]

lengths = st.lists(st.integers(1, LONG), min_size=1, max_size=80)


@given(lengths)
def test_every_request_is_in_one_part_that_fits(lengths: list[int]) -> None:
    parts = split([{"history": length} for length in lengths], PROFILES, "a.plan")
    assert sorted(row for part in parts for row in part.rows) == list(range(len(lengths)))
    for part in parts:
        profile = PROFILES[part.profile]
        assert all(profile.axes[axis].within(size) for axis, size in part.sizes.items())
        assert len(part.rows) <= part.sizes["batch"]
        assert max(lengths[row] for row in part.rows) <= part.sizes["history"]


@given(lengths)
def test_there_are_no_more_parts_than_needed(lengths: list[int]) -> None:
    parts = split([{"history": length} for length in lengths], PROFILES, "a.plan")
    alone = sum(length > 64 for length in lengths)
    assert len(parts) <= alone + -(-(len(lengths) - alone) // MANY)


def test_one_request_takes_the_profile_of_one() -> None:
    (part,) = split([{"history": 7}], PROFILES, "a.plan")
    assert (part.profile, part.sizes) == (0, {"batch": 1, "history": 7})


def test_a_request_that_fits_in_none_fails_the_batch() -> None:
    with pytest.raises(FailedPrecondition, match=r"history 513 fits in no profile of a\.plan: one"):
        split([{"history": 3}, {"history": 513}], PROFILES, "a.plan")


@given(st.integers(1, LONG))
def test_sizes_are_rounded_up_by_an_eighth_at_most(size: int) -> None:
    (rounded,) = round_up({"history": size}, PROFILES[0]).values()
    assert size <= rounded <= min(size * 9 / 8, LONG)
    assert round_up({"history": rounded}, PROFILES[0]) == {"history": rounded}


def test_an_empty_axis_is_padded() -> None:
    assert round_up({"history": 0}, PROFILES[0]) == {"history": 1}


def test_few_sizes_are_left() -> None:
    sizes = {round_up({"history": size}, PROFILES[0])["history"] for size in range(1, LONG + 1)}
    assert len(sizes) == 16 + 8 * 5


INPUTS = (
    Tensor("items", "int64", ("history",), pad=-1),
    Tensor("signals", "float16", ("history", 2)),
    Tensor("length", "int32", ()),
    Tensor("k", "int64", (), batched=False),
)


def some_arrays(batch: int, history: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(batch * 1000 + history)
    return {
        "items": rng.integers(0, 9, (batch, history)),
        "signals": rng.normal(size=(batch, history, 2)).astype(np.float16),
        "length": np.full(batch, history, np.int32),
        "k": np.array(5),
    }


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 3), st.integers(0, 9))
def test_arrays_grow_by_padding_and_the_last_row(
    batch: int, history: int, more_rows: int, more_places: int
) -> None:
    arrays = some_arrays(batch, history)
    assert array_sizes(INPUTS, arrays) == {"batch": batch, "history": history, "k": 5}
    sizes = {"batch": batch + more_rows, "history": history + more_places, "k": 5}
    full = padded(INPUTS, arrays, sizes)
    assert array_sizes(INPUTS, full) == sizes
    for name in ("items", "signals"):
        pad = -1 if name == "items" else 0
        np.testing.assert_array_equal(full[name][:batch, :history], arrays[name])
        assert (full[name][:, history:] == pad).all()
        assert full[name].dtype == arrays[name].dtype
    for row in range(batch, batch + more_rows):
        np.testing.assert_array_equal(full["items"][row], full["items"][batch - 1])
        assert full["length"][row] == history


# ── Memory ────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 8), st.integers(1, 40))
def test_tensors_lie_apart_and_come_back(batch: int, history: int) -> None:
    sizes = {"batch": batch, "history": history, "k": 5}
    where = layout(INPUTS, sizes)
    end = 0
    for place in where.places.values():
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= end
        end = place.offset + place.bytes
    assert end <= where.bytes
    block = torch.zeros(where.bytes, dtype=torch.uint8)
    arrays = some_arrays(batch, history)
    write(block, where, arrays)
    found = read(block, where)
    block.zero_()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert found["signals"].dtype == np.float32


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 8), st.integers(0, 40))
def test_memory_for_the_largest_sizes_is_enough_for_all(
    batch: int, history: int, more_rows: int, more_places: int
) -> None:
    small = layout(INPUTS, {"batch": batch, "history": history, "k": 1})
    large = layout(INPUTS, {"batch": batch + more_rows, "history": history + more_places, "k": 1})
    assert small.bytes <= large.bytes


def test_bfloat16_goes_through_float32() -> None:
    tensor = Tensor("keys", "bfloat16", (3,))
    where = layout([tensor], {"batch": 1})
    block = torch.zeros(where.bytes, dtype=torch.uint8)
    write(block, where, {"keys": np.array([[1, 2.5, -3]], np.float32)})
    np.testing.assert_array_equal(read(block, where)["keys"], [[1, 2.5, -3]])


# ── Contexts ──────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=60),
)
def test_a_graph_is_replayed_only_in_the_context_and_shape_it_was_recorded_in(
    count: int, work: list[tuple[int, int]]
) -> None:
    """``work`` is pairs of a shape and of how many parts of it are under way at once."""
    slots = Slots(count, record=True)
    recorded: dict[int, int | None] = {}
    last: dict[int, int] = {}
    for key, at_once in work:
        busy = []
        for _ in range(at_once):
            taken = slots.take(key)
            if taken is None:
                assert len(busy) == count
                break
            slot, step = taken
            assert slot not in busy
            busy.append(slot)
            if step is Step.RUN:
                recorded[slot] = None
            elif step is Step.RECORD:
                assert last[slot] == key, "its shapes are set"
                recorded[slot] = key
            else:
                assert recorded[slot] == key
            last[slot] = key
        for slot in busy:
            slots.release(slot)


def test_a_shape_that_repeats_is_recorded_and_replayed() -> None:
    slots = Slots(2, record=True)
    steps = []
    for key in "aaabbbab":
        taken = slots.take(key)
        assert taken is not None
        slots.release(taken[0])
        steps.append(taken[1])
    run, record, replay = Step.RUN, Step.RECORD, Step.REPLAY
    assert steps == [run, record, replay, run, record, replay, replay, replay]


def test_after_a_failure_nothing_is_replayed() -> None:
    slots = Slots(1, record=True)
    for _ in range(3):
        assert slots.take("a") is not None
        slots.release(0)
    slots.forget(0)
    assert slots.take("a") == (0, Step.RUN)


def test_nothing_is_recorded_where_it_shall_not_be() -> None:
    slots = Slots(1, record=False)
    for _ in range(4):
        assert slots.take("a") == (0, Step.RUN)
        assert slots.take("a") is None, "busy"
        slots.release(0)


# ── Profiles ──────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 256), st.integers(1, 50), st.integers(0, 5000), st.integers(0, 5000))
def test_profiles_shrink_to_one_typical_request(
    batch: int, typical: int, more: int, candidates: int
) -> None:
    profile: Profile | None = Profile(
        "many",
        {
            "batch": Range(1, batch, batch),
            "history": Range(1, typical, typical + more),
            "candidate": Range(1, 1, 1 + candidates),
        },
    )
    last: Profile | None = None
    for _ in range(100):
        if profile is None:
            break
        if last is not None:
            assert all(profile.axes[a].most <= last.axes[a].most for a in last.axes)
            assert profile != last
        for r in profile.axes.values():
            assert r.least <= r.typical <= r.most
        last, profile = profile, shrunk(profile)
    assert profile is None
    assert last is not None
    assert last.batch == 1
    if batch > 1:
        assert {axis: r.most for axis, r in last.axes.items() if axis != "batch"} == {
            "history": typical,
            "candidate": 1,
        }


def test_profiles_that_another_covers_are_left_out() -> None:
    smaller = Profile("small", {"batch": Range(1, 1, 1), "history": Range(1, 2, 4)})
    assert distinct([PROFILES[0], smaller, PROFILES[1]]) == PROFILES


@given(st.builds(lambda a, b, c: Range(*sorted((a, b, c))), *[st.integers(1, 10**6)] * 3))
def test_profiles_go_through_json(some: Range) -> None:
    profile = Profile("p", {"batch": some, "history": some})
    assert Profile.of(profile.as_dict()) == profile
