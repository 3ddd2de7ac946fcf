"""Generating semantic ids: items named by a few codes, decoded one after another (TIGER).

Shapes: I items, L levels (codes of an item), V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gr_core.tokens import TokenModel


@runtime_checkable
class GenerativeModel(TokenModel, Protocol):
    """A model that predicts an item's codes, the first from the history, each next from those too.

    Its histories are tokens of one id, never none: a first one, then L of each behaviour. An
    item's score is the sum over its levels of the log-probability of its token, by the softmax of
    `readout` over all tokens of that level, given the history and the tokens of its levels before.
    """

    def item_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of the items, (I + 1, L), level by level; row 0 is padding. Several items may
        have the same tokens, and then have the same score."""
        ...

    @property
    def levels(self) -> Sequence[range]:
        """The tokens of each level, L ranges that do not overlap."""
        ...
