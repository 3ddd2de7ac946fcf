"""Bundles of HSTU rankers with random weights, of any size, whose K and V can be reused."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.types import Task
from gr_hstu.config import HSTUConfig
from gr_hstu.features import Feature, FeatureSchema
from gr_hstu.models import build_model
from gr_hstu.stability import prefix_stability

HEADS = ("recommendation", "engagement", "retention")
FIRST_ID = 1_000
_TENTHS = tuple(i / 10 for i in range(1, 10))


def write_ranker(
    folder: Path,
    name: str,
    *,
    layers: int,
    width: int,
    heads: int,
    head_width: int,
    items: int,
    max_history: int,
    seed: int = 0,
) -> Bundle:
    """Writes ``folder/name/1``: context beside the candidates, positions from the start, times
    relative to earlier behaviours, so that a history that grows keeps its K and V."""
    schema = FeatureSchema(
        signals=(
            Feature("is_long_view", "binary"),
            Feature("is_liked", "binary"),
            Feature("is_clicked", "binary"),
            Feature("watch_percentage", "bucket", boundaries=_TENTHS),
        ),
        context=(Feature("hour", "categorical", values=tuple(map(str, range(24)))),),
        max_history=max_history,
    )
    config = HSTUConfig(
        variant="ranking",
        num_items=items,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_qk=head_width,
        d_v=head_width,
        max_seq_len=max_history,
        context_placement="candidate",
        position_from="start",
        time_from="previous",
        signal_cardinalities=tuple(feature.cardinality for feature in schema.signals),
        context_cardinalities=tuple(feature.cardinality for feature in schema.context),
        heads=HEADS,
    )
    assert prefix_stability(config).reusable == "growing"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = build_model(config).state_dict()
    return write_bundle(
        folder / name / "1",
        name=name,
        version="1",
        architecture="hstu",
        tasks=(Task.RANK,),
        config=config.to_dict(),
        catalogue=Catalogue(
            list(range(FIRST_ID, FIRST_ID + items)), [f"Video {i}" for i in range(items)]
        ),
        weights=lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path),
        features=schema.to_dict(),
        description="random weights, for benchmarks",
    )
