"""Plugins of strangers: the example and what the scaffold makes, installed from their wheels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERACTIONS = (
    "user_id,item_id,title\n1,10,Cats\n2,10,Cats\n3,11,Dogs\n1,12,Birds\n2,11,Dogs\n4,10,Cats\n"
)


def test_the_example_is_found_and_sound(run, with_popularity: Mapping[str, str]):
    listed = json.loads(run("gr", "plugins", "list", "--json", env=with_popularity).stdout)
    plugins = {plugin["name"]: plugin for plugin in listed}
    assert set(plugins) >= {"core", "hstu", "grpc", "popularity"}
    # What is for a GPU, or for vLLM, is not everywhere.
    assert {plugin["status"] for plugin in plugins.values()} <= {"ok", "partial"}
    assert plugins["popularity"]["status"] == "ok"
    popularity = plugins["popularity"]
    assert (popularity["distribution"], popularity["version"]) == ("gr-popularity", "0.1.0")
    assert popularity["offers"] == ["command popularity", "engine popularity", "model popularity"]


def test_the_example_can_be_blocked(run, with_popularity: Mapping[str, str]):
    env = {**with_popularity, "GR_DISABLED_PLUGINS": "popularity"}
    listed = json.loads(run("gr", "plugins", "list", "--json", env=env).stdout)
    (plugin,) = [plugin for plugin in listed if plugin["name"] == "popularity"]
    assert plugin["status"] == "disabled"
    assert "no command 'popularity'" in run("gr", "popularity", "fit", env=env, status=2).stderr


def test_from_interactions_to_recommendations(run, with_popularity, tmp_path: Path):
    (tmp_path / "interactions.csv").write_text(INTERACTIONS)
    run(
        *("gr", "popularity", "fit", "interactions.csv", "--out", "models/popular/1"),
        env=with_popularity,
    )
    (plan, _) = json.loads(run("gr", "plan", "--json", env=with_popularity).stdout)
    assert (plan["name"], plan["model"], plan["engine"]) == ("popular", "popularity", "popularity")
    # Without the plugin the model is there, but nothing can run it.
    run("gr", "models", "list")
    assert "architecture 'popularity' cannot be used" in run("gr", "plan", status=1).stdout


@pytest.mark.parametrize("name", ["trending", "my-engine"])
def test_the_scaffold_makes_a_plugin_that_passes_its_tests(
    name: str,
    run,
    environment: Mapping[str, str],
    install: Callable[[Path], Path],
    tmp_path: Path,
):
    run(sys.executable, str(ROOT / "scripts" / "new_plugin.py"), name)
    package = tmp_path / f"gr-{name}"
    env = {**environment, "PYTHONPATH": str(install(package))}
    listed = json.loads(run("gr", "plugins", "list", "--json", env=env).stdout)
    assert {plugin["name"]: plugin["status"] for plugin in listed}[name] == "ok"
    tests = run(sys.executable, "-m", "pytest", "-q", str(package), env=env).stdout
    assert " passed" in tests
    assert "popularity" not in "".join(file.read_text().lower() for file in package.rglob("*.py"))


@pytest.mark.parametrize("name", ["My_Plugin", "1st", "a--b", "gr-"])
def test_the_scaffold_says_what_a_name_is(name: str, run):
    message = run(sys.executable, str(ROOT / "scripts" / "new_plugin.py"), name, status=2).stderr
    assert f"NAME: {name!r}, expected" in message
