"""The models: torch modules with plain tensor inputs."""

from __future__ import annotations

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.models.candidates import score_in_chunks
from gr_hstu.models.mtgr import MTGR, MTGRState
from gr_hstu.models.ranking import HSTURanking, HSTUState
from gr_hstu.models.retrieval import HSTURetrieval


def build_model(config: HSTUConfig | MTGRConfig) -> HSTURetrieval | HSTURanking | MTGR:
    """The model that a configuration describes, with random weights."""
    if isinstance(config, MTGRConfig):
        return MTGR(config)
    return HSTURetrieval(config) if config.variant == "research" else HSTURanking(config)


__all__ = [
    "MTGR",
    "HSTURanking",
    "HSTURetrieval",
    "HSTUState",
    "MTGRState",
    "build_model",
    "score_in_chunks",
]
