"""Rows carry integers beside floats, to the last bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr_vllm.checkpoint import Checkpoint, Tokens
from gr_vllm.export.exporter import convert
from gr_vllm.rows import RowLayout

from .small_models import Retrieves, small

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    # In 32 and in 16 bits: quiet and signalling NaN, infinity, denormal numbers, minus zero.
    st.sampled_from([0x7FC00000, 0x7F800001, 0x7F800000, 1, 0x7FC17F81, 0x7C017E01, 0x00010001]),
    st.sampled_from([-(2**31), -1, 0x7F817F81, 0x7FFFFFFF]),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert(small(tmp_path_factory.mktemp("model"), Retrieves))[0]


def changed(
    checkpoint: Checkpoint, tokens: Tokens, tables: int, groups: int, timed: bool
) -> Checkpoint:
    layers = dataclasses.replace(checkpoint.layers, groups=groups, time_buckets=9 * timed)
    return dataclasses.replace(
        checkpoint, tokens=tokens, tables=checkpoint.tables * tables, layers=layers
    )


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from(["columns", "rows"]),
    groups=st.sampled_from([1, 4]),
    timed=st.booleans(),
)
def test_words_and_values_arrive(
    checkpoint: Checkpoint,
    data: st.DataObject,
    dtype: torch.dtype,
    tokens: Tokens,
    groups: int,
    timed: bool,
):
    layout = RowLayout.of(changed(checkpoint, tokens, 3, groups, timed))
    count = data.draw(st.integers(0, 5))
    row = st.lists(WORDS, min_size=layout.words, max_size=layout.words)
    drawn = data.draw(st.lists(row, min_size=count, max_size=count))
    words = torch.tensor(drawn, dtype=torch.int64).to(torch.int32).view(count, layout.words)
    values = torch.randn(count, layout.values) if layout.values else None
    rows = layout.join(values, words, dtype)
    assert rows.dtype == dtype
    assert rows.shape == (count, layout.width(dtype))
    # As vLLM does: into a buffer of another length, from there by rows.
    buffer = torch.zeros(count + 3, layout.width(dtype), dtype=dtype)
    buffer[1 : 1 + count] = rows
    found_values, found_words = layout.split(buffer[1 : 1 + count])
    assert torch.equal(found_words, words)
    if values is None:
        assert found_values.shape == (count, 0)
    else:
        assert torch.equal(found_values, values.to(dtype))


@pytest.mark.parametrize("tokens", ["columns", "rows"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("timed", [False, True])
def test_parts_are_apart(checkpoint: Checkpoint, tokens: Tokens, groups: int, timed: bool):
    layout = RowLayout.of(changed(checkpoint, tokens, 3, groups, timed))
    taken = [
        word
        for part in (layout.ids, layout.interval, layout.times, layout.nonce)
        for word in range(part.start, part.stop)
    ]
    if layout.group is not None:
        taken.append(layout.group)
    assert sorted(taken) == list(range(layout.words))
    assert (layout.group is not None) == (groups > 1)
    assert layout.times.stop - layout.times.start == 2 * timed
    assert (layout.values > 0) == (tokens == "rows")


def test_rows_of_nothing_but_ids_are_one_word_each(checkpoint: Checkpoint, tmp_path: Path):
    layout = RowLayout.of(changed(checkpoint, "columns", 2, 1, False))
    assert layout.width(torch.float32) == 2
    assert layout.width(torch.bfloat16) == 4
