"""The shipped models, served and asked as the README's demo does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr_core.config import Config
from gr_core.json_requests import read_requests
from gr_core.repository import ModelRepository
from gr_core.samples import SAMPLES
from gr_core.types import RecommendRequest
from gr_serve_grpc.client import Client

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "examples" / "demo.toml")


@pytest.fixture(scope="module")
def samples() -> list[RecommendRequest]:
    config = Config.load(CONFIG, environ={})
    bundle = ModelRepository(config.repository.path).bundle(config.pipelines[0].retrieve)
    return list(read_requests(bundle.path / SAMPLES))


@pytest.fixture(scope="module")
def client(serve_once) -> Iterator[Client]:
    with Client(serve_once("--config", CONFIG)) as client:
        yield client


def test_the_demo(run):
    shown = run(sys.executable, str(ROOT / "examples" / "demo.py"), "--users", "2").stdout
    assert shown.count("last behaviours") == 2
    assert shown.count("recommended") == 2
    assert "highest priority" in shown
    assert "The server has stopped cleanly." in shown


def test_the_shipped_models_are_whole_and_small():
    repository = ModelRepository(Config.load(CONFIG, environ={}).repository.path)
    total = 0
    for name in repository.names():
        for version in repository.versions(name):
            bundle = repository.bundle(name, version)
            bundle.check_files()
            assert bundle.license
            assert (bundle.path / "MODEL_CARD.md").is_file()
            total += sum(file.stat().st_size for file in bundle.path.iterdir())
    assert 0 < total <= 6 << 20


def test_both_stages_answer_and_seen_items_are_left_out(samples, client: Client):
    for request in samples:
        answer = client.recommend(request, k=10)
        assert [stage.task.value for stage in answer.stages] == ["retrieve", "rank"]
        assert {stage.engine for stage in answer.stages} == {"native"}
        ids = [item.item_id for item in answer.items]
        assert len(set(ids)) == 10
        assert not set(ids) & set(request.history.item_ids.tolist())
        scores = [item.score for item in answer.items]
        assert scores == sorted(scores, reverse=True)
        assert all(item.head_scores for item in answer.items)


def test_different_users_get_different_recommendations(samples, client: Client):
    answers = {
        tuple(item.item_id for item in client.recommend(request, k=10).items) for request in samples
    }
    assert len(answers) == len(samples) > 1


def test_a_server_answers_what_the_command_line_does(samples, client: Client, run, tmp_path: Path):
    """The same request through gRPC and without a server gives the same items and scores."""
    bundles = ModelRepository(Config.load(CONFIG, environ={}).repository.path)
    file = bundles.bundle("kuairand-retrieval").path / SAMPLES
    rows = json.loads(file.read_text())
    (tmp_path / "request.json").write_text(json.dumps(rows[0]))
    once = run("gr", "recommend", "--config", CONFIG, "--request", "request.json", "--json")
    expected = json.loads(once.stdout)["items"]
    answer = client.recommend(samples[0])
    assert [item.item_id for item in answer.items] == [item["item_id"] for item in expected]
    for item, other in zip(answer.items, expected, strict=True):
        assert item.score == pytest.approx(other["score"], rel=1e-5)
        assert item.head_scores == pytest.approx(other["head_scores"], rel=1e-5)


def test_engines_agree_on_the_shipped_models(run):
    # Others of ONNX graphs are in tests/trt.
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16")
    verified = json.loads(run("gr", "verify", "--config", CONFIG, *dtypes, "--json").stdout)
    assert verified
    assert all(row["ok"] for row in verified)


def test_the_plan_is_explained(run):
    plans = json.loads(run("gr", "plan", "--config", CONFIG, "--json").stdout)
    assert {plan["engine"] for plan in plans} == {"native"}
    explained = run("gr", "plan", "--config", CONFIG, "--explain").stdout
    assert "torch (cuda, float32)" in explained
    assert "torch (cpu, float32)" in explained
    assert "native (cpu, float32)" in explained
