"""The op `hstu_paged_attention` in torch, against pairs of tokens one by one.

Shapes: N tokens of a sequence, T tokens of a call, H heads, K and V columns of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr_vllm.worker import torch_attention
from gr_vllm.worker.kernels import PAGE_TOKENS
from gr_vllm.worker.torch_attention import TorchPagedAttention

ALPHA, DIVISOR = 0.4, 9.0
HEADS, D_QK, D_V = 2, 3, 5
NAN_BYTE = 255
"""Four of it are a NaN in every dtype."""


@dataclass(frozen=True)
class History:
    """All tokens of one sequence, float64."""

    q_NHK: Tensor
    k_NHK: Tensor
    v_NHV: Tensor
    low_N: Tensor
    high_N: Tensor
    bias_NN: Tensor | None

    def __len__(self) -> int:
        return len(self.q_NHK)


def made(
    seed: int, tokens: int, *, candidates: int = 0, biased: bool = False, any_interval: bool = False
) -> History:
    """Causal, with candidates that see all before them; or intervals that lie anywhere before."""
    rng = np.random.default_rng(seed)
    place = np.arange(tokens)
    low, high = np.zeros(tokens, np.int32), place.astype(np.int32)
    high[tokens - candidates :] = tokens - candidates
    if any_interval:
        high = rng.integers(0, place + 1)
        low = rng.integers(0, tokens + 1, tokens)  # beyond high, too: then it sees itself alone

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape)).bfloat16().double()

    return History(
        normal(tokens, HEADS, D_QK),
        normal(tokens, HEADS, D_QK),
        normal(tokens, HEADS, D_V),
        torch.from_numpy(low).int(),
        torch.from_numpy(high).int(),
        normal(tokens, tokens) if biased else None,
    )


def pair_by_pair(sequence: History) -> Tensor:
    """(N, H, V)."""
    found = torch.zeros_like(sequence.v_NHV)
    for i in range(len(sequence)):
        for j in range(len(sequence)):
            if i != j and not sequence.low_N[i] <= j < sequence.high_N[i]:
                continue
            for h in range(HEADS):
                score = ALPHA * sequence.q_NHK[i, h] @ sequence.k_NHK[j, h]
                if sequence.bias_NN is not None:
                    score = score + sequence.bias_NN[i, j]
                weight = torch.nn.functional.silu(score) / DIVISOR
                found[i, h] += weight * sequence.v_NHV[j, h]
    return found


def computed(
    sequences: Sequence[History],
    steps: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    padding: int = 0,
    unstored: int = 0,
) -> list[Tensor]:
    """In calls of so many new tokens of each, on shuffled pages of NaN, in a wider memory.

    ``padding`` rows belong to no sequence; the last ``unstored`` tokens of each are not stored.
    """
    rng = np.random.default_rng(seed)
    attention = TorchPagedAttention(HEADS, D_QK, D_V, dtype, ALPHA, DIVISOR)
    counts = [-(-len(s) // PAGE_TOKENS) for s in sequences]
    memory = torch.full((sum(counts) + 2, attention.page_bytes + 64), NAN_BYTE, dtype=torch.uint8)
    numbers = torch.from_numpy(rng.permutation(len(memory)))[: sum(counts)]
    table = torch.full((len(sequences), max(counts) + 1), -7, dtype=torch.int32)
    for row, part in zip(table, numbers.split(counts), strict=True):
        row[: len(part)] = part
    found: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in steps:
        parts = [slice(n, n + count) for n, count in zip(done, step, strict=True)]
        done = [part.stop for part in parts]
        q, k, v = (
            torch.cat([getattr(s, name)[p] for s, p in zip(sequences, parts, strict=True)])
            for name in ("q_NHK", "k_NHK", "v_NHV")
        )
        low, high = (
            torch.cat([getattr(s, name)[p] for s, p in zip(sequences, parts, strict=True)])
            for name in ("low_N", "high_N")
        )
        slots = []
        for b, (sequence, part) in enumerate(zip(sequences, parts, strict=True)):
            place = torch.arange(part.start, part.stop)
            slot = table[b].long()[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
            slots.append(slot.masked_fill(place >= len(sequence) - unstored, -1))
        pairs = [
            s.bias_NN[p, : p.stop].flatten()
            for s, p in zip(sequences, parts, strict=True)
            if s.bias_NN is not None
        ]
        more = torch.full((padding,), -1)
        nan = float("nan")
        q, k, v = (
            torch.cat([x, torch.full((padding, *x.shape[1:]), nan)]).to(dtype) for x in (q, k, v)
        )
        a = attention(
            q,
            k,
            v,
            memory,
            table,
            torch.cat([*slots, more]),
            torch.tensor([0, *np.cumsum(step)], dtype=torch.int32),
            torch.tensor(done, dtype=torch.int32),
            torch.cat([low, more.int()]),
            torch.cat([high, more.int()]),
            torch.cat(pairs).float() if pairs else None,
        )
        assert a.dtype == dtype
        assert (a[len(a) - padding :] == 0).all()
        for rows, part in zip(found, a[: len(a) - padding].split(list(step)), strict=True):
            rows.append(part.double())
    unused = torch.ones(len(memory), dtype=torch.bool)
    unused[numbers] = False
    assert (memory[unused] == NAN_BYTE).all()
    assert (memory[:, attention.page_bytes :] == NAN_BYTE).all()
    return [torch.cat(rows) for rows in found]


def chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Steps in which each sequence gets at most ``size`` tokens; some get none at the end."""
    steps = []
    left = list(lengths)
    while any(left):
        steps.append([min(size, n) for n in left])
        left = [n - count for n, count in zip(left, steps[-1], strict=True)]
    return steps


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65])
def test_odd_lengths(tokens: int):
    sequence = made(1, tokens)
    (found,) = computed([sequence], [[tokens]])
    torch.testing.assert_close(found, pair_by_pair(sequence))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    size=st.integers(1, 40),
    biased=st.booleans(),
    any_interval=st.booleans(),
    padding=st.sampled_from([0, 3]),
)
def test_any_intervals_in_any_chunks(
    seed: int, lengths: list[int], size: int, biased: bool, any_interval: bool, padding: int
):
    sequences = [
        made(seed + i, n, biased=biased, any_interval=any_interval) for i, n in enumerate(lengths)
    ]
    found = computed(sequences, chunks(lengths, size), seed=seed, padding=padding)
    for one, sequence in zip(found, sequences, strict=True):
        torch.testing.assert_close(one, pair_by_pair(sequence), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [70, 13])
@pytest.mark.parametrize("unstored", [0, 9])
def test_candidates_see_the_history_and_themselves(size: int, unstored: int):
    """Also where they are stored nowhere, and their place in the page is what it was: NaN."""
    sequence = made(3, 70, candidates=9, biased=True)
    (found,) = computed([sequence], chunks([70], size), unstored=unstored)
    right = pair_by_pair(sequence)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    # Another candidate in its place changes nothing about the others.
    changed = made(4, 70, candidates=9, biased=True)
    mixed = History(
        *(
            torch.cat([getattr(sequence, n)[:-1], getattr(changed, n)[-1:]])
            for n in ("q_NHK", "k_NHK", "v_NHV", "low_N", "high_N")
        ),
        sequence.bias_NN,
    )
    (other,) = computed([mixed], chunks([70], size), unstored=unstored)
    torch.testing.assert_close(other[:-1], found[:-1], rtol=0, atol=0)
    assert not torch.allclose(other[-1], found[-1])


def test_more_queries_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    sequence = made(5, 60, biased=True)
    (at_once,) = computed([sequence], [[60]])
    monkeypatch.setattr(torch_attention, "_ROWS", 7)
    (in_parts,) = computed([sequence], [[60]])
    torch.testing.assert_close(in_parts, at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_precision(dtype: torch.dtype):
    """Of the same computation in plain torch in that precision, at most some times as much."""
    sequence = made(6, 90)
    right = pair_by_pair(sequence)
    q, k, v = (getattr(sequence, n).to(dtype) for n in ("q_NHK", "k_NHK", "v_NHV"))
    scores = ALPHA * torch.einsum("ihk,jhk->hij", q, k)
    sees = torch.ones(90, 90, dtype=torch.bool).tril()
    weights = (torch.nn.functional.silu(scores) / DIVISOR) * sees
    plain = torch.einsum("hij,jhv->ihv", weights, v)
    (found,) = computed([sequence], chunks([90], 40), dtype)
    assert (found - right).abs().max() < 4 * (plain.double() - right).abs().max() + 1e-7
