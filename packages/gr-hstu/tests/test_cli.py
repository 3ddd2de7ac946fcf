"""``gr hstu``: what a user types, from data to a bundle that serves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("scipy", reason="needs gr-hstu[train]")
pytest.importorskip("sklearn", reason="needs gr-hstu[train]")

from gr_core.errors import UserError
from gr_core.json_requests import read_requests
from gr_core.labelled import cases, labelled_requests, quality
from gr_core.repository import Bundle
from gr_core.types import RecommendRequest, Task
from gr_hstu.cli import hstu
from gr_hstu.data import load
from gr_hstu.evaluation import metrics
from gr_hstu.model import load_hstu, load_mtgr
from gr_hstu.semantic_ids import load_semantic_ids
from gr_hstu.testing import engine_of
from gr_hstu.training.batches import stack
from gr_hstu.training.generation_task import GenerationTask
from gr_hstu.training.ranking import predict
from gr_hstu.training.ranking_task import RankingTask
from gr_hstu.training.retrieval_task import RetrievalTask
from gr_hstu.training.settings import generation_settings, ranking_settings, retrieval_settings

REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "research_bias.ckpt"
SMALL = ["d_model=16", "max_history=16", "max_epochs=2", "dropout=0.1"]


def gr(*arguments: str) -> Result:
    return CliRunner().invoke(hstu, arguments, catch_exceptions=True)


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users who walk round 25 items, at their own pace, and like a third of them."""
    root = tmp_path_factory.mktemp("walks")
    draw = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp_ms,is_liked,context.tab"]
    for user in range(60):
        time = 1_650_000_000_000 + int(draw.integers(0, 3_600_000))
        for step in range(30):
            time += int(draw.integers(1, 3_600_000))
            item = (user + step) % 25
            lines.append(f"u{user},{item},{time},{int(item % 3 == 0)},{user % 2}")
    (root / "interactions.csv").write_text("\n".join(lines) + "\n")
    (root / "items.csv").write_text(
        "item_id,title,seconds,code_1,code_2\n"
        + "".join(f"{i},Item {i},{10 * i},{i // 5},{i % 5}\n" for i in range(25))
    )
    return root


def test_train_retrieval_and_evaluate_its_bundle(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "walks" / "1"
    common = ["--data", str(folder), "--work", str(tmp_path / "runs"), *sets(*SMALL)]
    result = gr("train", *common, "--out", str(out), "--sasrec", "--samples", "2")
    assert result.exit_code == 0, result.output
    assert "SASRec" in result.output
    bundle = Bundle.open(out)
    bundle.check_files()
    assert (bundle.name, bundle.version, bundle.tasks) == ("walks", "1", (Task.RETRIEVE, Task.RANK))
    card = (out / "MODEL_CARD.md").read_text()
    assert "## Quality" in card
    assert "item co-occurrence" in card
    assert f"gr hstu train --data {folder.name} --task retrieval --set d_model=16" in card
    assert str(tmp_path) not in card

    # The bundle answers as the trained model did, through the code that serves.
    model = load_hstu(bundle)
    samples = read_requests(out / "samples.json")
    assert len(samples) == 2
    arrays = model.encode(samples[0], Task.RETRIEVE).request.arrays
    user = model.module(Task.RETRIEVE)(**stack([arrays]))
    data = load(str(folder))
    changes = {"d_model": 16, "max_history": 16, "dropout": 0.1}
    task = RetrievalTask(data, _replaced(retrieval_settings(data), **changes))
    row = next(
        i
        for i, r in enumerate(task.split.test.row_C)
        if data.users.ids[data.user_N[r] - 1] == samples[0].user_id
    )
    case = task.split.test.take(np.array([row]))
    expected = task.scorer(model.module(Task.RETRIEVE)).score(data, case)
    served = (user @ model.item_table().T).numpy()
    np.testing.assert_allclose(served, expected, atol=1e-5)

    again = gr("train", *common, "--out", str(out))
    assert isinstance(again.exception, UserError)
    assert "--overwrite" in str(again.exception)

    result = gr("evaluate", *common, "--bundle", str(out), "--no-sasrec", "--json")
    assert result.exit_code == 0, result.output
    (table,) = json.loads(result.output).values()
    assert set(table) >= {"HSTU", "popularity"}
    assert -1 < table["popularity"]["ours minus it"]["low"] < 1


def test_train_generation_and_evaluate_its_bundle(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "walks-sid" / "1"
    common = ["--data", str(folder), "--task", "generation", "--work", str(tmp_path / "runs")]
    common += sets(*SMALL, "truncate_step=4", "beam_width=10")
    result = gr("train", *common, "--out", str(out), "--dtype", "float16", "--samples", "2")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(out)
    bundle.check_files()
    assert (bundle.architecture, bundle.tasks) == ("hstu-sid", (Task.GENERATE,))
    assert bundle.config["code_sizes"] == [5, 5]
    assert "--task generation --set d_model=16" in (out / "MODEL_CARD.md").read_text()

    # The bundle answers as the trained model did, through the engine that serves.
    model = load_semantic_ids(bundle)
    assert model.item_tokens()[8].tolist() == [2, 8]
    data = load(str(folder))
    changes = {"d_model": 16, "max_history": 16, "truncate_step": 4, "dropout": 0.1}
    task = GenerationTask(data, _replaced(generation_settings(data), **changes))
    some = task.split.test.take(np.arange(3))
    expected = task.scorer(model.module(Task.GENERATE)).score(data, some)
    engine = engine_of(model)
    for start, end, right in zip(some.start_C, some.end_C, expected, strict=True):
        request = RecommendRequest(task.encoder.history(int(start), int(end)), request_time_ms=0)
        encoded = model.encode(request, Task.GENERATE).request
        (found,) = engine.infer([dataclasses.replace(encoded, k=25)])
        np.testing.assert_allclose(found.scores, right[found.indices], atol=1e-4)

    result = gr("evaluate", *common, "--bundle", str(out), "--json")
    assert result.exit_code == 0, result.output
    (table,) = json.loads(result.output).values()
    assert set(table) >= {"HSTU, semantic ids", "popularity"}
    result = gr("evaluation-set", "--model", str(out), "--data", str(folder), "--users", "9")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(out)
    model = load_semantic_ids(bundle)
    held_out = cases(model, Task.GENERATE, labelled_requests(model))
    assert len(held_out) == 9
    found = quality(Task.GENERATE, held_out, engine.infer([c.request for c in held_out]), ())
    assert set(found) == {"ndcg@10", "hr@10"}
    assert 0 <= found["ndcg@10"] <= found["hr@10"] <= 1

    again = gr("train", *common, "--out", str(tmp_path / "x" / "1"), "--sasrec")
    assert "it is for --task retrieval" in str(again.exception)


def test_train_ranking_in_half_precision(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "likes" / "2"
    heads = ["--head", "recommendation=is_liked"]
    common = ["--data", str(folder), "--task", "ranking", "--work", str(tmp_path / "runs"), *heads]
    small = sets(*SMALL, "embedding_dim=8", "mlp_dim=16")
    result = gr("train", *common, *small, "--out", str(out), "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "logistic regression" in result.output
    model = load_mtgr(Bundle.open(out))
    assert model.heads == ("recommendation",)

    # Ratings of the bundle, which is float16 on disk, are those that were measured.
    data = load(str(folder))
    task = RankingTask(
        data, _replaced(ranking_settings(data, {"recommendation": "is_liked"}), max_history=16)
    )
    probability = predict(model.module(Task.RANK), task.impressions, task.split.test)
    values = json.loads(gr("evaluate", *common, *small, "--bundle", str(out), "--json").output)
    (table,) = values.values()
    found = table["recommendation: MTGR"]["auc"]["value"]
    label = task.label_NH[task.split.test.row_C, 0]
    assert found == pytest.approx(metrics.auc(label, probability[:, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "ranking"], "--head NAME=SIGNAL"),
        (["--task", "ranking", "--head", "a=is_watched"], "no signal 'is_watched'"),
        (["--set", "dropout=high"], "expected a value like"),
        (["--set", "width=3"], "not a setting; there are"),
        (["--set", "loss=hinge"], "expected one of full, sampled"),
        (["--head", "a=is_liked"], "--head is for --task ranking"),
    ],
)
def test_mistakes_are_explained(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = ["--out", str(tmp_path / "m" / "1"), "--work", str(tmp_path)]
    result = gr("train", "--data", str(folder), *out, *arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "m" / "1").exists()


def test_unknown_data_is_a_users_mistake(tmp_path: Path) -> None:
    result = gr("train", "--data", "netflix", "--out", str(tmp_path / "m" / "1"))
    assert isinstance(result.exception, UserError)
    assert "netflix" in str(result.exception)


def test_params() -> None:
    assert "mtgr-base" in gr("params").output
    counts = json.loads(gr("params", "hstu-ml-1m", "--json").output)
    assert counts["dense"] + counts["embedding"] == counts["total"]
    assert "total" in gr("params", "hstu-ml-1m").output
    assert isinstance(gr("params", "gpt").exception, UserError)


def test_import_a_public_checkpoint(tmp_path: Path) -> None:
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not there")
    out = tmp_path / "imported" / "1"
    result = gr(
        "import",
        str(REFERENCE),
        "--from",
        "meta-research",
        "--out",
        str(out),
        *sets("num_heads=2"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    model = load_hstu(Bundle.open(out))
    assert len(model.catalogue) == model.item_table().shape[0] - 1
    assert model.catalogue.ids.tolist()[:2] == [1, 2]


def _replaced(settings, **changes):  # type: ignore[no-untyped-def]
    return replace(settings, **changes)
