"""K and V in blocks: what was written is read, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core.steps import PAST_KEYS, PAST_VALUES
from gr_core.types import Task
from gr_trt.ensemble import Graph, Role, Tensor
from gr_trt.execution.pages import BLOCK_TOKENS, Pages

DECODE = Graph(
    name="rank_decode",
    file="rank_decode.onnx",
    role=Role.DECODE,
    tasks=(Task.RANK,),
    inputs=(
        Tensor(PAST_KEYS, "float16", (3, "past", 2, 4)),
        Tensor(PAST_VALUES, "float16", (3, "past", 2, 5)),
    ),
    outputs=(),
)


class Lease:
    """Blocks in memory of the test's own, in any order."""

    reused = 0

    def __init__(self, memory: np.ndarray, order: list[int]) -> None:
        self.blocks = np.array([memory[i].ctypes.data for i in order], np.uintp)

    def commit(self, tokens: int) -> None: ...

    def release(self) -> None: ...


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(st.integers(0, 100), st.integers(0, 100), st.randoms(use_true_random=False))
def test_what_is_written_is_read(dtype: type, first: int, second: int, random) -> None:
    pages = Pages.of(DECODE, dtype)
    assert pages.block_bytes == BLOCK_TOKENS * 3 * 2 * (4 + 5) * np.dtype(dtype).itemsize
    blocks = -(-(first + second) // BLOCK_TOKENS)
    memory = np.full((blocks + 1, pages.block_bytes), 0xEE, np.uint8)
    order = list(range(blocks))
    random.shuffle(order)
    lease = Lease(memory, order)
    rng = np.random.default_rng(first * 101 + second)
    keys = rng.standard_normal((3, first + second, 2, 4)).astype(dtype)
    values = rng.standard_normal((3, first + second, 2, 5)).astype(dtype)
    pages.write(lease, keys[:, :first], values[:, :first], 0)
    pages.write(lease, keys[:, first:], values[:, first:], first)
    for tokens in (first, first + second):
        found_keys = np.zeros((3, tokens + 2, 2, 4), dtype)
        found_values = np.zeros((3, tokens + 2, 2, 5), dtype)
        pages.read(lease, found_keys, found_values, tokens)
        np.testing.assert_array_equal(found_keys[:, :tokens], keys[:, :tokens])
        np.testing.assert_array_equal(found_values[:, :tokens], values[:, :tokens])
        assert not found_keys[:, tokens:].any()
    assert (memory[blocks] == 0xEE).all(), "a block of another"
