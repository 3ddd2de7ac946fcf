"""Bundles of HSTU and MTGR: what loads, what is refused and why, and what is encoded."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core import Candidates, History, Task
from gr_core.collate import collate
from gr_core.contracts import InferenceResult, TorchModel
from gr_core.errors import BundleError
from gr_core.repository import Bundle, BundleSource, Catalogue
from gr_hstu.data.interactions import Interactions, Table
from gr_hstu.evaluation.protocols import Cases
from gr_hstu.features import FeatureSchema
from gr_hstu.model import HSTUModel
from gr_hstu.testing import (
    CASES,
    CONFIGS,
    FULL_SCHEMA,
    IDS,
    ITEMS,
    KINDS,
    NOW_MS,
    SCHEMA,
    a_request,
    encode,
    load,
    random_module,
    write,
)
from gr_hstu.training.batches import HistoryEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HSTUModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: load(write(folder, kind)) for kind in KINDS}


# ── What loads ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_loads_as_it_was_written(models: dict[str, HSTUModel], kind: str) -> None:
    model = models[kind]
    assert isinstance(model, TorchModel)
    assert model.tasks == tuple(task for k, task in CASES if k == kind)
    assert model.heads == (
        ("recommendation",) if kind == "research" else ("recommendation", "engagement")
    )
    assert model.notes == ("weights: the bundle's own",)
    assert len(model.catalogue) == ITEMS
    expected = random_module(CONFIGS[kind]).state_dict()
    module = model.module(Task.RANK)
    found = {name.removeprefix("model."): t for name, t in module.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert not module.training
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    assert not any(b.is_meta for b in module.buffers())
    model.close()


def test_the_item_table_is_what_users_are_multiplied_with(models: dict[str, HSTUModel]) -> None:
    table = models["research"].item_table()
    assert table.shape == (ITEMS + 1, CONFIGS["research"].d_model)
    torch.testing.assert_close(table[1:].norm(dim=1), torch.ones(ITEMS))


# ── What is refused ───────────────────────────────────────────────────────────────────────────


def state_of(kind: str) -> dict[str, torch.Tensor]:
    return dict(random_module(CONFIGS[kind]).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_named_together(tmp_path: Path, kind: str) -> None:
    state = state_of(kind)
    names = list(state)
    lost, wrong = names[0], names[-1]
    del state[lost]
    state[wrong] = torch.zeros(*state[wrong].shape, 2)
    state["surprise"] = torch.zeros(1)
    with pytest.raises(BundleError) as refused:
        load(write(tmp_path, kind, state=state))
    message = str(refused.value)
    assert "model.safetensors" in message
    assert f"{lost} is missing" in message
    assert "surprise is not expected" in message
    expected = tuple(random_module(CONFIGS[kind]).state_dict()[wrong].shape)
    assert f"{wrong} has the shape {(*expected, 2)}, expected {expected}" in message


def test_many_misfits_are_counted(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"and \d+ more"):
        load(write(tmp_path, "ranking", state={"x": torch.zeros(1)}))


@pytest.mark.parametrize(
    "content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"\xff" * 64, None]
)
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    bundle = write(tmp_path, "research")
    if content is None:
        bundle.weights_path.unlink()
    else:
        bundle.weights_path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        load(bundle)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    bundle = write(tmp_path, "mtgr")
    content = bundle.weights_path.read_bytes()
    for size in (7, 100, len(content) // 2, len(content) - 1):
        bundle.weights_path.write_bytes(content[:size])
        with pytest.raises(BundleError, match=r"model\.safetensors"):
            load(bundle)


def changed(kind: str, **fields: Any) -> dict[str, Any]:
    return CONFIGS[kind].to_dict() | fields


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("research", {"config": {}}, r"config\.json: config: HSTUConfig lacks the required"),
        ("research", {"config": changed("research", depth=3)}, "no field 'depth'"),
        ("research", {"config": changed("research", d_model="x")}, "d_model is 'x'; expected int"),
        ("mtgr", {"config": changed("mtgr", num_heads=3)}, "d_model is 16; expected a multiple of"),
        ("ranking", {"config": changed("ranking", heads=[])}, "at least one head"),
        ("mtgr", {"config": changed("mtgr", heads=[])}, "heads is .*; expected at least one head"),
        (
            "research",
            {"config": changed("research", num_items=7)},
            "the catalogue has 60 items, config.num_items is 7",
        ),
        (
            "research",
            {"catalogue": Catalogue(["a"])},
            "the catalogue has 1 items, config.num_items is 60",
        ),
        (
            "research",
            {"features": dataclasses.replace(SCHEMA, max_history=33).to_dict()},
            "features.max_history is 33, more than config.max_seq_len, 32",
        ),
        (
            "research",
            {"features": FeatureSchema(max_history=24, truncate_step=4).to_dict()},
            r"config.signal_cardinalities is \(3, 4\), the features need \(\)",
        ),
        (
            "ranking",
            {"features": dataclasses.replace(FULL_SCHEMA, user=()).to_dict()},
            r"config.user_cardinalities is \(3,\), the features need \(\)",
        ),
        (
            "mtgr",
            {"features": dataclasses.replace(FULL_SCHEMA, candidate=SCHEMA.signals).to_dict()},
            r"config.candidate_cardinalities is \(4,\), the features need \(3, 4\)",
        ),
        ("ranking", {"features": {"signals": [{"name": "x"}]}}, "features: 'kind'"),
        ("ranking", {"tasks": [Task.RETRIEVE]}, "tasks: hstu of this configuration cannot retr"),
        ("mtgr", {"tasks": [Task.RANK, Task.GENERATE]}, "tasks: mtgr .* cannot generate"),
        (
            "ranking",
            {"head_weights": {"recommendation": 1.0, "retention": 1.0}},
            "head_weights: 'retention' is no head of the model; "
            "there are: recommendation, engagement",
        ),
        ("research", {"head_weights": {"engagement": 1}}, "head_weights: 'engagement' is no head"),
    ],
)
def test_what_does_not_agree_is_named(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        load(write(tmp_path, kind, **changes))


# ── Where the weights come from ───────────────────────────────────────────────────────────────


def public_checkpoint(path: Path, seed: int) -> None:
    """A checkpoint of the public research trainer with the weights of our module."""
    module = random_module(OPEN, seed)
    own = module.state_dict()
    theirs = {
        "_embedding_module._item_emb.weight": own["items.weight"],
        "_input_features_preproc._pos_emb.weight": own["positions.weight"],
    }
    for i in range(OPEN.num_layers):
        layer = f"_hstu._attention_layers.{i}"
        theirs |= {
            f"{layer}._uvqk": own[f"stack.layers.{i}.uvqk.weight"].T.contiguous(),
            f"{layer}._o.weight": own[f"stack.layers.{i}.output.weight"],
            f"{layer}._o.bias": own[f"stack.layers.{i}.output.bias"],
            f"{layer}._rel_attn_bias._ts_w": own[f"stack.layers.{i}.relative_bias.time_weight"],
            f"{layer}._rel_attn_bias._pos_w": own[
                f"stack.layers.{i}.relative_bias.position_weight"
            ],
        }
    torch.save({"model_state_dict": theirs}, path)


OPEN = dataclasses.replace(CONFIGS["research"], signal_cardinalities=())
SOURCE = BundleSource("open.pt", "meta-research", {"num_heads": 2})


def with_source(folder: Path, source: BundleSource = SOURCE, **changes: Any) -> Bundle:
    """A bundle that names an open checkpoint, with weights of its own of seed 0."""
    return write(
        folder,
        "research",
        state=dict(random_module(OPEN).state_dict()),
        config=OPEN.to_dict(),
        features=FeatureSchema(max_history=20, truncate_step=4).to_dict(),
        source=source,
        **changes,
    )


def items_of(model: HSTUModel) -> torch.Tensor:
    return model.module(Task.RETRIEVE).state_dict()["items.weight"]


def test_the_open_checkpoint_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = with_source(tmp_path)
    public_checkpoint(bundle.path / "open.pt", seed=7)
    with caplog.at_level(logging.WARNING):
        model = load(bundle)
    assert model.notes == (f"weights: the checkpoint {bundle.path / 'open.pt'}",)
    assert not caplog.records
    torch.testing.assert_close(items_of(model), random_module(OPEN, 7).state_dict()["items.weight"])


def test_an_absolute_checkpoint_is_found(tmp_path: Path) -> None:
    public_checkpoint(tmp_path / "elsewhere.pt", seed=7)
    source = dataclasses.replace(SOURCE, checkpoint=str(tmp_path / "elsewhere.pt"))
    model = load(with_source(tmp_path, source))
    assert model.notes == (f"weights: the checkpoint {tmp_path / 'elsewhere.pt'}",)


def missing(path: Path) -> None: ...


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def empty(path: Path) -> None:
    path.touch()


def folder(path: Path) -> None:
    path.mkdir()


def truncated(path: Path) -> None:
    public_checkpoint(path, seed=7)
    path.write_bytes(path.read_bytes()[:5000])


def of_another_size(path: Path) -> None:
    torch.save({"_embedding_module._item_emb.weight": torch.zeros(3, 3)}, path)


def not_a_model(path: Path) -> None:
    torch.save([1, 2, 3], path)


def code(path: Path) -> None:
    torch.save({"model_state_dict": Path}, path)


@pytest.mark.parametrize(
    "damage",
    [missing, random_bytes, empty, folder, truncated, of_another_size, not_a_model, code],
    ids=lambda damage: damage.__name__,
)
def test_the_bundles_own_weights_are_the_fallback_and_the_reason_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    bundle = with_source(tmp_path)
    damage(bundle.path / "open.pt")
    with caplog.at_level(logging.WARNING):
        model = load(bundle)
    (note,) = model.notes
    assert note.startswith(f"weights: the bundle's own, because {bundle.path / 'open.pt'} cannot")
    assert "\n" not in note
    assert not note.endswith(": ")
    assert [r.getMessage() for r in caplog.records] == [f"research/1: {note}"]
    torch.testing.assert_close(items_of(model), random_module(OPEN).state_dict()["items.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"importer": "nobody"}, "no importer 'nobody'; there are meta-research"),
        ({"options": {"heads": 2}}, "importer meta-research has no option heads"),
        ({"options": {"num_heads": 5}}, "num_heads is 5, which does not divide"),
    ],
)
def test_a_source_that_is_misdescribed_is_said_too(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    bundle = with_source(tmp_path, dataclasses.replace(SOURCE, **change))
    public_checkpoint(bundle.path / "open.pt", seed=7)
    (note,) = load(bundle).notes
    assert "the bundle's own" in note
    assert re.search(reason, note)


def test_without_any_weights_both_reasons_are_told(tmp_path: Path) -> None:
    bundle = with_source(tmp_path)
    bundle.weights_path.unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors: .*open\.pt cannot be used: "):
        load(bundle)


# ── What is encoded ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "task"), CASES)
@pytest.mark.parametrize("length", [0, 1, 10, 30])
def test_arrays_are_those_that_the_model_declares(
    models: dict[str, HSTUModel], kind: str, task: Task, length: int
) -> None:
    model = models[kind]
    encoding = model.encode(a_request(length=length), task)
    arrays = encoding.request.arrays
    specs = model.inputs(task)
    assert set(arrays) == {spec.name for spec in specs}
    kept = {0: 0, 1: 1, 10: 10, 30: 22}[length]  # cut in steps of 4 to at most 24
    axes = {"history": kept, "candidate": 5}
    for spec in specs:
        expected = tuple(axes[a] if isinstance(a, str) else a for a in spec.axes)
        assert arrays[spec.name].shape == expected, spec.name
        assert arrays[spec.name].dtype == spec.dtype, spec.name
    assert arrays["history_lengths"] == kept
    prefix = 0 if kind == "research" else 2
    assert encoding.request.tokens == prefix + kept + (5 if task is Task.RANK else 0)


def test_unknown_items_and_candidates_are_told(models: dict[str, HSTUModel]) -> None:
    request = a_request(candidates=[1003, 5, 1001])
    history = dataclasses.replace(
        request.history, item_ids=np.r_[request.history.item_ids[:-2], 1, 2]
    )
    request = dataclasses.replace(request, history=history)
    for kind, task in CASES:
        encoding = models[kind].encode(request, task)
        assert encoding.unknown_items == 2
        assert encoding.request.arrays["history_lengths"] == 8
        if task is Task.RANK:
            assert encoding.candidate_indices.tolist() == [4, 2]
            assert encoding.unscored.tolist() == [False, True, False]
            assert encoding.request.arrays["candidate_items"].tolist() == [4, 2]


def test_cross_features_follow_their_candidates(models: dict[str, HSTUModel]) -> None:
    candidates = Candidates(
        np.array([1003, 5, 1001]), {"price": np.array([0.5, 5, 50], np.float32)}
    )
    request = a_request(candidates=[1003], user_features={"gender": "f"})
    arrays = (
        models["mtgr"]
        .encode(dataclasses.replace(request, candidates=candidates), Task.RANK)
        .request.arrays
    )
    assert arrays["candidate_features"].tolist() == [[1], [3]]
    assert arrays["user_features"].tolist() == [2]
    assert arrays["candidate_counts"] == 2


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**31))
def test_serving_encodes_what_training_saw(
    models: dict[str, HSTUModel], lengths: list[int], seed: int
) -> None:
    """The same users through the training's batches and through requests, bit by bit."""
    random = np.random.default_rng(seed)
    n = sum(lengths)
    user_N = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    data = Interactions.sort(
        Interactions(
            "tiny",
            user_N,
            random.integers(1, ITEMS + 1, n),
            NOW_MS + random.integers(0, 10**6, n),
            Table(tuple(str(u) for u in range(len(lengths)))),
            Table(tuple(map(str, IDS))),
            {
                "is_liked": random.choice([0.0, 1.0, np.nan], n).astype(np.float32),
                "watched": random.choice([0.0, 0.1, 0.9, 1.0], n).astype(np.float32),
                "not_read": np.ones(n, np.float32),
            },
        )
    )
    rows = np.arange(n)
    cases = Cases(rows, data.start_N, rows)  # each row from all rows of its user before it
    model = models["research"]
    trained = HistoryEncoder(data, SCHEMA, model.catalogue).batch(cases)

    requests = [
        dataclasses.replace(
            a_request(request_time_ms=int(data.timestamp_ms_N[row])),
            history=History(
                np.array(IDS)[data.item_N[start:row] - 1],
                data.timestamp_ms_N[start:row],
                {name: column[start:row] for name, column in data.signals.items()},
            ),
        )
        for row, start in zip(rows, data.start_N, strict=True)
    ]
    specs = model.inputs(Task.RETRIEVE)
    served = collate(specs, [encode(model, Task.RETRIEVE, r) for r in requests])
    for spec in specs:
        expected = trained[spec.name].numpy()
        got = served[spec.name]
        if expected.ndim > 1 and expected.shape[1] == 0:  # serving pads at least one
            assert not got.any()
            continue
        np.testing.assert_array_equal(got, expected, err_msg=spec.name)


# ── What is decoded ───────────────────────────────────────────────────────────────────────────


def test_ranking_decodes_probabilities_and_weighs_them(models: dict[str, HSTUModel]) -> None:
    logits = np.array([[0.0, 2.0], [-3.0, 40.0], [-800.0, 800.0]], np.float32)
    result = InferenceResult(logits)
    expected = 1 / (1 + np.exp(-logits.astype(np.float64).clip(-60, 60)))
    for kind in ("ranking", "mtgr"):
        scores, heads = models[kind].decode(Task.RANK, result, {})
        np.testing.assert_allclose(heads, expected, atol=1e-6)
        np.testing.assert_allclose(scores, expected.mean(1), atol=1e-6)
        assert scores.dtype == heads.dtype == np.float32
        scores, _ = models[kind].decode(Task.RANK, result, {"engagement": 2.0})
        np.testing.assert_allclose(scores, 2 * expected[:, 1], atol=1e-6)


def test_a_bundles_own_head_weights_are_the_default(tmp_path: Path) -> None:
    model = load(write(tmp_path, "ranking", head_weights={"engagement": 3.0}))
    result = InferenceResult(np.array([[5.0, 0.0]], np.float32))
    assert model.decode(Task.RANK, result, {})[0].item() == pytest.approx(1.5)
    assert model.decode(Task.RANK, result, {"recommendation": 1.0})[0].item() > 0.99


def test_retrieval_scores_are_left_as_they_are(models: dict[str, HSTUModel]) -> None:
    scores = np.array([0.5, -0.5], np.float32)
    model = models["research"]
    got, heads = model.decode(Task.RETRIEVE, InferenceResult(scores, np.array([1, 2])), {})
    np.testing.assert_array_equal(got, scores)
    assert heads.shape == (2, 0)
    got, heads = model.decode(Task.RANK, InferenceResult(scores[:, None]), {})
    np.testing.assert_array_equal(got, scores)
    assert heads.shape == (2, 1)
