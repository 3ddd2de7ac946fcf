"""Models in steps: cached K and V, new tokens and candidates give what a single pass gives.

Shapes: B batch, T tokens given, P tokens cached, N tokens of the history, C candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gr_core import Task
from gr_core.collate import collate
from gr_core.contracts import EncodedRequest
from gr_core.errors import PlanError
from gr_core.stack import TokenSequence
from gr_core.steps import (
    CANDIDATE,
    KEYS,
    PAST,
    PAST_KEYS,
    PAST_LENGTHS,
    PAST_VALUES,
    SCORES,
    TOKEN,
    USER,
    VALUES,
    Step,
    SteppedModel,
)
from gr_hstu import testing
from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.jagged import jagged
from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval
from gr_hstu.steps import steps_of
from gr_hstu.steps.tokens import HIGH, LOW
from gr_hstu.testing import CASES, a_request, encode, load, random_module, write

Config = HSTUConfig | MTGRConfig
Arrays = dict[str, Any]
ITEMS = 12
POISON = 1e4
"""What stands at padded places of cached K and V."""

# ── Models and requests ───────────────────────────────────────────────────────────────────────

SMALL: dict[str, Any] = {
    "num_items": ITEMS,
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 16,
}
FEATURES: dict[str, Any] = SMALL | {
    "signal_cardinalities": (3, 2),
    "user_cardinalities": (3, 2),
    "context_cardinalities": (4,),
    "item_cardinalities": (2,),
    "candidate_cardinalities": (3,),
    "heads": ("a", "b"),
    "mlp_dim": 8,
}
BARE: dict[str, Any] = {
    name: () for name in FEATURES if name.endswith("cardinalities") and name != "heads"
}


def research(**fields: Any) -> HSTUConfig:
    fields = SMALL | {"signal_cardinalities": (3, 2)} | fields
    return HSTUConfig(variant="research", d_qk=3, d_v=4, **fields)


def ranking(**fields: Any) -> HSTUConfig:
    return HSTUConfig(variant="ranking", d_qk=4, d_v=3, **FEATURES | fields)


def mtgr(**fields: Any) -> MTGRConfig:
    return MTGRConfig(embedding_dim=4, **FEATURES | fields)


AS_CANDIDATES: dict[str, Any] = {"context_placement": "candidate"}
VARIANTS: dict[str, Config] = {
    "research": research(),
    "research without bias": research(relative_bias=False),
    "research without signals": research(signal_cardinalities=(), concat_ua=True),
    "research of few times": research(time_bias_buckets=5, user_norm="layer_norm", alpha=0.5),
    "research of one layer": research(num_layers=1),
    "research of one layer, without bias": research(num_layers=1, relative_bias=False),
    "research of three layers": research(num_layers=3, projection_activation="none"),
    "ranking": ranking(),
    "ranking, contextual": ranking(contextual_mask=True),
    "ranking, windowed": ranking(max_attn_len=3),
    "ranking, contextual and windowed": ranking(contextual_mask=True, max_attn_len=2),
    "ranking from the end": ranking(position_from="end"),
    "ranking from the request": ranking(time_from="request", group_norm=True),
    "ranking, as DLRMv3": ranking(position_from="end", time_from="request", **AS_CANDIDATES),
    "ranking, context of candidates": ranking(**AS_CANDIDATES),
    "ranking of few positions": ranking(position_buckets=7, time_buckets=6),
    "ranking without features": ranking(**BARE),
    "ranking without places": ranking(position_buckets=0, time_buckets=0),
    "ranking of one layer": ranking(num_layers=1),
    "mtgr": mtgr(),
    "mtgr with places": mtgr(position_buckets=64, time_buckets=64),
    "mtgr of few places": mtgr(position_buckets=5, time_buckets=3),
    "mtgr, context of candidates": mtgr(time_buckets=300, **AS_CANDIDATES),
    "mtgr without features": mtgr(**BARE),
    "mtgr of one layer": mtgr(num_layers=1, d_qk=3, d_v=5),
}


class Opened:
    """A module with random weights as a model of its task, and in steps."""

    def __init__(self, config: Config, task: Task | None = None, seed: int = 0) -> None:
        self.config = config
        module = random_module(config, seed).eval().requires_grad_(False)
        assert isinstance(module, (HSTURetrieval, HSTURanking, MTGR))
        self.retrieves = isinstance(module, HSTURetrieval)
        if not isinstance(module, HSTURetrieval):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for i, rows in enumerate(config.item_cardinalities):
                    module.item_features[:, i].random_(0, rows)
        self.module = module
        self.jagged = jagged(module)
        self.steps = steps_of(module)
        self.task = task or (Task.RETRIEVE if self.retrieves else Task.RANK)

    def request(self, rng: np.random.Generator, sizes: tuple[int, int, int]) -> EncodedRequest:
        """Behaviours seconds to weeks apart, many at the same time."""
        length, candidates, realtime = sizes
        config = self.config
        gaps = rng.choice([0, 0, 1, 50, 4000, 10**6], length)
        times = 1_700_000_000 + np.cumsum(gaps).astype(np.int64)
        end = int(times[-1]) if length else 1_700_000_000
        arrays: Arrays = {
            "history_items": rng.integers(1, ITEMS + 1, length),
            "history_timestamps": times,
            "history_lengths": np.array(length),
            "request_time": np.array(end + rng.choice([-1, 0, 1, 3000])),
            "history_signals": columns(rng, config.signal_cardinalities, length),
        }
        if self.task is Task.RANK:
            arrays["candidate_items"] = rng.integers(1, ITEMS + 1, candidates)
        if not self.retrieves:
            arrays |= {
                "user_features": columns(rng, config.user_cardinalities),
                "context_features": columns(rng, config.context_cardinalities),
                "candidate_features": columns(rng, config.candidate_cardinalities, candidates),
                "candidate_counts": np.array(candidates),
            }
        if isinstance(config, MTGRConfig):
            arrays["realtime_counts"] = np.array(min(realtime, length))
        return EncodedRequest(self.task, arrays, length)

    def expected(self, request: EncodedRequest) -> Tensor:
        """What a single pass gives: the user (D,), or scores (C, O)."""
        given = {n: torch.from_numpy(a[None]) for n, a in request.arrays.items()}
        if not isinstance(self.module, HSTURetrieval):
            scores: Tensor = self.module(**given)[0]
            return scores
        candidates = given.pop("candidate_items", None)
        user_1D = self.module(**given)
        return (
            user_1D[0] if candidates is None else self.module.score(user_1D, candidates)[0, :, None]
        )


def columns(rng: np.random.Generator, cardinalities: Sequence[int], *rows: int) -> np.ndarray:
    drawn = [rng.integers(0, cardinality, rows) for cardinality in cardinalities]
    return np.stack(drawn, axis=-1) if drawn else np.zeros((*rows, 0), np.int64)


# ── Running steps ─────────────────────────────────────────────────────────────────────────────


def run(
    step: Step, rows: Sequence[Mapping[str, Any]], *, pad_to: int = 1
) -> list[dict[str, Tensor]]:
    """A batch through a step: what it gives for each request, still padded.

    All jagged axes are padded to multiples of ``pad_to``, cached places with poison.
    """
    inputs = collate(step.inputs, [EncodedRequest(Task.RANK, row, 0) for row in rows])
    for spec in step.inputs:
        padding = [
            (0, -inputs[spec.name].shape[1 + i] % pad_to if isinstance(axis, str) else 0)
            for i, axis in enumerate(spec.axes)
        ]
        inputs[spec.name] = np.pad(
            inputs[spec.name], [(0, 0), *padding], constant_values=int(spec.pad)
        )
    for name in (PAST_KEYS, PAST_VALUES):
        if name in inputs:
            for row, length in zip(inputs[name], inputs[PAST_LENGTHS], strict=True):
                row[:, length:] = POISON
    found = step.module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    assert len(found) == len(step.outputs)
    sizes = {
        axis: inputs[spec.name].shape[1 + i]
        for spec in step.inputs
        for i, axis in enumerate(spec.axes)
    }
    for spec, output in zip(step.outputs, found, strict=True):
        assert str(output.dtype) == f"torch.{spec.dtype}"
        assert output.shape == (
            len(rows),
            *(a if isinstance(a, int) else sizes[a] for a in spec.axes),
        )
        assert output.isfinite().all()
    names = [spec.name for spec in step.outputs]
    return [dict(zip(names, row, strict=True)) for row in zip(*found, strict=True)]


def with_past(
    opened: Opened, request: EncodedRequest, sequence: TokenSequence, kv: Any, start: int
) -> Arrays:
    arrays = dict(opened.steps.arrays(request, sequence, start))
    assert arrays[PAST_LENGTHS] == start
    arrays[PAST_KEYS], arrays[PAST_VALUES] = (
        kv[name][:, :start].numpy() for name in (KEYS, VALUES)
    )
    return arrays


def last_start(sequence: TokenSequence) -> int:
    """The answer is read from the last token where no candidates have rows of their own."""
    answering = sequence.candidates == 0 and sequence.history > 0
    return min(sequence.reusable, sequence.history - answering)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check(
    opened: Opened,
    requests: Sequence[EncodedRequest],
    starts_of: Any,
    *,
    pad_to: int = 1,
) -> None:
    """Prefill, then decode from ``starts_of(sequence)``, against a single pass."""
    task = opened.task
    prefill, decode = opened.steps.prefill(task), opened.steps.decode(task)
    sequences = [opened.jagged.sequence(request) for request in requests]
    whole = [opened.steps.arrays(r, s, 0) for r, s in zip(requests, sequences, strict=True)]
    kept = run(prefill, whole, pad_to=pad_to)
    expected = [opened.expected(request) for request in requests]
    if task is Task.RETRIEVE:
        for found, answer in zip(kept, expected, strict=True):
            close(found[USER], answer)
    starts = [starts_of(sequence) for sequence in sequences]
    rows = [
        with_past(opened, request, sequence, kv, start)
        for request, sequence, kv, start in zip(requests, sequences, kept, starts, strict=True)
    ]
    decoded = run(decode, rows, pad_to=pad_to)
    for found, answer, kv, start, sequence in zip(
        decoded, expected, kept, starts, sequences, strict=True
    ):
        scores = found[USER] if task is Task.RETRIEVE else found[SCORES][: len(answer)]
        close(scores, answer)
        for name in (KEYS, VALUES):
            close(found[name][:, : sequence.history - start], kv[name][:, start : sequence.history])


TASKS = [
    (name, task)
    for name in VARIANTS
    for task in ((Task.RETRIEVE, Task.RANK) if name.startswith("research") else (Task.RANK,))
]
SIZES = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 12))


@pytest.mark.parametrize(("name", "task"), TASKS, ids=str)
def test_from_every_start(name: str, task: Task) -> None:
    """A batch that holds the same request once for each start, among others."""
    opened = Opened(VARIANTS[name], task)
    rng = np.random.default_rng(7)
    request = opened.request(rng, (9, 4, 4))
    sequence = opened.jagged.sequence(request)
    starts = [*range(last_start(sequence) + 1), 0, 0, 0]
    others = [opened.request(rng, sizes) for sizes in ((0, 3, 0), (12, 0, 5), (1, 1, 1))]
    requests = [request] * (len(starts) - 3) + others
    numbered = iter(starts)
    check(opened, requests, lambda _: next(numbered))


@given(
    case=st.sampled_from(TASKS),
    seed=st.integers(0, 2**31),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    parts=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    pad_to=st.sampled_from([1, 4, 20]),
)
@settings(max_examples=150)
def test_batches_of_mixed_lengths(
    case: tuple[str, Task],
    seed: int,
    sizes: list[tuple[int, int, int]],
    parts: list[float],
    pad_to: int,
) -> None:
    name, task = case
    opened = Opened(VARIANTS[name], task)
    rng = np.random.default_rng(seed)
    requests = [opened.request(rng, size) for size in sizes]
    part = iter(parts)
    check(opened, requests, lambda s: round(next(part) * max(0, last_start(s))), pad_to=pad_to)


@pytest.mark.parametrize(("name", "task"), TASKS, ids=str)
@torch.no_grad()
def test_a_history_that_grew(name: str, task: Task) -> None:
    """K and V that a shorter history left, as far as a cache would give them."""
    opened = Opened(VARIANTS[name], task)
    request = opened.request(np.random.default_rng(3), (11, 4, 5))
    sequence = opened.jagged.sequence(request)
    before = dict(request.arrays)
    for field in ("history_items", "history_timestamps", "history_signals"):
        before[field] = before[field][:8]
    before["history_lengths"] = np.array(8)
    if "realtime_counts" in before:
        before["realtime_counts"] = before["realtime_counts"] - 3
    shorter = dataclasses.replace(request, arrays=before)
    one = opened.jagged.sequence(shorter)
    most = min(one.reusable, last_start(sequence)) if one.salt == sequence.salt else 0
    same = (one.content[:most] == sequence.content[:most]).all(axis=1)
    start = most if same.all() else int(np.argmin(same))
    (kv,) = run(opened.steps.prefill(task), [opened.steps.arrays(shorter, one, 0)])
    row = with_past(opened, request, sequence, kv, start)
    (found,) = run(opened.steps.decode(task), [row])
    close(found[USER if task is Task.RETRIEVE else SCORES], opened.expected(request))


def test_many_candidates_after_nothing_new() -> None:
    """As after a hit of the whole history: no token is given."""
    opened = Opened(ranking(max_attn_len=5))
    rng = np.random.default_rng(0)
    requests = [opened.request(rng, (length, 40, 0)) for length in (12, 3, 0)]
    check(opened, requests, lambda sequence: sequence.history)


# ── Inputs and outputs ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "task"), TASKS, ids=str)
@torch.no_grad()
def test_the_inputs_are_those_of_the_modules(name: str, task: Task) -> None:
    opened = Opened(VARIANTS[name], task)
    request = opened.request(np.random.default_rng(1), (6, 3, 2))
    arrays = opened.steps.arrays(request, opened.jagged.sequence(request), 2)
    declared = set()
    for step, axes in (
        (opened.steps.prefill(task), {TOKEN}),
        (opened.steps.decode(task), {TOKEN, PAST, CANDIDATE}),
    ):
        assert not step.module.training
        names = [spec.name for spec in step.inputs]
        assert len(set(names)) == len(names)
        signature = inspect.signature(step.module.forward).parameters
        assert [n for n in signature if n in names] == names
        assert {n for n, p in signature.items() if p.default is p.empty} <= set(names)
        assert {a for s in step.inputs for a in s.axes if isinstance(a, str)} <= axes
        declared |= set(names)
        for spec in step.inputs:
            if spec.name in (PAST_KEYS, PAST_VALUES):
                continue
            assert arrays[spec.name].dtype == spec.dtype, spec.name
            shape = arrays[spec.name].shape
            assert len(shape) == len(spec.axes), spec.name
            lengths = {TOKEN: opened.jagged.sequence(request).history - 2, PAST: 2, CANDIDATE: 3}
            assert shape == tuple(a if isinstance(a, int) else lengths[a] for a in spec.axes), (
                spec.name
            )
    # Of a single layer, what tokens see is only read where the last of them answers.
    unread = {LOW, HIGH} if "one layer" in name and not opened.retrieves else set()
    assert declared == {*arrays, PAST_KEYS, PAST_VALUES} - unread


@pytest.mark.parametrize(
    ("name", "task"), [c for c in TASKS if "one layer" in c[0] or "without" in c[0]], ids=str
)
def test_every_input_is_read(name: str, task: Task) -> None:
    """A graph would lack an input that no output depends on."""
    opened = Opened(VARIANTS[name], task)
    request = opened.request(np.random.default_rng(1), (6, 3, 2))
    sequence = opened.jagged.sequence(request)
    layers, heads, d_qk, d_v = kv_shape(opened)
    past = {
        PAST_KEYS: np.zeros((layers, 2, heads, d_qk), np.float32),
        PAST_VALUES: np.zeros((layers, 2, heads, d_v), np.float32),
    }
    for step, start in ((opened.steps.prefill(task), 0), (opened.steps.decode(task), 2)):
        arrays = {**opened.steps.arrays(request, sequence, start), **past}
        inputs = collate(step.inputs, [EncodedRequest(task, arrays, 0)])
        names, tensors = list(inputs), [torch.from_numpy(a) for a in inputs.values()]

        def called(*given: Tensor, step: Step = step, names: list[str] = names) -> Any:
            return step.module(**dict(zip(names, given, strict=True)))

        graph = make_fx(called)(*tensors).graph
        graph.eliminate_dead_code()
        read = [bool(node.users) for node in graph.nodes if node.op == "placeholder"]
        assert [name for name, used in zip(names, read, strict=True) if not used] == []


@pytest.mark.parametrize(("name", "task"), TASKS, ids=str)
@torch.no_grad()
def test_the_last_layer_computes_only_what_is_read(name: str, task: Task) -> None:
    """Outputs of the rows that answer alone; of the other rows K and V."""
    opened = Opened(VARIANTS[name], task)
    request = opened.request(np.random.default_rng(2), (6, 3, 2))
    sequence = opened.jagged.sequence(request)
    layers: list[Any] = list(opened.module.stack.layers)
    rows: list[int] = []
    for layer in layers:
        layer.output.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[1]))
    layers[-1].uvqk.register_forward_hook(lambda *_: pytest.fail("all of the last layer"))

    (kv,) = run(opened.steps.prefill(task), [opened.steps.arrays(request, sequence, 0)])
    tokens = sequence.history
    answering = [1] if task is Task.RETRIEVE else []
    assert rows == [tokens] * (len(layers) - 1) + answering

    rows.clear()
    run(opened.steps.decode(task), [with_past(opened, request, sequence, kv, 2)])
    candidates = 0 if opened.retrieves else 3
    given = tokens - 2 + candidates
    assert rows == [given] * (len(layers) - 1) + [candidates or 1]


def kv_shape(opened: Opened) -> tuple[int, int, int, int]:
    config = opened.config
    if isinstance(config, MTGRConfig):
        return config.num_layers, config.num_heads, config.qk_dim, config.v_dim
    return config.num_layers, config.num_heads, config.d_qk, config.d_v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["research", "ranking", "mtgr with places"])
@torch.no_grad()
def test_copies_of_lower_precision(name: str, dtype: torch.dtype) -> None:
    """All of a copy is in its precision, and gives about the same."""
    opened = Opened(VARIANTS[name])
    request = opened.request(np.random.default_rng(5), (10, 4, 3))
    sequence = opened.jagged.sequence(request)
    (kv,) = run(opened.steps.prefill(opened.task), [opened.steps.arrays(request, sequence, 0)])
    step = opened.steps.decode(opened.task)
    row = with_past(opened, request, sequence, kv, 6)
    inputs = collate(step.inputs, [EncodedRequest(opened.task, row, 0)])
    given = {n: torch.from_numpy(a) for n, a in inputs.items()}
    expected = step.module(**given)
    lower = {n: a.to(dtype) if a.is_floating_point() else a for n, a in given.items()}
    found = copy.deepcopy(step.module).to(dtype)(**lower)
    for output, answer in zip(found, expected, strict=True):
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), answer, rtol=0.1, atol=0.1)


# ── Models of bundles ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
@torch.no_grad()
def test_models_of_bundles(tmp_path: Path, kind: str, task: Task) -> None:
    model = load(write(tmp_path, kind))
    assert isinstance(model, SteppedModel)
    requests = [
        encode(model, task, a_request(seed, length, candidates))
        for seed, length, candidates in ((0, 10, 5), (1, 0, 3), (2, 1, 1), (3, 24, 0), (4, 17, 9))
    ]
    arrays = collate(model.inputs(task), requests)
    expected = model.module(task)(**{n: torch.from_numpy(a) for n, a in arrays.items()})
    sequences = [model.sequence(request) for request in requests]
    prefill, decode = model.prefill_step(task), model.decode_step(task)
    whole = [model.step_arrays(r, s, 0) for r, s in zip(requests, sequences, strict=True)]
    kept = run(prefill, whole)
    rows = []
    for request, sequence, kv in zip(requests, sequences, kept, strict=True):
        start = max(0, last_start(sequence) - 3)
        row = dict(model.step_arrays(request, sequence, start))
        row |= {PAST_KEYS: kv[KEYS][:, :start].numpy(), PAST_VALUES: kv[VALUES][:, :start].numpy()}
        rows.append(row)
    for found, answer, request in zip(run(decode, rows), expected, requests, strict=True):
        if task is Task.RETRIEVE:
            close(found[USER], answer)
        else:
            count = len(request.arrays["candidate_items"])
            close(found[SCORES][:count], answer[:count])


def test_the_softmax_variant_has_no_steps(tmp_path: Path) -> None:
    config = research(
        attention_activation="softmax",
        num_items=testing.ITEMS,
        max_seq_len=24,
        signal_cardinalities=(3, 4),
    )
    state = random_module(config).state_dict()
    model = load(write(tmp_path, "research", config=config.to_dict(), state=state))
    for step in (model.prefill_step, model.decode_step):
        with pytest.raises(PlanError, match=r"research: attention_activation 'softmax'.*pointwise"):
            step(Task.RETRIEVE)
