"""Named sizes: the papers' models, and MTGR at 2, 4 and 8 billion parameters.

A recommender's size is mostly its embedding tables, so a count is always given in two parts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.models import build_model
from gr_hstu.modules.skeleton import skeleton


@dataclass(frozen=True)
class Preset:
    """A configuration with a name."""

    name: str
    config: HSTUConfig | MTGRConfig
    description: str


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and where."""

    dense: int
    embedding: int
    """All tables that are looked up by an id, a position or a time bucket."""
    tables: tuple[tuple[str, int, int], ...]
    """Name, rows and width of each table, the largest first."""

    @property
    def total(self) -> int:
        return self.dense + self.embedding


HEADS = ("recommendation", "engagement", "retention", "monetization")

# The largest tables of an industrial catalogue; the rest is small.
_ITEMS = 20_000_000
_USERS = 10_000_000
_AUTHORS = 500_000


def _mtgr(num_layers: int, d_model: int, num_heads: int, embedding_dim: int) -> MTGRConfig:
    """An industrial MTGR: S up to 1000, R up to 100, candidates with cross features."""
    return MTGRConfig(
        num_items=_ITEMS,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=2048,
        heads=HEADS,
        embedding_dim=embedding_dim,
        mlp_dim=4 * d_model,
        signal_cardinalities=(12, 12, 3, 3, 3),
        user_cardinalities=(_USERS, 5_000, 12, 4, 64),
        context_cardinalities=(25, 8, 512),
        item_cardinalities=(_AUTHORS, 2_000, 64),
        candidate_cardinalities=(64,) * 16,
    )


def _research(
    num_items: int, d_model: int, num_layers: int, num_heads: int, length: int, dropout: float
) -> HSTUConfig:
    """The published configurations: heads divide the width, 11 positions beyond the history."""
    return HSTUConfig(
        variant="research",
        num_items=num_items,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_qk=d_model // num_heads,
        d_v=d_model // num_heads,
        max_seq_len=length + 11,
        dropout=dropout,
        input_dropout=dropout,
    )


_DLRMV3 = HSTUConfig(
    variant="ranking",
    num_items=10_000_000,
    d_model=512,
    num_layers=5,
    num_heads=4,
    d_qk=128,
    d_v=128,
    max_seq_len=16_384,
    group_norm=True,
    dropout=0.1,
    input_dropout=0.2,
    position_from="end",
    time_from="request",
    signal_cardinalities=(2,) * 8,
    user_cardinalities=(10_000_000, 8, 9, 9, 8, 8),
    heads=("recommendation",),
)

_PAPER = "HSTU, arXiv 2402.17152, and its public configuration: "
_MTGR = "MTGR, arXiv 2505.18654"
_TABLES = "tables, which the paper does not state, of 30.5 million rows of 64"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("hstu-ml-1m", _research(3_952, 50, 2, 1, 200, 0.2), _PAPER + "HSTU on ML-1M"),
        Preset(
            "hstu-large-ml-1m", _research(3_952, 50, 8, 2, 200, 0.2), _PAPER + "HSTU-large on ML-1M"
        ),
        Preset("hstu-ml-20m", _research(131_262, 256, 4, 4, 200, 0.2), _PAPER + "HSTU on ML-20M"),
        Preset(
            "hstu-large-ml-20m",
            _research(131_262, 256, 16, 8, 200, 0.2),
            _PAPER + "HSTU-large on ML-20M",
        ),
        Preset(
            "hstu-amzn-books",
            _research(695_762, 64, 4, 4, 50, 0.5),
            _PAPER + "HSTU on Amazon Books",
        ),
        Preset(
            "hstu-large-amzn-books",
            _research(695_762, 64, 16, 8, 50, 0.5),
            _PAPER + "HSTU-large on Amazon Books",
        ),
        Preset(
            "dlrmv3",
            _DLRMV3,
            "the dense stack of MLPerf DLRMv3 (5 layers, d 512, 4 heads of 128), tables of "
            "10 million hashed rows",
        ),
        Preset("mtgr-paper-small", _mtgr(3, 512, 2, 64), f"{_MTGR}: small; {_TABLES}"),
        Preset("mtgr-paper-medium", _mtgr(5, 768, 3, 64), f"{_MTGR}: medium; {_TABLES}"),
        Preset("mtgr-paper-large", _mtgr(15, 768, 3, 64), f"{_MTGR}: large; {_TABLES}"),
        Preset(
            "mtgr-small",
            _mtgr(12, 768, 6, 64),
            f"{_MTGR}, 2 billion parameters: tables of 30.5 million rows of 64",
        ),
        Preset(
            "mtgr-base",
            _mtgr(16, 1024, 8, 128),
            f"{_MTGR}, 4 billion parameters: tables of 30.5 million rows of 128",
        ),
        Preset(
            "mtgr-large",
            _mtgr(24, 1024, 8, 256),
            f"{_MTGR}, 8 billion parameters: tables of 30.5 million rows of 256",
        ),
    )
}


def get_preset(name: str) -> Preset:
    """Raises ValueError listing the names for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def count_parameters(preset: str | Preset | HSTUConfig | MTGRConfig) -> ParameterCount:
    """Counts by building the model on the meta device, without memory for its weights."""
    with skeleton():
        model = build_model(_config(preset))
    tables = [
        (name.replace(".tables.", "."), module.num_embeddings, module.embedding_dim)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    embedding = sum(rows * width for _, rows, width in tables)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables.sort(key=lambda table: -table[1] * table[2])
    return ParameterCount(total - embedding, embedding, tuple(tables))


def scaled(
    preset: str | Preset | HSTUConfig | MTGRConfig, *, vocabulary: int
) -> HSTUConfig | MTGRConfig:
    """The configuration with no table of more than `vocabulary` rows, to run it for real.

    The dense part is that of the preset. Raises ValueError for a vocabulary below 1.
    """
    if vocabulary < 1:
        raise ValueError(f"vocabulary is {vocabulary}; expected at least 1 row")
    config = _config(preset)

    def at_most(cardinalities: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(rows, vocabulary) for rows in cardinalities)

    return dataclasses.replace(
        config,
        num_items=min(config.num_items, vocabulary),
        signal_cardinalities=at_most(config.signal_cardinalities),
        user_cardinalities=at_most(config.user_cardinalities),
        context_cardinalities=at_most(config.context_cardinalities),
        item_cardinalities=at_most(config.item_cardinalities),
        candidate_cardinalities=at_most(config.candidate_cardinalities),
    )


def _config(preset: str | Preset | HSTUConfig | MTGRConfig) -> HSTUConfig | MTGRConfig:
    if isinstance(preset, str):
        preset = get_preset(preset)
    return preset.config if isinstance(preset, Preset) else preset
