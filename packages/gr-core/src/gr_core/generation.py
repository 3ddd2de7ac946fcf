"""Generating semantic ids: items named by a few codes, decoded one after another (TIGER).

A `CodeTrie` knows which codes are followed by which, so a `BeamSearch` only ever holds prefixes of
items. Both are plain arrays: whoever has the log-probabilities of tokens can search.

Shapes: I items, L levels (codes of an item), V tokens of the vocabulary, B prefixes, E extensions
of all prefixes by one token, K items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from gr_core.tokens import TokenModel
from gr_core.types import FloatArray, IntArray

Tokens: TypeAlias = npt.NDArray[np.int32]

MAX_BEAM_WIDTH = 1024
"""Prefixes that a search holds at most, however many items are asked for."""


@runtime_checkable
class GenerativeModel(TokenModel, Protocol):
    """A model that predicts an item's codes, the first from the history, each next from those too.

    Its histories are tokens of one id, never none: a first one, then L of each behaviour. An
    item's score is the sum over its levels of the log-probability of its token, by the softmax of
    `readout` over all tokens of that level, given the history and the tokens of its levels before.
    """

    def item_tokens(self) -> Tokens:
        """Tokens of the items, (I + 1, L), level by level; row 0 is padding. Several items may
        have the same tokens, and then have the same score."""
        ...

    @property
    def levels(self) -> Sequence[range]:
        """The tokens of each level, L ranges that do not overlap."""
        ...

    @property
    def beam_width(self) -> int:
        """Prefixes to search with, see `search_width`."""
        ...


def search_width(beam_width: int, k: int) -> int:
    """The width of a search for k items: at least so many, and never more than the maximum.

    With a width of at least k a search finds k items if there are so many, see `BeamSearch`.
    """
    return min(max(beam_width, k), MAX_BEAM_WIDTH)


class CodeTrie:
    """The items' tokens as a tree: a node of depth d is a prefix of d tokens that some item has.

    Nodes of a depth are numbered in the order of their tokens, so that the children of a node are
    consecutive, and so are the items below it. Thread-safe: nothing changes once it is made.
    """

    def __init__(self, item_tokens: Tokens, levels: Sequence[range]) -> None:
        """``item_tokens`` and ``levels`` as those of a `GenerativeModel`; ValueError if they do
        not fit together."""
        tokens_IL = _checked(item_tokens, levels)
        items = len(tokens_IL)
        # By tokens, items with the same ones by index.
        order = np.lexsort(tokens_IL.T[::-1])
        sorted_IL = tokens_IL[order]
        self.depth: int = tokens_IL.shape[1]
        self._items = (order + 1).astype(np.int64)
        self._tokens: list[Tokens] = []
        self._children: list[IntArray] = []
        starts = np.zeros(1, np.int64)  # of the nodes of a depth among the sorted items
        new_I = np.zeros(items, np.bool_)
        new_I[0] = True
        for level in range(self.depth):
            new_I[1:] |= sorted_IL[1:, level] != sorted_IL[:-1, level]
            (below,) = new_I.nonzero()
            self._children.append(np.append(np.searchsorted(below, starts), len(below)))
            self._tokens.append(sorted_IL[below, level])
            starts = below
        self._leaves = np.append(starts, items)

    def __len__(self) -> int:
        """The number of items."""
        return len(self._items)

    def nodes(self, depth: int) -> int:
        """How many different prefixes of ``depth`` tokens there are."""
        return 1 if depth == 0 else len(self._tokens[depth - 1])

    def children(self, depth: int, node: int) -> tuple[Tokens, range]:
        """The tokens that may follow a node, ascending, and the nodes that they lead to."""
        start, end = self._children[depth][node : node + 2].tolist()
        return self._tokens[depth][start:end], range(start, end)

    def extensions(self, depth: int, nodes_B: IntArray) -> tuple[IntArray, IntArray, Tokens]:
        """All children of nodes, node after node: whose (E,), which (E,), by what token (E,)."""
        start_B = self._children[depth][nodes_B]
        count_B = self._children[depth][nodes_B + 1] - start_B
        parent_E = np.repeat(np.arange(len(nodes_B)), count_B)
        first_B = np.cumsum(count_B) - count_B
        child_E = np.arange(len(parent_E)) + (start_B - first_B)[parent_E]
        return parent_E, child_E, self._tokens[depth][child_E]

    def items(self, leaf: int) -> IntArray:
        """Catalogue indices of the items of a node of the last depth, ascending."""
        return self._items[self._leaves[leaf] : self._leaves[leaf + 1]]


class BeamSearch:
    """The best items by the sum of their tokens' log-probabilities, a level at a time.

    As long as it is not `done`: compute the log-probabilities of `allowed` tokens, given `prefixes`
    behind the history, and `advance` with them. It then keeps the ``width`` best prefixes, equal
    ones in the order of their tokens, so the same numbers always give the same items. No prefix is
    ever held that no item has. A width of at least the number of prefixes searches all items; any
    width w finds the items of min(w, all) different leaves, for each prefix has one below it.
    """

    def __init__(self, trie: CodeTrie, width: int) -> None:
        if width < 1:
            raise ValueError(f"width is {width}, expected at least 1")
        self._trie, self._width = trie, width
        self._prefixes_BL: Tokens = np.empty((1, 0), np.int32)
        self._nodes_B: IntArray = np.zeros(1, np.int64)
        self._scores_B: npt.NDArray[np.float64] = np.zeros(1)
        self._extend()

    def _extend(self) -> None:
        if not self.done:
            self._extensions = self._trie.extensions(self.level, self._nodes_B)

    @property
    def level(self) -> int:
        """How many tokens the prefixes have: the level of the tokens that come next."""
        level: int = self._prefixes_BL.shape[1]
        return level

    @property
    def done(self) -> bool:
        """Whether the prefixes are whole items."""
        return self.level == self._trie.depth

    @property
    def prefixes(self) -> Tokens:
        """The kept prefixes, (B, level), best first; at first one without tokens."""
        return self._prefixes_BL

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Log-probabilities of the prefixes, (B,)."""
        return self._scores_B

    @property
    def allowed(self) -> tuple[IntArray, Tokens]:
        """All that may come next: places among `prefixes` (E,), ascending, and tokens (E,).

        Tokens of a prefix ascend. Before it is `done`.
        """
        assert not self.done, "the prefixes are whole items; nothing follows"
        parent_E, _, token_E = self._extensions
        return parent_E, token_E

    @property
    def allowed_by_prefix(self) -> Sequence[Tokens]:
        """The tokens of `allowed`, an array for each prefix."""
        parent_E, token_E = self.allowed
        cuts = np.searchsorted(parent_E, np.arange(1, len(self._nodes_B)))
        return np.split(token_E, cuts)

    def advance(self, log_probs: npt.ArrayLike) -> None:
        """Goes a level on, with log-probabilities (E,) of `allowed`; ValueError if one is NaN."""
        assert not self.done, "the prefixes are whole items; nothing follows"
        parent_E, child_E, token_E = self._extensions
        log_prob_E = np.asarray(log_probs, np.float64)
        if log_prob_E.shape != parent_E.shape:
            raise ValueError(
                f"log_probs has the shape {log_prob_E.shape}, expected {parent_E.shape}: one for "
                "each allowed token"
            )
        if np.isnan(log_prob_E).any():
            raise ValueError("log_probs: one of them is not a number")
        score_E = self._scores_B[parent_E] + log_prob_E
        best_B = self._best(score_E, child_E)
        self._prefixes_BL = np.column_stack(
            [self._prefixes_BL[parent_E[best_B]], token_E[best_B]]
        ).astype(np.int32)
        self._nodes_B, self._scores_B = child_E[best_B], score_E[best_B]
        self._extend()

    def _best(self, score_E: npt.NDArray[np.float64], child_E: IntArray) -> IntArray:
        """Places of those to keep, best first."""
        if len(score_E) > self._width:
            least = np.partition(score_E, -self._width)[-self._width]
            (places,) = (score_E >= least).nonzero()  # all that are as good as the last
        else:
            places = np.arange(len(score_E))
        # Nodes are numbered in the order of their tokens.
        order = np.lexsort((child_E[places], -score_E[places]))
        kept: IntArray = places[order[: self._width]]
        return kept

    def finish(self, k: int) -> tuple[IntArray, FloatArray]:
        """Catalogue indices (≤ k,) int64, best first, and their scores (≤ k,) float32.

        No item occurs twice. Items with the same tokens have the same score and come by index.
        """
        assert self.done, f"the prefixes have {self.level} of {self._trie.depth} tokens"
        found: list[IntArray] = []
        counts: list[int] = []
        total = 0
        for leaf in self._nodes_B.tolist():
            if total >= k:
                break
            items = self._trie.items(leaf)[: k - total]
            found.append(items)
            counts.append(len(items))
            total += len(items)
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        scores = np.repeat(self._scores_B[: len(counts)], counts).astype(np.float32)
        return np.concatenate(found), scores


def _checked(item_tokens: Tokens, levels: Sequence[range]) -> Tokens:
    """The rows of items, (I, L), without padding's."""
    if item_tokens.ndim != 2 or item_tokens.shape[1] != len(levels) or not levels:
        raise ValueError(
            f"item_tokens has the shape {item_tokens.shape}, expected (items + 1, {len(levels)}): "
            "a token for each of at least one level"
        )
    tokens_IL = item_tokens[1:]
    if not len(tokens_IL):
        raise ValueError("item_tokens has no items, expected at least one")
    for number, level in enumerate(levels):
        column = tokens_IL[:, number]
        (wrong,) = ((column < level.start) | (column >= level.stop)).nonzero()
        if len(wrong):
            item = int(wrong[0])
            raise ValueError(
                f"item_tokens: item {item + 1} has the token {column[item]} at level {number}, "
                f"expected {level.start} to {level.stop - 1}"
            )
    return tokens_IL.astype(np.int32)
