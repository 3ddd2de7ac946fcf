"""The models are one graph for all batch sizes, history lengths and numbers of candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.models import build_model

FEATURES: dict[str, Any] = {
    "num_items": 20,
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 16,
    "signal_cardinalities": (4,),
    "user_cardinalities": (4,),
    "context_cardinalities": (4,),
    "item_cardinalities": (4,),
    "candidate_cardinalities": (4,),
    "mlp_dim": 8,
}
CONFIGS = {
    "research": HSTUConfig(variant="research", d_qk=4, d_v=4, **FEATURES),
    "ranking": HSTUConfig(variant="ranking", d_qk=4, d_v=4, heads=("a", "b"), **FEATURES),
    "mtgr": MTGRConfig(heads=("a", "b"), embedding_dim=4, time_buckets=8, **FEATURES),
}
# Names of the dynamic axes: batch, history, candidates.
AXES = {
    "history_items": "bl",
    "history_timestamps": "bl",
    "history_lengths": "b",
    "request_time": "b",
    "history_signals": "bl",
    "user_features": "b",
    "context_features": "b",
    "candidate_items": "bc",
    "candidate_features": "bc",
    "candidate_counts": "b",
    "realtime_counts": "b",
}
COLUMNS = ("history_signals", "user_features", "context_features", "candidate_features")


def inputs_of(config: HSTUConfig | MTGRConfig, **sizes: int) -> dict[str, Tensor]:
    names = list(AXES)[:5] if not config.heads else list(AXES)
    if not isinstance(config, MTGRConfig):
        names = [name for name in names if name != "realtime_counts"]
    g = torch.Generator().manual_seed(sum(sizes.values()))
    inputs = {}
    for name in names:
        shape = [sizes[axis] for axis in AXES[name]] + [1] * (name in COLUMNS)
        inputs[name] = torch.randint(0, 4, shape, generator=g)
    inputs["history_timestamps"] = inputs["history_timestamps"].cumsum(1) * 1000
    inputs["history_lengths"] = inputs["history_lengths"].clamp(max=sizes["l"])
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_all_sizes(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = build_model(config).eval()
    inputs = inputs_of(config, b=3, l=5, c=4)
    dynamic = {key: dict.fromkeys(range(len(AXES[key])), Dim.DYNAMIC) for key in inputs}
    graph = export(model, (), kwargs=inputs, dynamic_shapes=dynamic).module()
    for sizes in ((3, 5, 4), (1, 1, 1), (2, 9, 1), (5, 2, 7)):
        other = inputs_of(config, **dict(zip("blc", sizes, strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(graph(**other), model(**other))
