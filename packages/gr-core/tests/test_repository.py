"""Model repositories: what is there, what is active, and changing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core.errors import BundleError, NotFound
from gr_core.repository import ModelRepository, locate

from .helpers import write_model


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    """The model ``mean`` in the versions 1 and 2, and ``other`` in the version 1."""
    for version in ("1", "2"):
        write_model(tmp_path, "mean", version)
    write_model(tmp_path, "other", "1")
    return ModelRepository(tmp_path)


def state(repository: ModelRepository, name: str = "mean") -> dict[str, str]:
    loaded: dict[str, str] = json.loads((repository.path / name / "active.json").read_text())
    return loaded


# ── What is there ─────────────────────────────────────────────────────────────────────────────


def test_models_and_versions(repository: ModelRepository) -> None:
    (repository.path / "README.md").touch()
    (repository.path / "empty").mkdir()
    (repository.path / "mean" / "unfinished").mkdir()
    (repository.path / "mean" / ".3-partial").mkdir()
    (repository.path / "mean" / ".3-partial" / "config.json").touch()
    assert repository.names() == ["mean", "other"]
    assert repository.versions("mean") == ["1", "2"]
    assert repository.bundle("mean").version == "2"
    assert repository.bundle("mean", "1").version == "1"


def test_versions_come_in_natural_order(tmp_path: Path) -> None:
    ordered = ["0.9", "1", "1.0", "1.2", "1.10", "1.10-rc2", "2", "9", "010", "10", "v2", "v10"]
    for version in reversed(ordered):
        write_model(tmp_path, "mean", version)
    repository = ModelRepository(tmp_path)
    assert repository.versions("mean") == ordered
    assert repository.active("mean") == "v10"


def test_versions_that_are_equal_in_natural_order_have_one_all_the_same(tmp_path: Path) -> None:
    equal = ["1", "01", "0001", "001", "00001", "0000001", "000001"]
    for version in equal:
        write_model(tmp_path, "mean", version)
    assert ModelRepository(tmp_path).versions("mean") == sorted(equal)


names = st.from_regex(r"[a-z0-9][a-z0-9.]{0,3}", fullmatch=True)


@given(st.lists(names, unique=True, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_order_depends_on_the_names_alone(
    tmp_path_factory, versions: list[str], random
) -> None:
    orders = []
    for _ in range(2):
        root = tmp_path_factory.mktemp("repository")
        random.shuffle(versions)
        for version in versions:
            folder = root / "m" / version
            folder.mkdir(parents=True)
            (folder / "config.json").touch()
        orders.append(ModelRepository(root).versions("m"))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(versions)


def test_folders_with_unusable_names_are_passed_over(repository: ModelRepository) -> None:
    write_model(repository.path, "mean", "3").path.rename(repository.path / "mean" / "v²")
    write_model(repository.path, "mean2", "1").path.parent.rename(repository.path / "my model")
    assert repository.versions("mean") == ["1", "2"]
    assert repository.names() == ["mean", "other"]


def test_what_is_not_there_lists_what_is(repository: ModelRepository) -> None:
    with pytest.raises(NotFound, match=r"model 'maen': not in .*; there are: mean, other"):
        repository.versions("maen")
    with pytest.raises(NotFound, match=r"model 'mean' has no version '7'; there are: 1, 2"):
        repository.bundle("mean", "7")
    with pytest.raises(NotFound, match="no such folder"):
        ModelRepository(repository.path / "nowhere")


@pytest.mark.parametrize("name", ["../mean", "..", "", "mean/1", "/etc"])
def test_names_never_leave_the_folder(repository: ModelRepository, name: str) -> None:
    inner = ModelRepository(repository.path / "other")
    for there in (repository, inner):
        with pytest.raises(BundleError, match="not a usable name"):
            there.versions(name)


def test_a_bundle_must_be_what_its_folder_says(repository: ModelRepository) -> None:
    (repository.path / "mean" / "2").rename(repository.path / "mean" / "3")
    with pytest.raises(BundleError, match="says it is mean/2; the folders' names"):
        repository.bundle("mean", "3")
    with pytest.raises(BundleError, match="says it is mean/2"):
        repository.activate("mean", "3")


# ── What is active ────────────────────────────────────────────────────────────────────────────


def test_the_newest_is_active_unless_one_was_activated(repository: ModelRepository) -> None:
    assert repository.active("mean") == "2"
    assert repository.activate("mean", "1") == "2"
    assert repository.active("mean") == "1"
    write_model(repository.path, "mean", "3")
    assert repository.active("mean") == "1"
    assert ModelRepository(repository.path).active("mean") == "1"


def test_activating_the_newest_keeps_it_when_a_newer_one_comes(
    repository: ModelRepository,
) -> None:
    assert repository.activate("mean", "2") == "2"
    write_model(repository.path, "mean", "3")
    assert repository.active("mean") == "2"
    with pytest.raises(NotFound, match="no version was active before '2'"):
        repository.rollback("mean")


def test_rollback_goes_back_and_forth(repository: ModelRepository) -> None:
    with pytest.raises(NotFound, match="no version was active before '2'"):
        repository.rollback("mean")
    repository.activate("mean", "1")
    assert repository.rollback("mean") == "2"
    assert repository.rollback("mean") == "1"
    assert repository.active("mean") == "1"
    repository.activate("mean", "1")
    assert repository.rollback("mean") == "2", "activating the active one forgets nothing"


def test_models_are_activated_one_by_one(repository: ModelRepository) -> None:
    repository.activate("mean", "1")
    assert repository.active("other") == "1"
    assert not (repository.path / "other" / "active.json").exists()


def test_a_damaged_version_is_not_activated(repository: ModelRepository) -> None:
    repository.activate("mean", "2")
    weights = repository.path / "mean" / "1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        repository.activate("mean", "1")
    with pytest.raises(NotFound, match="has no version '9'"):
        repository.activate("mean", "9")
    assert repository.active("mean") == "2"


def test_an_active_version_that_is_gone_is_named_and_can_be_replaced(
    repository: ModelRepository,
) -> None:
    (repository.path / "mean" / "active.json").write_text('{"active": "7", "previous": "1"}')
    with pytest.raises(NotFound, match=r"active.json names version '7'.*there are: 1, 2"):
        repository.active("mean")
    with pytest.raises(NotFound, match="names version '7'"):
        repository.bundle("mean")
    assert repository.bundle("mean", "1").version == "1"
    assert repository.activate("mean", "2") == "7"
    assert repository.active("mean") == "2"


def test_one_can_roll_back_from_a_version_that_is_gone(repository: ModelRepository) -> None:
    (repository.path / "mean" / "active.json").write_text('{"active": "7", "previous": "1"}')
    assert repository.rollback("mean") == "1"
    assert repository.active("mean") == "1"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"active": 2}', "\xff"])
def test_a_damaged_active_file_is_named(repository: ModelRepository, content: str) -> None:
    (repository.path / "mean" / "active.json").write_text(content, encoding="latin-1")
    with pytest.raises(BundleError, match=r"active\.json"):
        repository.active("mean")
    assert repository.active("other") == "1"


def test_activation_leaves_only_its_file(repository: ModelRepository) -> None:
    repository.activate("mean", "1")
    assert {p.name for p in (repository.path / "mean").iterdir()} == {"1", "2", "active.json"}
    assert state(repository) == {"active": "1", "previous": "2"}


# ── Where it is ───────────────────────────────────────────────────────────────────────────────


def test_a_repository_that_a_package_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipped_models"
    write_model(package / "bundles", "mean", "1")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shipped_models", raising=False)
    assert ModelRepository("package:shipped_models/bundles").names() == ["mean"]
    assert locate("package:shipped_models") == package
    with pytest.raises(NotFound, match="the module no_such_module is not installed"):
        locate("package:no_such_module/bundles")
    with pytest.raises(NotFound, match="no such folder"):
        ModelRepository("package:shipped_models/nothing")


def test_a_folder_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/models") == tmp_path / "models"
    assert locate(tmp_path) == tmp_path
