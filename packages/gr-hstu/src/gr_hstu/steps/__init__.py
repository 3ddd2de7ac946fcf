"""The models in steps, as modules that a compiler can take (gr_core.steps).

The ids of a token are those that its K and V are cached by, see `gr_hstu.jagged`; who sees whom are
intervals of places, and the layers are the models' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.steps import Step
from gr_core.types import Task
from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval
from gr_hstu.steps.mtgr import MTGRSteps
from gr_hstu.steps.ranking import RankingSteps
from gr_hstu.steps.retrieval import RetrievalSteps


class Steps(Protocol):
    """What `gr_core.steps.SteppedModel` asks for, of one module."""

    def prefill(self, task: Task) -> Step: ...

    def decode(self, task: Task) -> Step: ...

    def arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]: ...


def steps_of(module: HSTURetrieval | HSTURanking | MTGR) -> Steps:
    """The module in steps; it shares the weights and must not change any more."""
    if isinstance(module, HSTURetrieval):
        return RetrievalSteps(module)
    return MTGRSteps(module) if isinstance(module, MTGR) else RankingSteps(module)


__all__ = ["Steps", "steps_of"]
