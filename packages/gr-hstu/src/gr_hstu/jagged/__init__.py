"""The models opened: tokens without padding in, a stack of layers, heads out (gr_core.stack).

Rows of ids say what a token is. The embeddings of the history are looked up by the very rows that
K and V are cached by, so two tokens with the same rows cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.types import Task
from gr_hstu.jagged.ends import without_layers
from gr_hstu.jagged.mtgr import JaggedMTGR
from gr_hstu.jagged.ranking import JaggedRanking
from gr_hstu.jagged.retrieval import JaggedRetrieval
from gr_hstu.jagged.weights import stack_of
from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval


class Jagged(Protocol):
    """What `gr_core.stack.StackModel` asks for besides the layers, of one module."""

    def sequence(self, request: EncodedRequest) -> TokenSequence: ...

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor: ...

    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]: ...


def jagged(module: HSTURetrieval | HSTURanking | MTGR) -> Jagged:
    """The module without padding; it shares the weights and must not change any more.

    `Jagged.embed` and `Jagged.outputs` run where the weights are, and start at most one copy to
    that device; sequences are made on the CPU.
    """
    if isinstance(module, HSTURetrieval):
        return JaggedRetrieval(module)
    return JaggedMTGR(module) if isinstance(module, MTGR) else JaggedRanking(module)


__all__ = ["Jagged", "JaggedRetrieval", "jagged", "stack_of", "without_layers"]
