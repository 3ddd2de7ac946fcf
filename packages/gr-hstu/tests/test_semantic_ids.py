"""Generation of semantic ids: bundle, tokens, log-probabilities, and the search by recomputing.

Shapes: N tokens of a history, L levels, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gr_core import History, Task
from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.errors import BundleError, PlanError
from gr_core.generation import GenerativeModel
from gr_core.repository import Catalogue
from gr_core.tokens import Readout
from gr_hstu import beams
from gr_hstu.config import SemanticIdConfig
from gr_hstu.engine import TorchEngine
from gr_hstu.models.semantic_ids import HSTUSemanticIds
from gr_hstu.semantic_ids import SemanticIdModel
from gr_hstu.testing import (
    IDS,
    ITEMS,
    SCHEMA,
    SID,
    SID_CONFIG,
    a_request,
    encode,
    engine_of,
    load_sid,
    random_module,
    write,
)

LEVELS = len(SID_CONFIG.code_sizes)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SemanticIdModel:
    return load_sid(write(tmp_path_factory.mktemp("models"), SID))


@pytest.fixture(scope="module")
def engine(model: SemanticIdModel) -> TorchEngine:
    return engine_of(model)


def request(model: SemanticIdModel, length: int, k: int = 10, seed: int = 0) -> EncodedRequest:
    return encode(model, Task.GENERATE, a_request(seed, length), k)


def scores_of_all(model: SemanticIdModel, asked: EncodedRequest) -> np.ndarray:
    """By index (I + 1,), from the decoder run on each item's tokens behind the history."""
    module = model.module(Task.GENERATE)
    assert isinstance(module, HSTUSemanticIds)
    history = torch.from_numpy(asked.arrays["history_tokens"])
    tokens = model.item_tokens()
    out = np.full(len(tokens), -np.inf)
    for item in range(1, len(tokens)):
        own = torch.from_numpy(tokens[item].astype(np.int64))
        whole = torch.cat([history, own[:-1]])[None]
        length = torch.tensor([whole.shape[1]])
        states = module.states(whole, length)[0, len(history) - 1 :]
        out[item] = sum(
            float(module.log_probs(states[level], level)[own[level] - model.levels[level].start])
            for level in range(LEVELS)
        )
    return out


# ── The search ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 1, 9, 24, 40])
def test_a_wide_search_ranks_all_items_as_an_exhaustive_one(
    model: SemanticIdModel, engine: TorchEngine, length: int
) -> None:
    asked = request(model, length, k=ITEMS)
    (result,) = engine.infer([asked])
    assert result.indices is not None
    right = scores_of_all(model, asked)
    assert sorted(result.indices.tolist()) == list(range(1, ITEMS + 1))
    np.testing.assert_allclose(result.scores, right[result.indices], rtol=1e-5)
    assert np.all(np.diff(result.scores) <= 0)


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 1000), st.integers(1, 20)),
        min_size=1,
        max_size=6,
    )
)
def test_batch_mates_never_change_a_search(
    model: SemanticIdModel, engine: TorchEngine, asked: list[tuple[int, int, int]]
) -> None:
    batch = [request(model, length, k, seed) for length, seed, k in asked]
    for one, together in zip(batch, engine.infer(batch), strict=True):
        (alone,) = engine.infer([one])
        np.testing.assert_allclose(together.scores, alone.scores, rtol=TOLERANCE)
        assert together.indices is not None
        assert len(together.indices) == one.k
        assert len(set(together.indices.tolist())) == one.k


def test_items_that_share_their_codes_share_their_score(
    model: SemanticIdModel, engine: TorchEngine
) -> None:
    (result,) = engine.infer([request(model, 7, k=ITEMS)])
    by_tokens: dict[tuple[int, ...], set[float]] = {}
    assert result.indices is not None
    for index, score in zip(result.indices, result.scores, strict=True):
        by_tokens.setdefault(tuple(model.item_tokens()[index]), set()).add(float(score))
    assert len(by_tokens) < ITEMS, "some items must share their codes for this test"
    assert all(len(scores) == 1 for scores in by_tokens.values())


def test_prefixes_run_part_by_part_give_the_same(
    model: SemanticIdModel, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [request(model, length, 20, length) for length in (3, 24, 0)]
    at_once = engine.infer(batch)
    monkeypatch.setattr(beams, "_PAIRS_IN_FLIGHT", 1)
    for one, other in zip(engine.infer(batch), at_once, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=TOLERANCE)


def test_no_item_asked_for_finds_none(model: SemanticIdModel, engine: TorchEngine) -> None:
    (result,) = engine.infer([request(model, 3, k=0)])
    assert result.indices is not None
    assert len(result.indices) == len(result.scores) == 0


# ── The model ─────────────────────────────────────────────────────────────────────────────────


def test_a_history_is_a_first_token_and_the_codes_of_its_items(model: SemanticIdModel) -> None:
    assert isinstance(model, GenerativeModel)
    asked = a_request(0, 3)
    tokens = encode(model, Task.GENERATE, asked).arrays["history_tokens"]
    indices = model.catalogue.indices_of(asked.history.item_ids)
    np.testing.assert_array_equal(
        tokens, [SID_CONFIG.first_token, *model.item_tokens()[indices].reshape(-1)]
    )
    for place, token in enumerate(tokens[1:]):
        assert token in model.levels[place % LEVELS]
    empty = encode(model, Task.GENERATE, replace(asked, history=History()))
    assert empty.arrays["history_tokens"].tolist() == [SID_CONFIG.first_token]


def test_a_long_history_keeps_its_newest(model: SemanticIdModel) -> None:
    asked = a_request(0, 40)
    kept = encode(model, Task.GENERATE, asked)
    assert kept.tokens == 1 + LEVELS * 24
    newest = History(asked.history.item_ids[-24:], asked.history.timestamps_ms[-24:])
    right = encode(model, Task.GENERATE, replace(asked, history=newest))
    np.testing.assert_array_equal(kept.arrays["history_tokens"], right.arrays["history_tokens"])


@pytest.mark.parametrize("norm", ["l2", "layer_norm"])
@pytest.mark.parametrize("token_l2", [True, False])
def test_the_ends_are_the_models(tmp_path: Path, norm: str, token_l2: bool) -> None:
    """Table rows, through the layers, times the readout, are the module's log-probabilities."""
    changes: dict[str, Any] = {"state_norm": norm, "token_l2_norm": token_l2}
    config = replace(SID_CONFIG, temperature=0.2, **changes)
    model = loaded(tmp_path, config)
    module = model.module(Task.GENERATE)
    assert isinstance(module, HSTUSemanticIds)
    asked = request(model, 9)
    sequence = model.sequence(asked)
    assert sequence.reusable == sequence.history == asked.tokens
    ids, tables = torch.from_numpy(model.token_ids(sequence)), model.token_tables()
    assert ids.shape == (asked.tokens, 1)
    assert tables.places is not None
    x_ND: Tensor = tables.tables[0][ids[:, 0]] + tables.places[: len(ids)]
    torch.testing.assert_close(x_ND, model.embed([asked], [sequence], [0]))
    mask_NN = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    y_ND = module.decoder.stack(x_ND[None], mask_NN[None])[0][0]
    readout = model.readout()
    logits = readout.table @ normalized(y_ND[-1], readout)
    first = model.levels[0]
    torch.testing.assert_close(
        logits[first.start : first.stop].log_softmax(-1), next_codes(module, asked, [])
    )
    (state,) = model.outputs(Task.GENERATE, [asked], y_ND[-1:])
    torch.testing.assert_close(readout.table @ state, logits)
    assert not np.any(readout.table[0].numpy())
    # A code that was chosen comes behind the history as any other token.
    chosen = model.levels[0].start + 2
    appended = torch.cat([ids[:, 0], torch.tensor([chosen])])
    x_ND = tables.tables[0][appended] + tables.places[: len(appended)]
    mask_NN = torch.ones(len(appended), len(appended), dtype=torch.bool).tril()
    y_ND = module.decoder.stack(x_ND[None], mask_NN[None])[0][0]
    logits = readout.table @ normalized(y_ND[-1], readout)
    second = model.levels[1]
    torch.testing.assert_close(
        logits[second.start : second.stop].log_softmax(-1), next_codes(module, asked, [chosen])
    )
    assert len(tables.places) >= SID_CONFIG.max_behaviours * LEVELS + LEVELS


def test_tokens_after_a_place_do_not_change_it(model: SemanticIdModel) -> None:
    """What `prefix_stability` states: K and V stay true when behaviours are appended."""
    assert model.prefix_stability.reusable == "growing"
    assert model.prefix_stability.recompute_last == 0
    module = model.module(Task.GENERATE)
    assert isinstance(module, HSTUSemanticIds)
    tokens = torch.from_numpy(request(model, 12).arrays["history_tokens"])[None]
    long = module.states(tokens, torch.tensor([tokens.shape[1]]))
    short = module.states(tokens[:, :10], torch.tensor([10]))
    torch.testing.assert_close(long[:, :10], short)


def test_items_have_no_vectors(model: SemanticIdModel) -> None:
    with pytest.raises(PlanError, match="code by code"):
        model.item_table()


# ── Bundles ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [Task.RETRIEVE]}, "hstu-sid cannot retrieve; expected of generate"),
        ({"catalogue": Catalogue(list(IDS[:-1]))}, "59 items, config.num_items is 60"),
        ({"features": {"max_history": 25, "truncate_step": 1}}, "max_history is 25, more than"),
        ({"features": SCHEMA.to_dict()}, "features.signals has 'is_liked'"),
        ({"config": SID_CONFIG.to_dict() | {"code_sizes": []}}, "code_sizes is .*at least one"),
        ({"config": SID_CONFIG.to_dict() | {"code_sizes": [5, 0]}}, "code_sizes is .*at least 1"),
        ({"config": SID_CONFIG.to_dict() | {"beam_width": 0}}, "beam_width is 0"),
        ({"config": SID_CONFIG.to_dict() | {"beam_width": 2000}}, "beam_width is 2000; .*at most"),
        ({"config": SID_CONFIG.to_dict() | {"temperature": 0}}, "Config.temperature is 0"),
        ({"config": SID_CONFIG.to_dict() | {"code_sizes": [5, 4, 7]}}, "has the shape"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(
    tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        load_sid(write(tmp_path, SID, **changes))


@pytest.mark.parametrize(("code", "level"), [(-1, 0), (4, 1), (6, 2)])
def test_codes_out_of_range_are_refused(tmp_path: Path, code: int, level: int) -> None:
    state = random_module(SID_CONFIG).state_dict()
    state["item_codes"][7, level] = code
    with pytest.raises(BundleError, match=f"item 7 has the code {code} at level {level}"):
        load_sid(write(tmp_path, SID, state=state))


def loaded(folder: Path, config: SemanticIdConfig) -> SemanticIdModel:
    state = random_module(config).state_dict()
    return load_sid(write(folder, SID, config=config.to_dict(), state=state))


def next_codes(module: HSTUSemanticIds, asked: EncodedRequest, prefix: list[int]) -> Tensor:
    inputs = {name: torch.from_numpy(array[None]) for name, array in asked.arrays.items()}
    log_probs: Tensor = module(**inputs, prefixes=torch.tensor([prefix], dtype=torch.int64))
    return log_probs[0]


def normalized(x: Tensor, readout: Readout) -> Tensor:
    if readout.norm == "l2":
        return functional.normalize(x, dim=-1, eps=readout.eps)
    return functional.layer_norm(x, x.shape, eps=readout.eps)


def test_decoding_keeps_scores(model: SemanticIdModel) -> None:
    scores = np.array([-1.0, -2.5], np.float32)
    found, heads = model.decode(Task.GENERATE, InferenceResult(scores, np.array([3, 1])), {})
    np.testing.assert_array_equal(found, scores)
    assert heads.shape == (2, 0)
