"""Evaluation sets of bundles: the very cases of the evaluator, as requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("scipy", reason="needs gr-hstu[train]")
pytest.importorskip("sklearn", reason="needs gr-hstu[train]")

from gr_core.contracts import InferenceResult
from gr_core.labelled import EVALUATION, cases, labelled_requests, quality, read_labelled
from gr_core.repository import Bundle
from gr_core.types import Task
from gr_hstu.cli import hstu
from gr_hstu.data import load
from gr_hstu.evaluation.retrieval import evaluate_retrieval
from gr_hstu.model import HSTUModel
from gr_hstu.testing import engine_of
from gr_hstu.testing import load as loaded
from gr_hstu.training import bundles
from gr_hstu.training.retrieval_task import RetrievalTask
from gr_hstu.training.settings import RetrievalSettings

SETTINGS = RetrievalSettings(d_model=16, max_history=8, truncate_step=3, normalised=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users with 3 to 20 of 30 items, none of them twice."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp_ms,is_liked"]
    for user in range(40):
        for step, item in enumerate(draw.permutation(30)[: draw.integers(3, 21)]):
            lines.append(f"u{user},{item},{1_650_000_000_000 + 60_000 * step},{item % 2}")
    (root / "interactions.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def bundle(folder: Path, tmp_path: Path) -> Bundle:
    """An untrained model of that data."""
    data = load(str(folder))
    task = RetrievalTask(data, SETTINGS)
    return bundles.write(
        tmp_path / "walks" / "1",
        task.new_model("hstu", 0),
        architecture="hstu",
        tasks=(Task.RETRIEVE, Task.RANK),
        catalogue=task.catalogue,
        schema=task.schema,
        data=data,
        description="",
        card="# A model\n\n## Reproduce\n\n    so\n\n## Data and licence\n\nMine.\n",
    )


def gr(*arguments: str) -> Any:
    result = CliRunner().invoke(hstu, ["evaluation-set", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answers(model: HSTUModel, task: Task, folder: Path) -> tuple[Any, list[InferenceResult]]:
    found = cases(model, task, read_labelled(folder))
    engine = engine_of(model)
    results = [engine.infer([case.request])[0] for case in found]
    engine.close()
    return found, results


def test_quality_is_the_evaluators(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    data, out = load(str(folder)), tmp_path / "set.jsonl"
    gr("--model", str(bundle.path), "--data", str(folder), "--users", "100", "--out", str(out))
    model = loaded(bundle)
    found, results = answers(model, Task.RETRIEVE, out)
    task = RetrievalTask(data, SETTINGS)
    assert len(found) == len(task.split.test)  # one test case a user, and all of them
    right = evaluate_retrieval(task.scorer(model.module(Task.RETRIEVE)), data, task.split.test)
    assert any(request.request.exclude_item_ids.size for request in read_labelled(out))
    assert quality(Task.RETRIEVE, found, results, ()) == {
        "ndcg@10": pytest.approx(right.mean("ndcg@10")),
        "hr@10": pytest.approx(right.mean("hr@10")),
    }


def test_a_set_becomes_part_of_a_bundle_as_often_as_it_is_made(
    bundle: Bundle, folder: Path
) -> None:
    for users in ("5", "7"):
        gr("--model", str(bundle.path), "--data", str(folder), "--users", users)
    again = Bundle.open(bundle.path)
    again.check_files()
    assert set(again.files) == {*bundle.files, EVALUATION}
    assert again.identity != bundle.identity
    assert len(labelled_requests(loaded(again))) == 7
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert card.count("## ") == 3
    assert card.count(EVALUATION) == 1
    assert "--users 7" in card
    assert card.startswith("# A model\n\n## Reproduce\n\n    so\n\n## Evaluation set\n\n")
    assert card.endswith("\n\n## Data and licence\n\nMine.\n")


def test_a_set_of_other_data_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text(
        "user_id,item_id,timestamp_ms\n" + "".join(f"u,{i},{i}\n" for i in range(5))
    )
    with pytest.raises(Exception, match="its catalogue is not that of"):
        gr("--model", str(bundle.path), "--data", str(tmp_path), "--out", str(tmp_path / "x"))
