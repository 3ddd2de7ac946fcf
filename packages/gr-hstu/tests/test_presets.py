"""Presets have the size that their name states, and run."""

from __future__ import annotations

import pytest
import torch

from gr_hstu.config import MTGRConfig
from gr_hstu.models import build_model
from gr_hstu.modules.skeleton import skeleton
from gr_hstu.presets import PRESETS, count_parameters, get_preset, scaled

BILLION = 1_000_000_000


@pytest.mark.parametrize(("name", "billions"), [("small", 2), ("base", 4), ("large", 8)])
def test_mtgr_presets_have_the_parameters_of_their_name(name: str, billions: int) -> None:
    count = count_parameters(f"mtgr-{name}")
    assert count.total == pytest.approx(billions * BILLION, rel=0.05)
    assert count.dense > 0.01 * count.total
    assert count.tables[0][0] == "items"
    assert sum(rows * width for _, rows, width in count.tables) == count.embedding


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"), [("small", 3, 512, 2), ("large", 15, 768, 3)]
)
def test_the_papers_mtgr(name: str, layers: int, width: int, heads: int) -> None:
    config = get_preset(f"mtgr-paper-{name}").config
    assert (config.num_layers, config.d_model, config.num_heads) == (layers, width, heads)


def test_counts_by_hand() -> None:
    """HSTU-large on ML-1M: 3953 items, 211 positions, and per block the weights and the bias."""
    count = count_parameters("hstu-large-ml-1m")
    block = 50 * 200 + (50 * 50 + 50) + (2 * 211 - 1) + 129
    assert count.dense == 8 * block
    assert count.embedding == 3953 * 50 + 211 * 50
    # d 512: 4 projections of 512 x 512 with bias, 3 x 512 -> 512, norms.
    dlrm = count_parameters("dlrmv3")
    layer = 512 * 2048 + 2048 + 1536 * 512 + 2 * 512 + 2 * 4
    assert dlrm.dense > 5 * layer
    assert dlrm.dense < 5 * layer + 4 * 512 * 512 + 20_000


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_with_a_small_vocabulary(name: str) -> None:
    config = scaled(name, vocabulary=100)
    assert config.d_model == get_preset(name).config.d_model
    assert max(table[1] for table in count_parameters(config).tables if "items" in table[0]) <= 101
    model = build_model(config).eval()
    inputs = {
        "history_items": torch.randint(1, 100, (1, 5)),
        "history_timestamps": torch.arange(5)[None],
        "history_lengths": torch.tensor([5]),
        "request_time": torch.tensor([9]),
        "history_signals": torch.zeros(1, 5, len(config.signal_cardinalities), dtype=torch.int64),
    }
    if config.heads:
        inputs |= {
            "user_features": torch.zeros(1, len(config.user_cardinalities), dtype=torch.int64),
            "context_features": torch.zeros(
                1, len(config.context_cardinalities), dtype=torch.int64
            ),
            "candidate_items": torch.randint(1, 100, (1, 3)),
            "candidate_features": torch.zeros(
                1, 3, len(config.candidate_cardinalities), dtype=torch.int64
            ),
            "candidate_counts": torch.tensor([3]),
        }
    if isinstance(config, MTGRConfig):
        inputs["realtime_counts"] = torch.tensor([2])
    with torch.no_grad():
        out = model(**inputs)
    assert out.shape == ((1, 3, len(config.heads)) if config.heads else (1, config.d_model))
    assert bool(torch.isfinite(out).all())
    assert float(out.abs().max()) > 0


def test_skeletons_hold_no_memory_and_take_weights() -> None:
    config = scaled("hstu-ml-1m", vocabulary=50)
    weights = build_model(config).state_dict()
    with skeleton():
        model = build_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.load_state_dict(weights, assign=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_messages() -> None:
    with pytest.raises(ValueError, match="no preset 'mtgr-huge'; there are hstu-ml-1m"):
        get_preset("mtgr-huge")
    with pytest.raises(ValueError, match="vocabulary is 0"):
        scaled("mtgr-small", vocabulary=0)
