"""What a score may depend on: not padding, batch mates, other candidates, or the way of computing.

Parameters are drawn large, so that a leak shows well above the tolerance.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval, build_model, score_in_chunks

ITEMS = 30
FEATURES: dict[str, Any] = {
    "signal_cardinalities": (3, 4),
    "user_cardinalities": (4, 5),
    "context_cardinalities": (4,),
    "item_cardinalities": (5,),
    "candidate_cardinalities": (3,),
    "heads": ("recommendation", "engagement", "retention"),
}
RANKING = HSTUConfig(
    variant="ranking",
    num_items=ITEMS,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_qk=4,
    d_v=6,
    max_seq_len=32,
    mlp_dim=16,
    **FEATURES,
)
RESEARCH = HSTUConfig(
    variant="research",
    num_items=ITEMS,
    d_model=12,
    num_layers=2,
    num_heads=2,
    d_qk=4,
    d_v=6,
    max_seq_len=16,
    signal_cardinalities=(3, 4),
)
PLAIN_MTGR = MTGRConfig(
    num_items=ITEMS,
    d_model=16,
    num_layers=2,
    num_heads=2,
    max_seq_len=32,
    embedding_dim=8,
    mlp_dim=16,
    **FEATURES,
)
RANKING_CONFIGS = {
    "ranking": RANKING,
    "ranking-from-end": dataclasses.replace(RANKING, position_from="end", time_from="request"),
    "ranking-contextual-window": dataclasses.replace(
        RANKING, contextual_mask=True, max_attn_len=6, group_norm=True
    ),
    "ranking-context-in-candidates": dataclasses.replace(
        RANKING, context_placement="candidate", position_buckets=0, time_buckets=0
    ),
    "mtgr": PLAIN_MTGR,
    "mtgr-embeddings": dataclasses.replace(
        PLAIN_MTGR, position_buckets=9, time_buckets=300, context_placement="candidate"
    ),
}
RESEARCH_CONFIGS = {
    "research": RESEARCH,
    "research-no-bias": dataclasses.replace(RESEARCH, relative_bias=False),
    "research-concat": dataclasses.replace(
        RESEARCH, concat_ua=True, user_norm="layer_norm", projection_activation="none"
    ),
    "research-softmax": dataclasses.replace(RESEARCH, attention_activation="softmax"),
}
CANDIDATE_INPUTS = ("candidate_items", "candidate_features", "candidate_counts")


def build(config: HSTUConfig | MTGRConfig) -> HSTURetrieval | HSTURanking | MTGR:
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    if not isinstance(model, HSTURetrieval):
        model.item_features.random_(0, 5)
    return model.eval()


def requests(model: nn.Module, seed: int, lengths: list[int], counts: list[int]) -> dict[str, Any]:
    """Random requests, padded by random junk beyond the lengths and counts."""
    g = torch.Generator().manual_seed(seed)
    batch, length, most = len(lengths), max(lengths), max(counts)

    def ids(rows: int, *shape: int) -> Tensor:
        return torch.randint(0, rows, shape, generator=g)

    lengths_B = torch.tensor(lengths)
    times = 1_700_000_000 + ids(100_000, batch, length).cumsum(1)
    inputs = {
        "history_items": 1 + ids(ITEMS, batch, length),
        "history_timestamps": times,
        "history_lengths": lengths_B,
        "request_time": 1_700_000_000 + 100_000 * length + ids(1000, batch),
        "history_signals": ids(3, batch, length, 2),
    }
    if not isinstance(model, HSTURetrieval):
        inputs |= {
            "user_features": ids(4, batch, 2),
            "context_features": ids(4, batch, 1),
            "candidate_items": 1 + ids(ITEMS, batch, most),
            "candidate_features": ids(3, batch, most, 1),
            "candidate_counts": torch.tensor(counts),
        }
    if isinstance(model, MTGR):
        inputs["realtime_counts"] = torch.minimum(lengths_B, ids(4, batch))
    return inputs


def single(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Request b alone, cut to its own length and count."""
    n = int(inputs["history_lengths"][b])
    one = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
    for name in ("history_items", "history_timestamps", "history_signals"):
        one[name] = one[name][:, :n]
    if "candidate_counts" in one:
        for name in ("candidate_items", "candidate_features"):
            one[name] = one[name][:, : int(inputs["candidate_counts"][b])]
    return one


@pytest.fixture(scope="module")
def models() -> dict[str, HSTURetrieval | HSTURanking | MTGR]:
    return {name: build(c) for name, c in {**RANKING_CONFIGS, **RESEARCH_CONFIGS}.items()}


@pytest.mark.parametrize("name", [*RANKING_CONFIGS, *RESEARCH_CONFIGS])
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_padding_and_batch_mates_change_nothing(
    models: dict[str, nn.Module], name: str, seed: int, shape: list[tuple[int, int]]
) -> None:
    model = models[name]
    inputs = requests(model, seed, [n for n, _ in shape], [c for _, c in shape])
    with torch.no_grad():
        together = model(**inputs)
        order = torch.randperm(len(shape), generator=torch.Generator().manual_seed(seed))
        shuffled = model(**{key: value[order] for key, value in inputs.items()})
        torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-5)
        for b in range(len(shape)):
            alone = model(**single(inputs, b))[0]
            here = together[b] if isinstance(model, HSTURetrieval) else together[b, : shape[b][1]]
            torch.testing.assert_close(here, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(RANKING_CONFIGS))
@given(seed=st.integers(0, 2**31), chunk=st.integers(1, 7))
@settings(max_examples=12, deadline=None)
def test_two_steps_equal_a_single_pass(
    models: dict[str, Any], name: str, seed: int, chunk: int
) -> None:
    model = models[name]
    inputs = requests(model, seed, [7, 0, 4], [6, 2, 0])
    candidates = {key: inputs[key] for key in CANDIDATE_INPUTS}
    history = {key: value for key, value in inputs.items() if key not in CANDIDATE_INPUTS}
    if isinstance(model, MTGR):
        history.pop("request_time")
    with torch.no_grad():
        expected = model(**inputs)
        state = model.prefill(**history)
        assert state.k_NBSHK.shape[:2] == (2, 3)
        found = score_in_chunks(
            model,
            state,
            inputs["request_time"],
            **candidates,
            context_features=inputs["context_features"],
            chunk=chunk,
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(RANKING_CONFIGS))
def test_scores_do_depend_on_what_they_should(models: dict[str, Any], name: str) -> None:
    model = models[name]
    inputs = requests(model, 5, [7], [4])
    names = [n for n in inputs if n not in ("history_lengths", "candidate_counts")]
    with torch.no_grad():
        before = model(**inputs)
        for changed in names:
            uses_time = changed in ("history_timestamps", "request_time", "realtime_counts")
            if uses_time and name in ("mtgr", "ranking-context-in-candidates"):
                continue
            other = inputs[changed] + 1
            if changed == "realtime_counts":
                other = (inputs[changed] + 2) % 5
            elif changed == "history_timestamps":
                other = inputs[changed] - 50_000 * torch.arange(7, 0, -1)
            elif changed == "request_time":
                other = inputs[changed] + 10**6
            elif changed in ("history_items", "candidate_items"):
                other = 1 + inputs[changed] % ITEMS
            else:
                other = (inputs[changed] + 1) % 3
            after = model(**{**inputs, changed: other})
            assert (after - before).abs().max() > 1e-4, changed


@pytest.mark.parametrize("name", list(RANKING_CONFIGS))
def test_a_candidate_does_not_see_the_others(models: dict[str, Any], name: str) -> None:
    model = models[name]
    inputs = requests(model, 9, [6], [5])
    with torch.no_grad():
        before = model(**inputs)
        items = inputs["candidate_items"].clone()
        items[0, 1:] = 1 + items[0, 1:] % ITEMS
        after = model(**{**inputs, "candidate_items": items})
        # Duplicates score alike, in any place.
        twice = items[:, [2, 2, 0, 1, 2]]
        crosses = inputs["candidate_features"][:, [2, 2, 0, 1, 2]]
        same = model(**{**inputs, "candidate_items": twice, "candidate_features": crosses})
    torch.testing.assert_close(after[0, 0], before[0, 0])
    assert not torch.allclose(after[0, 1], before[0, 1])
    torch.testing.assert_close(same[0, [0, 1, 4]], after[0, [2, 2, 2]])


@pytest.mark.parametrize("name", [n for n in RESEARCH_CONFIGS if n != "research-softmax"])
def test_encode_all_is_causal(models: dict[str, Any], name: str) -> None:
    """Position i is the user that a history of i + 1 behaviours gives at the time of the next."""
    model = models[name]
    inputs = requests(model, 3, [8, 5], [1, 1])
    times, signals = inputs["history_timestamps"], inputs["history_signals"]
    with torch.no_grad():
        encoded = model.encode_all(**inputs)
        torch.testing.assert_close(encoded[:, 7].norm(dim=1)[1], torch.tensor(0.0))
        for n in range(1, 8):
            user = model(
                inputs["history_items"][:1, :n],
                times[:1, :n],
                torch.tensor([n]),
                times[:1, n],
                signals[:1, :n],
            )
            torch.testing.assert_close(user, encoded[:1, n - 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs)[1], encoded[1, 4])


def test_an_empty_batch_of_histories(models: dict[str, Any]) -> None:
    with torch.no_grad():
        user = models["research"](**requests(models["research"], 0, [0, 0], [1, 1]))
        assert user.tolist() == [[0.0] * 12] * 2
        logits = models["mtgr"](**requests(models["mtgr"], 0, [0, 0], [2, 1]))
        assert logits.shape == (2, 2, 3)


@pytest.mark.parametrize("name", [*RANKING_CONFIGS, *RESEARCH_CONFIGS])
def test_bfloat16(name: str) -> None:
    model = build({**RANKING_CONFIGS, **RESEARCH_CONFIGS}[name])
    inputs = requests(model, 2, [8, 3], [4, 4])
    with torch.no_grad():
        expected = model(**inputs)
        found = model.to(torch.bfloat16)(**inputs)
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa, through two layers.
    assert (found.float() - expected).abs().mean() < 0.03 * expected.abs().max()


def test_dropout_only_while_training() -> None:
    config = dataclasses.replace(RESEARCH, dropout=0.5, input_dropout=0.5)
    model = build(config)
    inputs = requests(model, 0, [6], [1])
    assert torch.equal(model(**inputs), model(**inputs))
    model.train()
    assert not torch.equal(model(**inputs), model(**inputs))


@pytest.mark.parametrize("name", list(RANKING_CONFIGS))
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(RANKING_CONFIGS[name])
    model(**requests(model, 0, [9, 9], [5, 5])).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_the_wrong_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="HSTURanking is the model"):
        HSTURetrieval(RANKING)
    with pytest.raises(ValueError, match="HSTURetrieval is the model"):
        HSTURanking(RESEARCH)
    with pytest.raises(ValueError, match="at least one head"):
        HSTURanking(dataclasses.replace(RANKING, heads=()))
