"""The ends of a stack on a device: what the model itself gives, and nothing left behind.

Without a GPU, the way of the ids to a device is taken on the CPU, and the meta device, which has no
numbers, tells what would go to and fro or be waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gr_core import Task
from gr_core.contracts import EncodedRequest
from gr_core.stack import PlacedStackModel, StackEnds, TokenSequence
from gr_hstu.jagged import jagged, without_layers
from gr_hstu.jagged import ranking as jagged_ranking
from gr_hstu.jagged import rows as jagged_rows
from gr_hstu.model import HSTUModel
from gr_hstu.semantic_ids import SemanticIdModel
from gr_hstu.testing import CASES, CONFIGS, SID, a_request, encode, load, load_sid, write

from .small_stacks import ANY, SIZES, Config, Opened

ALL_CASES = [*CASES, (SID, Task.GENERATE)]


class Batch:
    """Requests, their tokens, and rows as an engine hands them to the outputs."""

    def __init__(
        self,
        model: Any,
        task: Task,
        requests: Sequence[EncodedRequest],
        starts: Sequence[int] | None,
        width: int,
    ) -> None:
        self.task = task
        self.requests = requests
        self.sequences: Sequence[TokenSequence] = [model.sequence(r) for r in requests]
        self.starts = starts or [0] * len(requests)
        rows = sum(max(sequence.candidates, 1) for sequence in self.sequences)
        self.rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))

    def run(self, ends: StackEnds, device: str) -> list[Tensor]:
        x_TD = ends.embed(self.requests, self.sequences, self.starts)
        return [x_TD, *ends.outputs(self.task, self.requests, self.rows.to(device))]


def model_of(folder: Path, kind: str) -> HSTUModel | SemanticIdModel:
    bundle = write(folder, kind)
    return load_sid(bundle) if kind == SID else load(bundle)


def batch_of(model: HSTUModel | SemanticIdModel, task: Task) -> Batch:
    requests = [
        encode(model, task, a_request(seed, length, candidates))
        for seed, length, candidates in ((0, 10, 5), (1, 0, 3), (2, 1, 1), (3, 60, 0), (4, 33, 7))
    ]
    return Batch(model, task, requests, None, 16)


def drawn(opened: Opened, seed: int, sizes: list[tuple[int, int, int]], data: Any) -> Batch:
    """With any part of each history cached, and for retrieval either task."""
    rng = np.random.default_rng(seed)
    requests = [opened.request(rng, size) for size in sizes]
    task = opened.task
    if task is Task.RETRIEVE:
        task = data.draw(st.sampled_from([Task.RETRIEVE, Task.RANK]))
    batch = Batch(opened.jagged, task, requests, None, opened.stack.d_model)
    batch.starts = [data.draw(st.integers(0, sequence.history)) for sequence in batch.sequences]
    return batch


# ── A copy ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), ALL_CASES)
def test_the_ends_give_what_the_model_gives_and_outlive_it(
    tmp_path: Path, kind: str, task: Task
) -> None:
    model = model_of(tmp_path, kind)
    assert isinstance(model, PlacedStackModel)
    batch = batch_of(model, task)
    expected = batch.run(model, "cpu")
    ends = model.ends("cpu")
    for tensor in model.module(task).state_dict().values():
        tensor.zero_()
    for found, wanted in zip(batch.run(ends, "cpu"), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_layers_stay_behind(kind: str) -> None:
    module = Opened(CONFIGS[kind]).module
    left = without_layers(module, "cpu").state_dict()
    for name, tensor in module.state_dict().items():
        assert left[name].is_meta is name.startswith("stack."), name
        if not left[name].is_meta:
            assert torch.equal(left[name], tensor)
            assert left[name].data_ptr() != tensor.data_ptr() or not tensor.numel(), name


# ── To a device ───────────────────────────────────────────────────────────────────────────────


@given(
    config=ANY,
    seed=st.integers(0, 2**31),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=150)
def test_what_goes_to_a_device_gives_the_same(
    config: Config, seed: int, sizes: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """All that is done for another device, on the CPU."""
    opened = Opened(config)
    batch = drawn(opened, seed, sizes, data)
    expected = batch.run(opened.jagged, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jagged_rows, "_HOST", torch.device("meta"))
        found = batch.run(jagged(without_layers(opened.module, "cpu")), "cpu")
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy)


class OneDevice(TorchDispatchMode):
    """Counts copies to the meta device, and fails where one operation mixes it with the CPU.

    Operations that would wait for a device fail by themselves, as this one has no numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        read, written = (
            {t.device.type for t in tree_leaves(values) if isinstance(t, Tensor)}
            for values in ((args, kwargs), made)
        )
        if read == {"cpu"} and written == {"meta"}:
            assert func.overloadpacket in COPIES, func
            self.copies += 1
        else:
            assert len(read | written) <= 1, func
        return made


@given(
    config=ANY,
    bound=st.sampled_from([0, 1 << 20]),
    seed=st.integers(0, 2**31),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=150)
def test_one_copy_and_no_wait(
    config: Config, bound: int, seed: int, sizes: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """With and without a table of what the item MLP makes of the items."""
    opened = Opened(config)
    batch = drawn(opened, seed, sizes, data)
    expected = batch.run(opened.jagged, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jagged_ranking, "MAX_ITEM_TABLE_BYTES", bound)
        with OneDevice():
            ends = jagged(without_layers(opened.module, "meta"))
    rows = batch.rows.to("meta")
    with OneDevice() as embedding:
        x_TD = ends.embed(batch.requests, batch.sequences, batch.starts)
    with OneDevice() as answering:
        answers = ends.outputs(batch.task, batch.requests, rows)
    assert embedding.copies <= 1
    assert answering.copies <= 1
    assert embedding.copies == 1 or not len(x_TD)
    for there, here in zip([x_TD, *answers], expected, strict=True):
        assert there.is_meta
        assert there.dtype == here.dtype
        assert there.shape == here.shape


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, i: x[i],
        lambda x, i: x[i.to("meta") > 1],
        lambda x, i: x.sum().item(),
        lambda x, i: x.cpu(),
        lambda x, i: x.to("meta") + i,
        lambda x, i: torch.empty(3, device="meta").copy_(i),
    ],
)
def test_what_goes_to_and_fro_is_found(mixed: Any) -> None:
    """`OneDevice` finds what it is there for."""
    x, i = torch.empty(3, device="meta"), torch.tensor([0, 2, 1])
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), OneDevice():
        mixed(x, i)


def test_ids_arrive_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jagged_rows, "_HOST", torch.device("meta"))
    arrays: Mapping[str, Any] = {
        "rows": np.arange(6, dtype=np.int32).reshape(3, 2),
        "none": np.empty((0, 2), np.int64),
        "columns": np.arange(6, dtype=np.int64).reshape(3, 2).T,
        "large": np.array([2**31 - 1, -(2**31)]),
    }
    there = jagged_rows.on_device(arrays, torch.device("cpu"))
    assert list(there) == list(arrays)
    for name, array in arrays.items():
        assert there[name].dtype == torch.int32
        np.testing.assert_array_equal(there[name].numpy(), array)
    assert jagged_rows.on_device({}, torch.device("cpu")) == {}


# ── A GPU ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "task"), ALL_CASES)
def test_on_a_gpu(tmp_path: Path, kind: str, task: Task) -> None:
    """The CPU's numbers, and calls that wait for nothing, on whatever stream."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = model_of(tmp_path, kind)
    batch = batch_of(model, task)
    expected = batch.run(model, "cpu")
    ends = model.ends("cuda")
    rows = batch.rows.cuda()
    torch.cuda.synchronize()
    for stream in (None, torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            torch.cuda.set_sync_debug_mode("error")
            try:
                x_TD = ends.embed(batch.requests, batch.sequences, batch.starts)
                answers = ends.outputs(task, batch.requests, rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for there, here in zip([x_TD, *answers], expected, strict=True):
                assert there.is_cuda
                torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)
