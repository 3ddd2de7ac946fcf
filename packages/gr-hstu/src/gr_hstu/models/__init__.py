"""The models: torch modules with plain tensor inputs."""

from __future__ import annotations

from gr_hstu.models.candidates import score_in_chunks
from gr_hstu.models.mtgr import MTGR, MTGRState
from gr_hstu.models.ranking import HSTURanking, HSTUState
from gr_hstu.models.retrieval import HSTURetrieval

__all__ = [
    "MTGR",
    "HSTURanking",
    "HSTURetrieval",
    "HSTUState",
    "MTGRState",
    "score_in_chunks",
]
