"""What `prefix_stability` declares holds for the K and V, and nothing stronger does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.models import build_model
from gr_hstu.stability import prefix_stability

FEATURES: dict[str, Any] = {
    "num_items": 20,
    "signal_cardinalities": (4,),
    "user_cardinalities": (4, 4),
    "context_cardinalities": (4,),
    "candidate_cardinalities": (4,),
    "heads": ("click",),
    "mlp_dim": 8,
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 16,
}
RANKING = HSTUConfig(variant="ranking", d_qk=4, d_v=4, **FEATURES)
RESEARCH = dataclasses.replace(RANKING, variant="research", heads=())
LENGTH, PREFIX = 9, 3

HSTU_CONFIGS = {
    "growing": (RANKING, "growing"),
    "candidate-context": (dataclasses.replace(RANKING, context_placement="candidate"), "growing"),
    "no-features": (
        dataclasses.replace(RANKING, user_cardinalities=(), context_cardinalities=()),
        "growing",
    ),
    "window": (dataclasses.replace(RANKING, max_attn_len=3), "growing"),
    "contextual": (dataclasses.replace(RANKING, contextual_mask=True), "unchanged"),
    "from-end": (dataclasses.replace(RANKING, position_from="end"), "unchanged"),
    "until-request": (dataclasses.replace(RANKING, time_from="request"), "unchanged"),
    "research": (RESEARCH, "growing"),
    "research-no-bias": (dataclasses.replace(RESEARCH, relative_bias=False), "growing"),
}


def inputs_of(config: HSTUConfig | MTGRConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 4, shape, generator=g)

    inputs = {
        "history_items": torch.randint(1, 21, (1, LENGTH), generator=g),
        "history_timestamps": torch.randint(1, 10**5, (1, LENGTH), generator=g).cumsum(1),
        "history_lengths": torch.tensor([LENGTH]),
        "request_time": torch.tensor([10**6 + 10**5]),
        "history_signals": ids(1, LENGTH, 1),
    }
    if config.heads:
        inputs |= {
            "user_features": ids(1, 2),
            "context_features": ids(1, 1),
            "candidate_items": torch.randint(1, 21, (1, 3), generator=g),
            "candidate_features": ids(1, 3, 1),
            "candidate_counts": torch.tensor([3]),
        }
    if isinstance(config, MTGRConfig):
        inputs["realtime_counts"] = torch.tensor([3])
    return inputs


def shorter(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same request when only `count` behaviours had happened; asked when the next one does."""
    cut = {
        name: inputs[name][:, :count]
        for name in inputs
        if name.startswith("history_") and name != "history_lengths"
    }
    request = inputs["history_timestamps"][:, count]
    return {**inputs, **cut, "history_lengths": torch.tensor([count]), "request_time": request}


class Recorded:
    """A model with large weights, and the K and V of its prefix and history."""

    def __init__(self, config: HSTUConfig | MTGRConfig) -> None:
        torch.manual_seed(0)
        self.model = build_model(config).eval()
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.prefix = config.num_prefix_tokens if config.heads else 0
        self.model.stack.register_forward_hook(self._record)

    def _record(self, _: nn.Module, __: Any, output: tuple[Tensor, Any, Any]) -> None:
        keys, values = (torch.stack(output[i]).flatten(3) for i in (1, 2))
        self._kv = torch.cat([keys, values], dim=-1)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """(layers, 1, tokens, K + V) of the prefix and the history."""
        with torch.no_grad():
            self.model(**inputs)
        return self._kv[:, :, : self.prefix + int(inputs["history_lengths"])]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HSTU_CONFIGS)
def test_appending(name: str) -> None:
    config, declared = HSTU_CONFIGS[name]
    stability = prefix_stability(config)
    assert stability.reusable == declared
    assert stability.reason
    recorded = Recorded(config)
    inputs = inputs_of(config)
    before, after = recorded(shorter(inputs, 6)), recorded(inputs)
    kept = before.shape[2] - stability.recompute_last
    unchanged = same(before[:, :, :kept], after[:, :, :kept])
    assert unchanged == (declared == "growing")
    if stability.recompute_last:
        # When the next behaviour does not come at the time of the request.
        late = shorter(inputs, 6)
        late["request_time"] = late["request_time"] * 100
        before = recorded(late)
        assert same(before[:, :, :kept], after[:, :, :kept])
        assert not same(before[:, :, kept:], after[:, :, kept : before.shape[2]])


@pytest.mark.parametrize("name", HSTU_CONFIGS)
def test_other_inputs(name: str) -> None:
    config, _ = HSTU_CONFIGS[name]
    stability = prefix_stability(config)
    recorded = Recorded(config)
    inputs = inputs_of(config)
    before = recorded(inputs)
    kept = before.shape[2] - stability.recompute_last
    columns = {
        "user_features": config.user_cardinalities,
        "context_features": config.context_cardinalities,
    }
    for other in ("user_features", "context_features", "request_time", "candidate_items"):
        if other not in inputs or not columns.get(other, (1,)):
            continue
        changed = (inputs[other] + 1) % 4 if other in columns else inputs[other] + 10**7
        if other == "candidate_items":
            changed = 1 + inputs[other] % 20
        after = recorded({**inputs, other: changed})
        depends = not same(before[:, :, :kept], after[:, :, :kept])
        assert depends == (other in stability.depends_on), other


def test_the_softmax_variant_declares_nothing() -> None:
    """Its denominator reads later tokens; the norm after it hides that only up to rounding."""
    stability = prefix_stability(dataclasses.replace(RESEARCH, attention_activation="softmax"))
    assert stability.reusable == "none"


def test_mtgr() -> None:
    config = MTGRConfig(embedding_dim=4, position_buckets=16, time_buckets=32, **FEATURES)
    stability = prefix_stability(config)
    assert (stability.reusable, stability.depends_on) == (
        "unchanged",
        ("user_features", "context_features", "realtime_counts"),
    )
    recorded = Recorded(config)
    inputs = inputs_of(config)
    long_history = LENGTH - 3
    kept = PREFIX + long_history
    before = recorded(inputs)[:, :, :kept]
    # R and the request change nothing of U and S ...
    without_r = shorter(inputs, long_history)
    without_r["realtime_counts"] = torch.tensor([0])
    assert same(recorded(without_r)[:, :, :kept], before)
    # ... and a longer S changes all of it.
    longer = {**inputs, "realtime_counts": torch.tensor([2])}
    assert not same(recorded(longer)[:, :, :PREFIX], before[:, :, :PREFIX])
