"""The masks, pair by pair, against the rules in words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def hstu_sees(
    query: tuple[str, int],
    key: tuple[str, int],
    *,
    length: int,
    prefix: int,
    window: int,
    contextual: bool,
) -> bool:
    """The rule for one pair; a token is its kind and its number within the kind."""
    if query == key:
        return True
    kinds = query[0], key[0]
    if "prefix" in kinds and contextual:
        if key[0] == "candidate":
            return False
        if query[0] == "prefix":
            return True
        # All of the prefix stands directly before the oldest behaviour.
        place = length if query[0] == "candidate" else query[1]
        return not window or place + 1 <= window
    places = []
    for kind, number in (query, key):
        if kind == "prefix":
            places.append(number)
        else:
            places.append(prefix + (length if kind == "candidate" else number))
    distance = places[0] - places[1]
    return distance > 0 and (not window or distance <= window)


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    counts=st.data(),
    prefix=st.integers(0, 2),
    window=st.integers(0, 4),
    contextual=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_hstu_mask_pair_by_pair(
    lengths: list[int], counts: st.DataObject, prefix: int, window: int, contextual: bool
) -> None:
    length, most = 5, 3
    targets = [counts.draw(st.integers(0, most)) for _ in lengths]
    lengths_B, counts_B = torch.tensor(lengths), torch.tensor(targets)
    history = history_tokens(
        prefix, torch.zeros(len(lengths), length), lengths_B, contextual=contextual
    )
    candidates = candidate_tokens(
        prefix, torch.zeros(len(lengths), most), counts_B, lengths_B, contextual=contextual
    )
    tokens = HSTUTokens(*(torch.cat(p, 1) for p in zip(history, candidates, strict=True)))
    whole = hstu_mask(tokens, tokens, window=window, contextual=contextual)
    last = hstu_mask(candidates, tokens, window=window, contextual=contextual)
    assert torch.equal(last, whole[:, -most:])

    names = [("prefix", i) for i in range(prefix)]
    names += [("history", i) for i in range(length)] + [("candidate", i) for i in range(most)]
    for b, (n, count) in enumerate(zip(lengths, targets, strict=True)):
        real = {"prefix": prefix, "history": n, "candidate": count}
        for t, query in enumerate(names):
            for s, key in enumerate(names):
                if key[1] >= real[key[0]]:
                    assert not whole[b, t, s], f"padding {key} is seen by {query}"
                elif query[1] < real[query[0]]:
                    expected = hstu_sees(
                        query, key, length=n, prefix=prefix, window=window, contextual=contextual
                    )
                    assert bool(whole[b, t, s]) == expected, (query, key)


@given(
    data=st.data(),
    users=st.integers(0, 2),
    times=st.lists(st.integers(0, 6), min_size=0, max_size=6),
    request=st.integers(0, 7),
)
@settings(max_examples=100, deadline=None)
def test_mtgr_mask_pair_by_pair(
    data: st.DataObject, users: int, times: list[int], request: int
) -> None:
    """Times come in any order and repeat: the rule is by time, not by index."""
    length, most = 6, 3
    realtime = data.draw(st.integers(0, len(times)))
    count = data.draw(st.integers(0, most))
    padded = torch.tensor([times + [0] * (length - len(times))])
    history = mtgr_history_tokens(
        users, padded, torch.tensor([len(times)]), torch.tensor([realtime])
    )
    candidates = mtgr_candidate_tokens(
        torch.zeros(1, most, dtype=torch.int64), torch.tensor([count]), torch.tensor([request])
    )
    tokens = MTGRTokens(*(torch.cat(p, 1) for p in zip(history, candidates, strict=True)))
    mask = mtgr_mask(tokens, tokens)[0]
    assert torch.equal(mtgr_mask(candidates, tokens)[0], mask[-most:])

    named: list[tuple[str, int] | None] = [("U", 0)] * users
    for i in range(length):
        group = "S" if i < len(times) - realtime else "R"
        named.append((group, times[i]) if i < len(times) else None)
    named += [("K", request) if i < count else None for i in range(most)]
    for t, query in enumerate(named):
        for s, key in enumerate(named):
            if key is None:
                assert not mask[t, s]
                continue
            if query is None:
                continue
            if key[0] in "US" or t == s:
                expected = True
            elif key[0] == "R":
                expected = query[0] in "RK" and query[1] > key[1]
            else:
                expected = False
            assert bool(mask[t, s]) == expected, (query, key, t, s)


def test_hstu_window_counts_behaviours() -> None:
    history = history_tokens(0, torch.zeros(1, 4), torch.tensor([4]), contextual=False)
    mask = hstu_mask(history, history, window=2)[0]
    assert mask.long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("contextual", [False, True])
def test_contextual_prefix(contextual: bool) -> None:
    history = history_tokens(2, torch.zeros(1, 2), torch.tensor([2]), contextual=contextual)
    mask = hstu_mask(history, history, contextual=contextual)[0].long().tolist()
    if contextual:
        assert mask == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    else:
        assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
