"""Models opened as stacks: jagged tokens, layers, heads give what the modules give on padding.

The layers run in a naive float64 oracle, straight from the equations in `gr_core.stack`.

Shapes: T tokens, N tokens of the history, C candidates, D model width, H heads, K and V columns of
a head, F = H·V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_core import Task
from gr_core.collate import collate
from gr_core.contracts import EncodedRequest
from gr_core.errors import PlanError
from gr_core.stack import LayerWeights, Stack, StackModel, TokenSequence
from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.jagged import Jagged, stack_of
from gr_hstu.jagged import ranking as jagged_ranking
from gr_hstu.jagged.intervals import hstu_intervals, mtgr_intervals
from gr_hstu.modules.masks import (
    HSTUTokens,
    MTGRTokens,
    candidate_tokens,
    history_tokens,
    hstu_mask,
    mtgr_candidate_tokens,
    mtgr_history_tokens,
    mtgr_mask,
)
from gr_hstu.testing import CASES, CONFIGS, a_request, encode, load, random_module, write

from .small_stacks import ANY, ITEMS, SIZES, Arrays, Config, Opened

# ── The oracle ────────────────────────────────────────────────────────────────────────────────


def visible(sequence: TokenSequence) -> Tensor:
    """(T, T) bool: the tokens of the history that each token sees, and itself."""
    total = sequence.history + sequence.candidates
    key_T = torch.arange(total)
    low_T, high_T = (torch.from_numpy(a.astype(np.int64)) for a in (sequence.low, sequence.high))
    sees_TT = (key_T >= low_T[:, None]) & (key_T < high_T[:, None])
    assert not sees_TT[:, sequence.history :].any(), "keys are the tokens of the history"
    return sees_TT | torch.eye(total, dtype=torch.bool)


def norm(
    x_TF: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups_T: Tensor,
    eps: float,
    heads: int,
) -> Tensor:
    parts = x_TF.unflatten(1, (heads, -1))
    mean = parts.mean(-1, keepdim=True)
    variance = ((parts - mean) ** 2).mean(-1, keepdim=True)
    normed_TF = ((parts - mean) / (variance + eps).sqrt()).flatten(1)
    if weight is not None:
        normed_TF = normed_TF * weight.double()[groups_T]
    if bias is not None:
        normed_TF = normed_TF + bias.double()[groups_T]
    return normed_TF


def scores_bias(layer: LayerWeights, sequence: TokenSequence) -> Tensor | float:
    total = sequence.history + sequence.candidates
    bias: Tensor | float = 0.0
    if layer.position_bias is not None:
        place_T = torch.arange(total)
        places = (len(layer.position_bias) + 1) // 2
        index_TT = place_T[None, :] - place_T[:, None] + places - 1
        bias = bias + layer.position_bias.double()[index_TT]
    if layer.time_bias is not None:
        assert sequence.times is not None
        assert sequence.next_times is not None
        gap_TT = torch.from_numpy(sequence.next_times[:, None] - sequence.times[None, :])
        bucket_TT = (torch.log(gap_TT.abs().clamp(min=1).float()) / 0.301).floor().long()
        bias = bias + layer.time_bias.double()[bucket_TT.clamp(max=len(layer.time_bias) - 1)]
    return bias


def run_stack(
    stack: Stack, x_TD: Tensor, sequence: TokenSequence
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The output (T, D), and K and V of the history's tokens in each layer, in float64."""
    x_TD = x_TD.double()
    sees_TT = visible(sequence)
    groups_T = torch.zeros(len(x_TD), dtype=torch.int64)
    if stack.groups > 1:
        assert sequence.groups is not None
        groups_T = torch.from_numpy(sequence.groups.astype(np.int64))
    heads, gated, keyed = stack.num_heads, stack.num_heads * stack.d_v, stack.num_heads * stack.d_qk
    kept = []
    for layer in stack.layers:
        normed_TD = norm(
            x_TD, layer.input_norm_weight, layer.input_norm_bias, groups_T, stack.norm_eps, 1
        )
        projected = normed_TD @ layer.uvqk_weight.double().T
        if layer.uvqk_bias is not None:
            projected = projected + layer.uvqk_bias.double()
        if stack.projection_silu == "all":
            projected = F.silu(projected)
        u_TF, v_TF, q_TF, k_TF = projected.split([gated, gated, keyed, keyed], dim=1)
        if stack.projection_silu == "u":
            u_TF = F.silu(u_TF)
        q_HTK, k_HTK, v_HTV = (
            part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (q_TF, k_TF, v_TF)
        )
        score_HTT = stack.alpha * q_HTK @ k_HTK.transpose(1, 2) + scores_bias(layer, sequence)
        weight_HTT = F.silu(score_HTT) / stack.divisor * sees_TT
        a_TF = (weight_HTT @ v_HTV).transpose(0, 1).flatten(1)

        def normed(
            value_TF: Tensor, layer: LayerWeights = layer, groups_T: Tensor = groups_T
        ) -> Tensor:
            weight, bias = layer.attention_norm_weight, layer.attention_norm_bias
            of = heads if stack.head_norm else 1
            return norm(value_TF, weight, bias, groups_T, stack.norm_eps, of)

        gates = {
            "u*norm(a)": lambda u, a: [u * normed(a)],
            "u,norm(a),u*norm(a)": lambda u, a: [u, normed(a), u * normed(a)],
            "u,a,u*norm(a)": lambda u, a: [u, a, u * normed(a)],
            "norm(a*u)": lambda u, a: [normed(a * u)],
        }
        x_TD = x_TD + torch.cat(gates[stack.gate](u_TF, a_TF), dim=1) @ (
            layer.output_weight.double().T
        )
        if layer.output_bias is not None:
            x_TD = x_TD + layer.output_bias.double()
        kept.append((k_TF[: sequence.history], v_TF[: sequence.history]))
    return x_TD, kept


def check_shapes(stack: Stack, sequence: TokenSequence, request: EncodedRequest) -> None:
    n, total = sequence.history, sequence.history + sequence.candidates
    assert sequence.low.shape == sequence.high.shape == (total,)
    assert sequence.low.dtype == sequence.high.dtype == np.int32
    assert sequence.content.dtype == np.uint8
    assert len(sequence.content) == n
    assert (sequence.low >= 0).all()
    assert (sequence.high <= n).all()
    assert 0 <= sequence.reusable <= n
    assert (sequence.groups is not None) == (stack.groups > 1)
    if sequence.groups is not None:
        assert sequence.groups.shape == (total,)
        assert sequence.groups.dtype == np.uint8
    timed = stack.layers[0].time_bias is not None
    for times in (sequence.times, sequence.next_times):
        assert (times is not None) == timed
        if times is not None:
            assert times.shape == (total,)
            assert times.dtype == np.int64
    assert sequence.history >= len(request.arrays["history_items"])


def answers(
    opened: Jagged | StackModel, stack: Stack, task: Task, requests: Sequence[EncodedRequest]
) -> Sequence[Tensor]:
    """What an engine does with the parts of a model, without a cache."""
    sequences = [opened.sequence(request) for request in requests]
    x_TD = opened.embed(requests, sequences, [0] * len(requests))
    assert x_TD.dtype == torch.float32
    rows = []
    start = 0
    for request, sequence in zip(requests, sequences, strict=True):
        check_shapes(stack, sequence, request)
        stop = start + sequence.history + sequence.candidates
        y_TD, _ = run_stack(stack, x_TD[start:stop], sequence)
        if sequence.candidates:
            rows.append(y_TD[sequence.history :])
        else:
            rows.append(y_TD[-1:] if len(y_TD) else y_TD.new_zeros(1, stack.d_model))
        start = stop
    assert start == len(x_TD)
    return opened.outputs(task, requests, torch.cat(rows).float())


def history_of(opened: Opened, request: EncodedRequest) -> tuple[TokenSequence, Tensor, Tensor]:
    """The tokens, and of the history the input (N, D), and K and V of all layers (N, …)."""
    sequence = opened.jagged.sequence(request)
    x_TD = opened.jagged.embed([request], [sequence], [0])
    _, kept = run_stack(opened.stack, x_TD, sequence)
    kv_NX = torch.cat([part for pair in kept for part in pair], dim=1)
    return sequence, x_TD[: sequence.history], kv_NX


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


# ── The same answers ──────────────────────────────────────────────────────────────────────────


@given(config=ANY, seed=st.integers(0, 2**31), sizes=st.lists(SIZES, min_size=1, max_size=4))
@settings(max_examples=150)
def test_what_the_module_gives(
    config: Config, seed: int, sizes: list[tuple[int, int, int]]
) -> None:
    opened = Opened(config)
    rng = np.random.default_rng(seed)
    requests = [opened.request(rng, size) for size in sizes]
    found = answers(opened.jagged, opened.stack, opened.task, requests)
    assert len(found) == len(requests)
    for answer, request in zip(found, requests, strict=True):
        close(answer, opened.expected(request))


@pytest.mark.parametrize(
    ("crosses", "bound", "kept"), [((), 1 << 20, True), ((), 0, False), ((3,), 1 << 20, False)]
)
def test_the_item_mlp_runs_once_for_each_item_where_it_may(
    monkeypatch: pytest.MonkeyPatch, crosses: tuple[int, ...], bound: int, kept: bool
) -> None:
    monkeypatch.setattr(jagged_ranking, "MAX_ITEM_TABLE_BYTES", bound)
    monkeypatch.setattr(jagged_ranking, "_ITEMS_AT_ONCE", 5)
    config = dataclasses.replace(
        CONFIGS["ranking"], num_items=ITEMS, candidate_cardinalities=crosses
    )
    opened = Opened(config)
    rng = np.random.default_rng(0)
    requests = [opened.request(rng, (6, candidates, 0)) for candidates in (4, 0, 9)]
    calls: list[int] = []
    answers(opened.jagged, opened.stack, opened.task, requests)
    opened.module.item_mlp.register_forward_hook(lambda *_: calls.append(1))
    found = answers(opened.jagged, opened.stack, opened.task, requests)
    assert (not calls) is kept
    for answer, request in zip(found, requests, strict=True):
        close(answer, opened.expected(request))


@given(
    config=ANY,
    seed=st.integers(0, 2**31),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=100)
def test_later_tokens_are_the_same_bits_alone_and_together(
    config: Config, seed: int, sizes: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Whatever is cached, and whoever shares the batch."""
    opened = Opened(config)
    rng = np.random.default_rng(seed)
    requests = [opened.request(rng, size) for size in sizes]
    sequences = [opened.jagged.sequence(request) for request in requests]
    starts = [data.draw(st.integers(0, sequence.history)) for sequence in sequences]
    alone = [
        opened.jagged.embed([request], [sequence], [0])[start:]
        for request, sequence, start in zip(requests, sequences, starts, strict=True)
    ]
    together = opened.jagged.embed(requests, sequences, starts)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_bundles(tmp_path: Path, kind: str, task: Task) -> None:
    model = load(write(tmp_path, kind))
    assert isinstance(model, StackModel)
    assert model.stack(task) is model.stack(model.tasks[0]), "tasks share K and V"
    requests = [
        encode(model, task, a_request(seed, length, candidates))
        for seed, length, candidates in ((0, 10, 5), (1, 0, 3), (2, 1, 1), (3, 60, 0), (4, 33, 7))
    ]
    arrays = collate(model.inputs(task), requests)
    with torch.no_grad():
        expected = model.module(task)(**{n: torch.from_numpy(a) for n, a in arrays.items()})
    found = answers(model, model.stack(task), task, requests)
    for answer, request, row in zip(found, requests, expected, strict=True):
        count = len(request.arrays["candidate_items"]) if task is Task.RANK else len(row)
        assert answer.shape == row[:count].shape
        close(answer, row[:count])


def test_the_softmax_variant_has_no_stack(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["research"], attention_activation="softmax")
    state = random_module(config).state_dict()
    model = load(write(tmp_path, "research", config=config.to_dict(), state=state))
    with pytest.raises(PlanError, match=r"research: attention_activation 'softmax'.*pointwise"):
        model.stack(Task.RETRIEVE)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weights_are_the_modules_own(kind: str) -> None:
    module = random_module(CONFIGS[kind]).requires_grad_(False)
    stack = stack_of(module)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    for layer in stack.layers:
        for field in dataclasses.fields(layer):
            tensor = getattr(layer, field.name)
            if tensor is not None:
                assert tensor.is_contiguous(), field.name
                assert tensor.dtype == torch.float32, field.name
                assert not tensor.requires_grad, field.name
                assert tensor.data_ptr() in own, field.name


# ── Who sees whom ─────────────────────────────────────────────────────────────────────────────


def pairs(low: np.ndarray, high: np.ndarray, history: int) -> np.ndarray:
    key = np.arange(len(low))
    assert (high <= history).all()
    return ((key >= low[:, None]) & (key < high[:, None])) | np.eye(len(low), dtype=bool)


@given(
    prefix=st.integers(0, 3),
    length=st.integers(0, 9),
    count=st.integers(0, 3),
    window=st.integers(0, 12),
    contextual=st.booleans(),
)
@settings(max_examples=300)
def test_ranges_are_the_mask_of_hstu(
    prefix: int, length: int, count: int, window: int, contextual: bool
) -> None:
    lengths, counts = torch.tensor([length]), torch.tensor([count])
    history = history_tokens(prefix, torch.zeros(1, length), lengths, contextual=contextual)
    candidates = candidate_tokens(
        prefix, torch.zeros(1, count), counts, lengths, contextual=contextual
    )
    tokens = HSTUTokens(*(torch.cat(p, 1) for p in zip(history, candidates, strict=True)))
    mask = hstu_mask(tokens, tokens, window=window, contextual=contextual)[0].numpy()
    ranges = hstu_intervals(prefix, length, count, window=window, contextual=contextual)
    np.testing.assert_array_equal(pairs(*ranges, prefix + length), mask)


@given(
    prefix=st.integers(0, 3),
    times=st.lists(st.integers(0, 6), max_size=9).map(sorted),
    realtime=st.integers(0, 9),
    count=st.integers(0, 3),
    request_time=st.integers(0, 8),
)
@settings(max_examples=300)
def test_ranges_are_the_mask_of_mtgr(
    prefix: int, times: list[int], realtime: int, count: int, request_time: int
) -> None:
    realtime = min(realtime, len(times))
    history = mtgr_history_tokens(
        prefix,
        torch.tensor([times], dtype=torch.int64),
        torch.tensor([len(times)]),
        torch.tensor([realtime]),
    )
    candidates = mtgr_candidate_tokens(
        torch.zeros(1, count, dtype=torch.int64),
        torch.tensor([count]),
        torch.tensor([request_time]),
    )
    tokens = MTGRTokens(*(torch.cat(p, 1) for p in zip(history, candidates, strict=True)))
    mask = mtgr_mask(tokens, tokens)[0].numpy()
    ranges = mtgr_intervals(prefix, np.array(times, np.int64), realtime, request_time, count)
    np.testing.assert_array_equal(pairs(*ranges, prefix + len(times)), mask)


# ── What may be reused ────────────────────────────────────────────────────────────────────────


def shared(one: TokenSequence, other: TokenSequence) -> int:
    """How many first tokens of ``one`` a cache may give to ``other``."""
    if one.salt != other.salt:
        return 0
    most = min(one.reusable, other.history)
    same = (one.content[:most] == other.content[:most]).all(axis=1)
    return most if same.all() else int(np.argmin(same))


HISTORY = ("history_items", "history_timestamps", "history_signals")


def cut(arrays: Arrays, rows: Any) -> Arrays:
    changed = {name: arrays[name][rows].copy() for name in HISTORY}
    return {**arrays, **changed, "history_lengths": np.array(len(changed["history_items"]))}


def append(opened: Opened, arrays: Arrays, rng: np.random.Generator) -> Arrays:
    more = opened.request(rng, (int(rng.integers(1, 4)), 0, 0)).arrays
    end = arrays["history_timestamps"][-1:].sum() or 1_700_000_000
    times = more["history_timestamps"] - more["history_timestamps"][0] + end + rng.choice([0, 9])
    joined = {name: np.concatenate([arrays[name], more[name]]) for name in HISTORY}
    joined["history_timestamps"] = np.concatenate([arrays["history_timestamps"], times])
    n = len(joined["history_items"])
    longer = {**arrays, **joined, "history_lengths": np.array(n)}
    if "realtime_counts" in arrays:
        kept = int(arrays["realtime_counts"])
        choices = [kept, kept + len(times), kept + len(times), int(rng.integers(0, n + 1))]
        longer["realtime_counts"] = np.array(rng.choice(choices))
    return longer


def mutate(opened: Opened, arrays: Arrays, how: str, rng: np.random.Generator) -> Arrays:
    n = len(arrays["history_items"])
    if how == "append":
        return append(opened, arrays, rng)
    if how == "truncate":
        kept = cut(arrays, slice(int(rng.integers(0, n + 1)), None))
    elif how == "forget":
        kept = cut(arrays, slice(None, int(rng.integers(0, n + 1))))
    elif how == "reorder":
        order = rng.permutation(n)
        kept = cut(arrays, order) | {"history_timestamps": arrays["history_timestamps"]}
    else:
        changed = arrays[how].copy()
        if how == "history_timestamps":
            i = int(rng.integers(0, max(n, 1)))
            changed[i:] += rng.choice([1, 60, 10**6])
        elif how in ("request_time", "realtime_counts"):
            changed += rng.choice([1, 100, 10**6] if how == "request_time" else [-1, 1])
        elif changed.size:
            place = np.unravel_index(int(rng.integers(0, changed.size)), changed.shape)
            low = 1 if how.endswith("items") else 0
            changed[place] = rng.integers(low, ITEMS + 1 if low else 2)
        kept = {**arrays, how: changed}
    if "realtime_counts" in kept:
        m = len(kept["history_items"])
        kept["realtime_counts"] = kept["realtime_counts"].clip(0, m)
    return kept


WAYS = (
    *("append", "append", "truncate", "forget", "reorder", "request_time", "realtime_counts"),
    *("history_items", "history_timestamps", "history_signals", "user_features"),
    *("context_features", "candidate_items", "candidate_features"),
)


@given(
    config=ANY,
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 9)),
    ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=3),
)
@settings(max_examples=400)
def test_what_is_shared_is_equal(
    config: Config, seed: int, size: tuple[int, int, int], ways: list[str]
) -> None:
    """And so, where an input changed K or V, the salt or the content tells."""
    opened = Opened(config)
    rng = np.random.default_rng(seed)
    first = opened.request(rng, size)
    arrays = dict(first.arrays)
    for how in ways:
        assume(how in (*arrays, "append", "truncate", "forget", "reorder"))
        arrays = mutate(opened, arrays, how, rng)
    second = dataclasses.replace(first, arrays=arrays)
    one, x_one, kv_one = history_of(opened, first)
    other, x_other, kv_other = history_of(opened, second)
    for a, b in ((one, other), (other, one)):
        count = shared(a, b)
        assert torch.equal(x_one[:count], x_other[:count])
        for name in ("low", "high"):
            np.testing.assert_array_equal(getattr(one, name)[:count], getattr(other, name)[:count])
        torch.testing.assert_close(kv_one[:count], kv_other[:count], rtol=0, atol=1e-11)


SMALL: dict[str, Any] = {
    "num_items": ITEMS,
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 24,
    "signal_cardinalities": (3,),
}
ALL: dict[str, Any] = SMALL | {
    "user_cardinalities": (3, 3),
    "context_cardinalities": (3,),
    "candidate_cardinalities": (3,),
    "heads": ("a",),
    "mlp_dim": 8,
}


def research(**fields: Any) -> HSTUConfig:
    return HSTUConfig(variant="research", d_qk=4, d_v=4, **SMALL, **fields)


def ranking(**fields: Any) -> HSTUConfig:
    return HSTUConfig(variant="ranking", d_qk=4, d_v=4, **ALL, **fields)


def mtgr(**fields: Any) -> MTGRConfig:
    return MTGRConfig(embedding_dim=4, **ALL, **fields)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Of 8 behaviours after 3 features, once 2 more followed.
        (research(), 7),
        (research(relative_bias=False), 8),
        (ranking(), 11),
        (ranking(context_placement="candidate"), 10),
        (ranking(max_attn_len=3), 11),
        (ranking(contextual_mask=True), 0),
        (ranking(position_from="end"), 3),
        # The oldest behaviours stay in their buckets.
        (ranking(time_from="request"), 10),
        (ranking(time_from="request", time_buckets=0), 11),
        (mtgr(), 11),
        (mtgr(position_buckets=64, time_buckets=64), 11),
    ],
    ids=str,
)
def test_a_history_that_grew_hits(config: Config, expected: int) -> None:
    opened = Opened(config)
    rng = np.random.default_rng(0)
    longer = opened.request(rng, (10, 2, 5))
    times = 1_700_000_000 + np.array([0, 50, 90, 100, 100, 200, 300, 100_000, 100_010, 100_020])
    longer.arrays["history_timestamps"][:] = times
    longer.arrays["request_time"][...] = times[-1] + 100
    before = cut(dict(longer.arrays), slice(None, 8))
    before["request_time"] = np.array(times[7] + 5)
    if isinstance(config, MTGRConfig):
        before["realtime_counts"] = np.array(3)
    one = opened.jagged.sequence(dataclasses.replace(longer, arrays=before))
    other = opened.jagged.sequence(longer)
    assert shared(one, other) == expected


@given(
    pair=st.integers(1, 6).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n).map(sorted)] * 2)
    ),
    timed=st.booleans(),
)
def test_mtgr_tells_times_in_r_apart(pair: tuple[list[int], list[int]], timed: bool) -> None:
    """By their order alone: which tokens of R a token sees, not how much earlier they are."""
    opened = Opened(mtgr(time_buckets=9 if timed else 0))
    first = opened.request(np.random.default_rng(0), (len(pair[0]) + 2, 1, len(pair[0])))
    kept = []
    for times in pair:
        all_times = np.array([0, 0, *times]) + 1_700_000_000
        arrays = {**first.arrays, "history_timestamps": all_times}
        kept.append(history_of(opened, dataclasses.replace(first, arrays=arrays)))
    (one, _, kv_one), (other, _, kv_other) = kept
    count = shared(one, other)
    torch.testing.assert_close(kv_one[:count], kv_other[:count], rtol=0, atol=1e-11)
    ties = [[i > 0 and t == times[i - 1] for i, t in enumerate(times)] for times in pair]
    same = next((i for i, (a, b) in enumerate(zip(*ties, strict=True)) if a != b), len(pair[0]))
    assert count == 3 + 2 + same


def test_mtgr_shares_nothing_when_s_or_u_changed() -> None:
    opened = Opened(mtgr(context_placement="candidate"))
    first = opened.request(np.random.default_rng(0), (9, 2, 4))
    one = opened.jagged.sequence(first)
    changed: Mapping[str, Any] = {
        "user_features": 1 - first.arrays["user_features"],
        "realtime_counts": first.arrays["realtime_counts"] - 1,
    }
    for name, value in changed.items():
        other = dataclasses.replace(first, arrays={**first.arrays, name: value})
        assert shared(one, opened.jagged.sequence(other)) == 0, name
    for name in ("context_features", "candidate_items", "request_time"):
        other = dataclasses.replace(
            first, arrays={**first.arrays, name: first.arrays[name] + (name == "request_time")}
        )
        assert shared(one, opened.jagged.sequence(other)) == one.history, name
