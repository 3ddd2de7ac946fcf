"""One server process, its clients and the command line, with all plugins installed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from gr_core import Behaviour
from gr_hstu.testing import IDS, SID, write
from gr_serve_grpc.client import Client

FIRST = "item_id,title\n" + "a,A\n" * 3 + "b,B\n" * 2 + "c,C\n"
SECOND = "item_id,title\n" + "c,C\n" * 3 + "b,B\n" * 2 + "a,A\n"


@pytest.fixture
def repository(run, with_popularity: Mapping[str, str], tmp_path: Path) -> Path:
    """Two versions of a model, the first of them active."""
    for version, interactions in (("1", FIRST), ("2", SECOND)):
        (tmp_path / "interactions.csv").write_text(interactions)
        out = f"models/popular/{version}"
        command = ("gr", "popularity", "fit", "interactions.csv", "--out", out)
        run(*command, env=with_popularity)
    run("gr", "models", "activate", "popular", "1")
    return tmp_path / "models"


def test_a_server_of_another_plugins_model(repository: Path, serve, run, with_popularity):
    address = serve(env=with_popularity)
    called = run("gr", "call", "--target", address, "-k", "2", "--json", env=with_popularity)
    answer = json.loads(called.stdout)
    assert [item["item_id"] for item in answer["items"]] == ["a", "b"]
    once = run("gr", "recommend", "-k", "2", "--json", env=with_popularity)
    assert [item["item_id"] for item in json.loads(once.stdout)["items"]] == ["a", "b"]
    with Client(address) as client:
        seen = client.recommend(history=[Behaviour("a", 1_700_000_000_000)], k=1)
        assert [item.item_id for item in seen.items] == ["b"]
        ranked = client.recommend(candidates=["c", "a", "nothing"])
        assert [item.item_id for item in ranked.items] == ["a", "c"]
        assert list(ranked.unscored_item_ids) == ["nothing"]


def test_semantic_ids_over_the_network(serve, run, tmp_path: Path):
    """A model that generates: served, asked over the network and without it, and verified."""
    write(tmp_path / "models", SID)
    asked = ("-k", "5", "--task", "generate", "--json")
    (tmp_path / "seen.json").write_text(json.dumps([{"item_id": 1003, "timestamp_ms": 1}]))
    served = json.loads(
        run("gr", "call", "--target", serve(), "--history", "seen.json", *asked).stdout
    )
    ids = [item["item_id"] for item in served["items"]]
    assert [stage["task"] for stage in served["stages"]] == ["generate"]
    assert len(set(ids)) == 5
    assert set(ids) <= set(IDS) - {1003}
    once = json.loads(run("gr", "recommend", "--history", "1003", *asked).stdout)
    assert [item["item_id"] for item in once["items"]] == ids
    rows = json.loads(run("gr", "verify", "--engine", "torch", "--json").stdout)
    assert [(row["task"], row["ok"]) for row in rows] == [("generate", True)]


def test_a_new_version_takes_over_and_a_damaged_one_does_not(
    repository: Path, serve, run, with_popularity
):
    address = serve("--set", "repository.poll_seconds=0.05", env=with_popularity)
    with Client(address) as client:
        assert version(client) == ("1", "a")
        run("gr", "models", "activate", "popular", "2")
        wait_for_version(client, "2")
        assert version(client) == ("2", "c")

        (repository / "popular" / "1" / "model.safetensors").write_bytes(b"damaged")
        refused = run("gr", "models", "rollback", "popular", status=2).stderr
        assert "model.safetensors" in refused
        # Somebody insists: the server, too, keeps what it has.
        (repository / "popular" / "active.json").write_text('{"active": "1"}')
        time.sleep(0.5)
        assert version(client) == ("2", "c")


def version(client: Client) -> tuple[str, object]:
    answer = client.recommend(k=1)
    return answer.stages[0].version, answer.items[0].item_id


def wait_for_version(client: Client, wanted: str) -> None:
    for _ in range(200):
        if version(client)[0] == wanted:
            return
        time.sleep(0.05)
    pytest.fail(f"version {wanted} did not take over within 10 s")


def test_a_plugin_that_fails_to_import_takes_nothing_down(
    repository: Path, serve, run, with_popularity, tmp_path: Path
):
    broken = tmp_path / "broken"
    info = broken / "gr_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gr-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gr]\nbroken = gr_broken\n")
    (broken / "gr_broken.py").write_text("raise RuntimeError('no such luck')\n")
    env = {**with_popularity, "PYTHONPATH": f"{broken}:{with_popularity['PYTHONPATH']}"}

    listed = json.loads(run("gr", "plugins", "list", "--json", env=env).stdout)
    (plugin,) = [plugin for plugin in listed if plugin["name"] == "broken"]
    assert plugin["status"] == "error"
    assert "RuntimeError: no such luck" in plugin["reason"]
    with Client(serve(env=env)) as client:
        assert version(client) == ("1", "a")
    required = ("gr", "serve", "--set", 'plugins.required=["broken"]')
    assert "no such luck" in run(*required, env=env, status=2).stderr
