"""The trie of codes and the beam search over it, beside an exhaustive search.

Shapes: I items, L levels, V tokens, K items found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core.generation import (
    MAX_BEAM_WIDTH,
    BeamSearch,
    CodeTrie,
    Tokens,
    search_width,
)
from gr_core.types import FloatArray, IntArray


@dataclass(frozen=True)
class Codes:
    """A catalogue's tokens, and log-probabilities that depend on all tokens before."""

    tokens: Tokens
    levels: Sequence[range]
    seed: int = 0
    ties: bool = False

    @property
    def vocabulary(self) -> int:
        return self.levels[-1].stop

    def log_probs(self, prefix: Sequence[int]) -> npt.NDArray[np.float64]:
        """By token (V,): the softmax over the next level's tokens, NaN for all others."""
        level = self.levels[len(prefix)]
        rng = np.random.default_rng([self.seed, *prefix])
        logits = rng.integers(0, 2, len(level)) if self.ties else rng.normal(size=len(level))
        out = np.full(self.vocabulary, np.nan)
        out[level.start : level.stop] = logits - np.log(np.exp(logits).sum())
        return out


@st.composite
def codes(draw: st.DrawFn) -> Codes:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    starts = np.cumsum([draw(st.integers(0, 3)), *sizes])
    levels = [range(int(s), int(s) + size) for s, size in zip(starts, sizes, strict=False)]
    row = st.tuples(*(st.integers(level.start, level.stop - 1) for level in levels))
    rows = draw(st.lists(row, min_size=1, max_size=30))
    tokens = np.array([(0,) * len(levels), *rows], np.int32)
    return Codes(tokens, levels, draw(st.integers(0, 1000)), draw(st.booleans()))


def searched(codes: Codes, width: int) -> BeamSearch:
    search = BeamSearch(CodeTrie(codes.tokens, codes.levels), width)
    while not search.done:
        parents, tokens = search.allowed
        rows = [codes.log_probs(prefix) for prefix in search.prefixes.tolist()]
        search.advance(np.stack(rows)[parents, tokens])
    return search


def exhaustive(codes: Codes) -> tuple[IntArray, FloatArray]:
    """All items, best first; equal ones by tokens, then by index."""
    rows = codes.tokens[1:].tolist()
    scores = []
    for row in rows:
        score = 0.0
        for level, token in enumerate(row):
            score += codes.log_probs(row[:level])[token]
        scores.append(score)
    order = sorted(range(len(rows)), key=lambda i: (-scores[i], rows[i], i))
    return np.array(order) + 1, np.array(scores)[order].astype(np.float32)


@given(codes())
def test_a_wide_search_is_exhaustive(codes: Codes) -> None:
    indices, scores = searched(codes, len(codes.tokens)).finish(len(codes.tokens))
    right_indices, right_scores = exhaustive(codes)
    np.testing.assert_array_equal(indices, right_indices)
    np.testing.assert_array_equal(scores, right_scores)
    assert indices.dtype == np.int64
    assert scores.dtype == np.float32


@given(codes(), st.integers(1, 8), st.integers(0, 40))
def test_any_search_finds_items_with_their_scores(codes: Codes, width: int, k: int) -> None:
    indices, scores = searched(codes, width).finish(k)
    right = dict(zip(*(a.tolist() for a in exhaustive(codes)), strict=True))
    assert len(set(indices.tolist())) == len(indices), "an item occurs twice"
    assert [right[i] for i in indices.tolist()] == scores.tolist()
    assert np.all(np.diff(scores) <= 0)
    assert min(k, width, len(right)) <= len(indices) <= k


@given(codes(), st.integers(1, 8))
def test_every_prefix_is_one_of_an_item(codes: Codes, width: int) -> None:
    rows = codes.tokens[1:].tolist()
    search = BeamSearch(CodeTrie(codes.tokens, codes.levels), width)
    while not search.done:
        level = search.level
        existing = {tuple(row[:level]) for row in rows}
        prefixes = [tuple(p) for p in search.prefixes.tolist()]
        assert set(prefixes) <= existing
        assert len(set(prefixes)) == len(prefixes) == min(width, len(existing))
        assert np.all(np.diff(search.scores) <= 0)
        for prefix, tokens in zip(prefixes, search.allowed_by_prefix, strict=True):
            follow = {row[level] for row in rows if tuple(row[:level]) == prefix}
            assert tokens.tolist() == sorted(follow)
        parents, tokens = search.allowed
        log_probs = np.stack([codes.log_probs(p) for p in prefixes])[parents, tokens]
        everything = sorted(
            (-(search.scores[parent] + value), (*prefixes[parent], token))
            for parent, token, value in zip(
                parents.tolist(), tokens.tolist(), log_probs.tolist(), strict=True
            )
        )
        search.advance(log_probs)
        kept = [tuple(p) for p in search.prefixes.tolist()]
        assert kept == [row for _, row in everything[:width]], "the best ones, ties by tokens"


@given(codes())
def test_the_trie_holds_the_catalogue_and_nothing_else(codes: Codes) -> None:
    trie = CodeTrie(codes.tokens, codes.levels)
    found: dict[int, tuple[int, ...]] = {}

    def walk(prefix: tuple[int, ...], node: int) -> None:
        if len(prefix) == trie.depth:
            items = trie.items(node).tolist()
            assert items == sorted(items)
            assert items, "a leaf without items"
            found.update(dict.fromkeys(items, prefix))
            return
        tokens, nodes = trie.children(len(prefix), node)
        assert len(tokens) == len(nodes) > 0
        for token, child in zip(tokens.tolist(), nodes, strict=True):
            walk((*prefix, token), child)

    walk((), 0)
    rows = codes.tokens.tolist()
    assert found == {i: tuple(rows[i]) for i in range(1, len(rows))}
    assert len(trie) == len(rows) - 1
    for depth in range(trie.depth + 1):
        assert trie.nodes(depth) == len({tuple(row[:depth]) for row in rows[1:]})


def test_items_with_the_same_tokens_share_a_score() -> None:
    codes = Codes(np.array([[0, 0], [2, 4], [1, 3], [2, 4], [1, 4]], np.int32), _levels(2, 2))
    indices, scores = searched(codes, 10).finish(10)
    places = [indices.tolist().index(item) for item in (1, 3)]
    assert places[1] == places[0] + 1
    assert scores[places[0]] == scores[places[1]]
    assert sorted(indices.tolist()) == [1, 2, 3, 4]
    cut, _ = searched(codes, 10).finish(places[0] + 1)
    np.testing.assert_array_equal(cut, indices[: places[0] + 1])


def test_scores_keep_their_precision_over_many_levels() -> None:
    """Sums are float64: two items that differ at the last of many levels stay apart."""
    levels = [range(1 + i, 2 + i) for i in range(20)] + [range(21, 23)]
    rows = [[0] * 21, [*range(1, 21), 21], [*range(1, 21), 22]]
    search = BeamSearch(CodeTrie(np.array(rows, np.int32), levels), 2)
    while not search.done:
        values = [-1000.0] if search.level < 20 else [-1e-6 - 1e-9, -1e-6]
        search.advance(np.array(values, np.float32))
    assert search.finish(2)[0].tolist() == [2, 1]


def test_a_large_catalogue_is_compact_and_quick() -> None:
    rng = np.random.default_rng(0)
    levels = _levels(256, 256, 256)
    tokens = np.column_stack([rng.integers(r.start, r.stop, 200_001) for r in levels])
    trie = CodeTrie(tokens.astype(np.int32), levels)
    search = BeamSearch(trie, 50)
    while not search.done:
        search.advance(rng.normal(size=len(search.allowed[0])))
    indices, _ = search.finish(50)
    found = tokens[indices].tolist()
    assert set(map(tuple, found)) == set(map(tuple, search.prefixes.tolist()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 2), np.int32), "no items"),
        (np.ones((3, 1), np.int32), "shape"),
        (np.ones(3, np.int32), "shape"),
        (np.array([[0, 0], [1, 3], [1, 5]], np.int32), "item 2 has the token 5 at level 1"),
        (np.array([[0, 0], [0, 3]], np.int32), "item 1 has the token 0 at level 0"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: Tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeTrie(tokens, _levels(2, 2))


def test_wrong_use_is_refused() -> None:
    trie = CodeTrie(np.array([[0, 0], [1, 3], [2, 4]], np.int32), _levels(2, 2))
    with pytest.raises(ValueError, match="width is 0"):
        BeamSearch(trie, 0)
    search = BeamSearch(trie, 2)
    with pytest.raises(ValueError, match="shape"):
        search.advance([0.0])
    with pytest.raises(ValueError, match="not a number"):
        search.advance([0.0, np.nan])


def test_a_search_is_as_wide_as_asked_for_within_bounds() -> None:
    assert search_width(20, 5) == 20
    assert search_width(20, 50) == 50
    assert search_width(20, 100_000) == MAX_BEAM_WIDTH


def _levels(*sizes: int) -> Sequence[range]:
    ends = np.cumsum([1, *sizes]).tolist()
    return [range(a, b) for a, b in pairwise(ends)]
