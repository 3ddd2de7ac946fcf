"""Small models of every configuration with random weights, opened, and requests for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gr_core import Task
from gr_core.contracts import EncodedRequest
from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.jagged import jagged, stack_of
from gr_hstu.models import HSTURetrieval
from gr_hstu.testing import random_module

Config = HSTUConfig | MTGRConfig
Arrays = dict[str, Any]
ITEMS = 12

CARDINALITIES = st.lists(st.integers(2, 4), max_size=2).map(tuple)
COMMON: dict[str, Any] = {
    "num_items": st.just(ITEMS),
    "num_layers": st.integers(1, 3),
    "num_heads": st.sampled_from([1, 2]),
    "max_seq_len": st.sampled_from([16, 24]),
    "signal_cardinalities": CARDINALITIES,
}
FEATURES: dict[str, Any] = {
    "user_cardinalities": CARDINALITIES,
    "context_cardinalities": CARDINALITIES,
    "item_cardinalities": CARDINALITIES,
    "candidate_cardinalities": CARDINALITIES,
    "context_placement": st.sampled_from(["prefix", "candidate"]),
    "heads": st.sampled_from([("a",), ("a", "b")]),
    "mlp_dim": st.sampled_from([8, 32, 40]),
}
RESEARCH = st.builds(
    HSTUConfig,
    variant=st.just("research"),
    d_model=st.just(8),
    d_qk=st.just(3),
    d_v=st.just(4),
    projection_activation=st.sampled_from(["silu", "none"]),
    relative_bias=st.booleans(),
    time_bias_buckets=st.sampled_from([5, 128]),
    concat_ua=st.booleans(),
    user_norm=st.sampled_from(["l2", "layer_norm"]),
    item_l2_norm=st.booleans(),
    alpha=st.sampled_from([None, 0.5]),
    **COMMON,
)
RANKING = st.builds(
    HSTUConfig,
    variant=st.just("ranking"),
    d_model=st.just(8),
    d_qk=st.just(4),
    d_v=st.just(3),
    alpha=st.sampled_from([None, 0.9]),
    group_norm=st.booleans(),
    max_attn_len=st.sampled_from([0, 0, 1, 2, 3, 5]),
    contextual_mask=st.booleans(),
    position_buckets=st.sampled_from([0, 7, 64]),
    position_from=st.sampled_from(["start", "end"]),
    time_buckets=st.sampled_from([0, 6, 2048]),
    time_from=st.sampled_from(["previous", "request"]),
    **COMMON,
    **FEATURES,
)
MTGRS = st.builds(
    MTGRConfig,
    d_model=st.just(8),
    embedding_dim=st.just(4),
    position_buckets=st.sampled_from([0, 5, 64]),
    time_buckets=st.sampled_from([0, 300]),
    **COMMON,
    **FEATURES,
)
ANY = st.one_of(RESEARCH, RANKING, MTGRS)
# Behaviours and candidates of a request, and how many behaviours are in real time.
SIZES = st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(0, 9))


class Opened:
    """A module with random weights, and itself without padding."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.config = config
        module = random_module(config, seed).eval().requires_grad_(False)
        if not isinstance(module, HSTURetrieval):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                module.item_features.random_(0, 2)
        self.module = module
        self.stack = stack_of(module)
        self.jagged = jagged(module)
        self.task = Task.RETRIEVE if isinstance(module, HSTURetrieval) else Task.RANK

    def request(self, rng: np.random.Generator, sizes: tuple[int, int, int]) -> EncodedRequest:
        """Behaviours seconds to weeks apart, many at the same time."""
        length, candidates, realtime = sizes
        config = self.config
        gaps = rng.choice([0, 0, 1, 50, 4000, 10**6], length)
        times = 1_700_000_000 + np.cumsum(gaps).astype(np.int64)
        end = int(times[-1]) if length else 1_700_000_000
        arrays: Arrays = {
            "history_items": rng.integers(1, ITEMS + 1, length),
            "history_timestamps": times,
            "history_lengths": np.array(length),
            "request_time": np.array(end + rng.choice([-1, 0, 1, 3000])),
            "history_signals": columns(rng, config.signal_cardinalities, length),
            "candidate_items": rng.integers(1, ITEMS + 1, candidates),
        }
        if self.task is Task.RANK:
            arrays |= {
                "user_features": columns(rng, config.user_cardinalities),
                "context_features": columns(rng, config.context_cardinalities),
                "candidate_features": columns(rng, config.candidate_cardinalities, candidates),
                "candidate_counts": np.array(candidates),
            }
        if isinstance(config, MTGRConfig):
            arrays["realtime_counts"] = np.array(min(realtime, length))
        return EncodedRequest(self.task, arrays, length)

    def expected(self, request: EncodedRequest) -> Tensor:
        arrays = dict(request.arrays)
        if self.task is Task.RETRIEVE:
            del arrays["candidate_items"]
        with torch.no_grad():
            return self.module(**{n: torch.from_numpy(a[None]) for n, a in arrays.items()})[0]


def columns(rng: np.random.Generator, cardinalities: Sequence[int], *rows: int) -> np.ndarray:
    return rng.integers(0, 2, (*rows, len(cardinalities)))
