"""Models whose tokens are sums of table rows: for engines that embed and read out themselves.

`gr_core.stack` opens a model's layers to engines that get the tokens embedded. A `TokenModel` opens
the two ends too, so that an engine can go from ids to scores without the model, and can append
tokens that it has chosen itself.

Shapes: N tokens of a history, W ids of a token, D model width, V rows of a table, P places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gr_core.contracts import EncodedRequest
from gr_core.stack import StackModel, TokenSequence
from gr_core.types import IntArray

Norm = Literal["none", "l2", "layer"]
"""x; x / max(|x|, eps); (x - mean) / sqrt(variance + eps)."""


@dataclass(frozen=True, slots=True)
class TokenTables:
    """The stack's input for token i: the sum over w of tables[w][ids[i, w]], and places[i]."""

    tables: tuple[Any, ...]
    """W float32 torch tensors (V_w, D) on the CPU, scales multiplied in."""
    places: Any | None
    """(P, D), or None where places are not embedded."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Scores of what may follow: table · norm(x), x being the stack's output for the last token."""

    table: Any
    """(V, D) float32 torch tensor on the CPU. Row 0 stands for nothing that may follow."""
    norm: Norm
    eps: float


@runtime_checkable
class TokenModel(StackModel, Protocol):
    """A model that opens both ends of its stack. All methods are thread-safe.

    A token sees all tokens before it, and none behind. `token_tables` and `readout` raise
    `PlanError` where the model's tokens or answers are made in another way.
    """

    def token_tables(self) -> TokenTables: ...

    def readout(self) -> Readout:
        """For `Task.RETRIEVE`, V is the catalogue's size + 1; for `Task.GENERATE`, all tokens."""
        ...

    def token_ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        """Ids of a history's tokens, (N, W)."""
        ...

    def answer_ids(self, request: EncodedRequest) -> IntArray:
        """Rows of the readout's table that score the candidates of a request to rank, (C,)."""
        ...
