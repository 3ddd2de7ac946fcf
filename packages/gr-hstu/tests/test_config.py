"""Configurations: JSON in and out, and messages that name the field, the value and the remedy."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.presets import PRESETS

HSTU: dict[str, Any] = {
    "variant": "ranking",
    "num_items": 10,
    "d_model": 8,
    "num_layers": 1,
    "num_heads": 2,
    "d_qk": 4,
    "d_v": 4,
    "max_seq_len": 16,
}
MTGR: dict[str, Any] = {
    "num_items": 10,
    "d_model": 8,
    "num_layers": 1,
    "num_heads": 2,
    "max_seq_len": 16,
    "heads": ["click"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = PRESETS[name].config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults() -> None:
    ranking = HSTUConfig.from_dict(HSTU)
    assert ranking.scale == 0.5
    assert ranking.divisor == 16
    assert HSTUConfig.from_dict({**HSTU, "variant": "research"}).scale == 1.0
    assert HSTUConfig.from_dict({**HSTU, "alpha": 2}).scale == 2
    assert MTGRConfig.from_dict(MTGR).qk_dim == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "HSTUConfig has no field 'd_modle'; its fields are variant, num_items"),
        ({"variant": "dlrm"}, "variant is 'dlrm'; expected one of 'research', 'ranking'"),
        ({"d_model": "8"}, "d_model is '8'; expected int"),
        ({"d_model": True}, "d_model is True; expected int"),
        ({"d_model": 0}, "d_model is 0; expected at least 1"),
        ({"alpha": "x"}, "alpha is 'x'; expected float or null"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a number in"),
        ({"signal_cardinalities": [3, "4"]}, "expected a list of int"),
        ({"signal_cardinalities": [3, 0]}, "expected cardinalities of at least 1"),
        ({"heads": ["a", "a"]}, "expected unique, non-empty names"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; expected more than 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected more than 0"),
        ({"attention_activation": "softmax"}, "expected 'silu' in the ranking variant"),
        (
            {"user_cardinalities": [2, 2], "position_buckets": 2},
            "position_buckets is 2; expected more than the 2 prefix tokens",
        ),
    ],
)
def test_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTUConfig.from_dict({**HSTU, **change})


def test_missing_fields_and_mtgr() -> None:
    with pytest.raises(ValueError, match="lacks the required 'd_qk', 'd_v'"):
        HSTUConfig.from_dict({k: v for k, v in HSTU.items() if k not in ("d_qk", "d_v")})
    with pytest.raises(ValueError, match=r"heads is .*; expected at least one head"):
        MTGRConfig.from_dict({**MTGR, "heads": []})
    with pytest.raises(ValueError, match="d_model is 9; expected a multiple of num_heads 2"):
        MTGRConfig.from_dict({**MTGR, "d_model": 9})


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HSTUConfig.from_dict(HSTU).d_model = 3  # type: ignore[misc]
