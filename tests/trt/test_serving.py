"""The shipped models served from ONNX graphs, over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import gr_hstu
from gr_core import Behaviour
from gr_serve_grpc.client import Client

BUNDLES = Path(gr_hstu.__file__).parent / "bundles"
MODELS = ("kuairand-retrieval", "kuairand-ranking")
SAMPLE = json.loads((BUNDLES / "kuairand-retrieval" / "1" / "samples.json").read_text())[0]


def configuration(strategy: str) -> str:
    models = "".join(f'[[models]]\nname = "{name}"\nstrategy = "{strategy}"\n' for name in MODELS)
    return (
        '[repository]\npath = "package:gr_hstu/bundles"\n'
        '[[pipelines]]\nname = "kuairand"\nretrieve = "kuairand-retrieval"\n'
        'rank = "kuairand-ranking"\ndefault = true\n' + models
    )


@pytest.fixture
def environment(environment: Mapping[str, str], shared_cache: Path) -> Mapping[str, str]:
    return {**environment, "GR_CACHE_DIR": str(shared_cache)}


@pytest.fixture
def client(serve, tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "gr.toml").write_text(configuration("onnxruntime"))
    with Client(serve("--config", "gr.toml"), timeout_s=30) as client:
        yield client


def behaviours(count: int) -> list[Behaviour]:
    history = SAMPLE["history"]
    rows = zip(history["item_ids"], history["timestamps_ms"], strict=True)
    return [Behaviour(item, time) for item, time in list(rows)[:count]]


def test_recommendations_are_those_of_the_reference_and_state_is_reused(
    client: Client, run, tmp_path: Path
) -> None:
    now = SAMPLE["request_time_ms"]
    first = client.recommend(user_id="u", history=behaviours(30), k=10, request_time_ms=now)
    assert [stage.engine for stage in first.stages] == ["onnxruntime", "onnxruntime"]
    assert [stage.tokens_reused for stage in first.stages] == [0, 0]
    again = client.recommend(user_id="u", history=behaviours(36), k=10, request_time_ms=now)
    assert again.stages[0].tokens_reused >= 29

    (tmp_path / "baseline.toml").write_text(configuration("baseline"))
    request = {
        "user_id": "u",
        "k": 10,
        "request_time_ms": now,
        "history": {
            "item_ids": [b.item_id for b in behaviours(36)],
            "timestamps_ms": [b.timestamp_ms for b in behaviours(36)],
        },
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    right = json.loads(
        run(
            *("gr", "recommend", "--config", "baseline.toml", "--json"),
            *("--request", "request.json"),
        ).stdout
    )
    assert [item.item_id for item in again.items] == [item["item_id"] for item in right["items"]]
    for item, other in zip(again.items, right["items"], strict=True):
        assert item.score == pytest.approx(other["score"], rel=1e-4, abs=1e-5)


def test_auto_goes_on_with_the_next_engine(
    run, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """An export that fails, here since its folder cannot be made, rules out its engine alone."""
    (tmp_path / "gr.toml").write_text(configuration("auto"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "artifacts").write_text("in the way")
    cache = {"GR_CACHE_DIR": str(tmp_path / "cache"), "GR_DISABLED_PLUGINS": "kernels"}
    command = ("gr", "recommend", "--config", "gr.toml", "-k", "3", "--json")
    shown = run(*command, env={**environment, **cache})
    assert len(json.loads(shown.stdout)["items"]) == 3
    assert "engine onnxruntime failed to load, trying the next" in shown.stderr
