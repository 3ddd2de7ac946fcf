"""Bundles: written at once or not at all, and refused where they are not what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gr_core import Task
from gr_core.errors import BundleError
from gr_core.repository import Bundle, BundleSource, Catalogue, write_bundle

WEIGHTS = b"weights" * 100


def write(out_dir: Path, **changes: Any) -> Bundle:
    facts: dict[str, Any] = {
        "name": "mean",
        "version": "1",
        "architecture": "mean",
        "tasks": [Task.RETRIEVE, Task.RANK],
        "config": {"d": 4},
        "catalogue": Catalogue([10, 20], ["ten", "twenty"]),
        "weights": lambda path: path.write_bytes(WEIGHTS),
    }
    return write_bundle(out_dir, **(facts | changes))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "mean" / "1")


def edit(bundle: Bundle, **fields: Any) -> None:
    """Changes fields of the configuration on disk; None removes one."""
    file = bundle.path / "config.json"
    data = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# ── Writing ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read(tmp_path: Path) -> None:
    source = BundleSource("weights.pt", "meta-research", {"num_heads": 2})
    written = write(
        tmp_path / "b",
        features={"signals": []},
        head_weights={"click": 0.5},
        description="Mean of vectors, für alle",
        license="Apache-2.0",
        card="# A card",
        source=source,
        extra_files={"notes.txt": b"hello"},
    )
    read = Bundle.open(tmp_path / "b")
    assert read == written
    assert (read.name, read.version, read.architecture) == ("mean", "1", "mean")
    assert read.tasks == (Task.RETRIEVE, Task.RANK)
    assert read.source == source
    assert read.head_weights == {"click": 0.5}
    assert read.description == "Mean of vectors, für alle"
    assert read.weights_path.read_bytes() == WEIGHTS
    assert read.catalogue().ids.tolist() == [10, 20]
    assert set(read.files) == {
        "MODEL_CARD.md",
        "catalogue.jsonl",
        "model.safetensors",
        "notes.txt",
    }
    read.check_files()


def test_other_users_can_read_the_weights(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.write_bytes(WEIGHTS)
        path.chmod(0o600)

    assert write(tmp_path / "b", weights=private).weights_path.stat().st_mode & 0o044


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        write(tmp_path / "mean" / "1", weights=fail)
    assert everything(tmp_path) == {"mean"}


def test_a_failed_overwrite_leaves_the_old_bundle(bundle: Bundle) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError):
        write(bundle.path, weights=fail, overwrite=True)
    Bundle.open(bundle.path).check_files()
    assert {p.name for p in bundle.path.parent.iterdir()} == {"1"}


def test_overwriting_has_to_be_said(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="exists; choose another folder"):
        write(bundle.path)
    write(bundle.path, description="new", overwrite=True)
    assert Bundle.open(bundle.path).description == "new"
    assert {p.name for p in bundle.path.parent.iterdir()} == {"1"}


def test_an_empty_folder_is_free_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty").check_files()
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="exists"):
        write(tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "a/b", "a\\b", "über", "x" * 129, "-a", "a\n"]
)
def test_names_are_safe_as_folders(tmp_path: Path, name: str) -> None:
    for field in ("name", "version"):
        with pytest.raises(BundleError, match=f"{field}: .* is not a usable name"):
            write(tmp_path / "b", **{field: name})
    assert everything(tmp_path) == set()


# ── Reading ───────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    bundle.weights_path.unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors: missing"):
        Bundle.open(bundle.path).check_files()


def test_a_truncated_file_is_named(bundle: Bundle) -> None:
    bundle.weights_path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(BundleError, match=r"model\.safetensors: 699 bytes, expected 700"):
        Bundle.open(bundle.path).check_files()


def test_an_altered_file_is_named(bundle: Bundle) -> None:
    bundle.weights_path.write_bytes(WEIGHTS[:-1] + b"?")
    with pytest.raises(BundleError, match=r"model\.safetensors: its SHA-256 differs"):
        Bundle.open(bundle.path).check_files()


def test_a_file_that_became_a_folder_is_named(bundle: Bundle) -> None:
    bundle.weights_path.unlink()
    bundle.weights_path.mkdir()
    with pytest.raises(BundleError, match=r"model\.safetensors: missing"):
        Bundle.open(bundle.path).check_files()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"5", b'"text"'])
def test_a_configuration_that_is_no_object_is_refused(bundle: Bundle, content: bytes) -> None:
    (bundle.path / "config.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"config\.json"):
        Bundle.open(bundle.path)


def test_a_configuration_nested_without_end_is_refused(bundle: Bundle) -> None:
    (bundle.path / "config.json").write_text("[" * 200_000)
    with pytest.raises(BundleError, match=r"config\.json"):
        Bundle.open(bundle.path)


def test_a_folder_without_configuration_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle, it has no config\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path / "nowhere")


def test_a_huge_configuration_is_not_read(bundle: Bundle) -> None:
    with (bundle.path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match="larger than"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, "format_version: 2, this release reads 1"),
        ({"format_version": None}, "format_version: None, this release reads 1"),
        ({"name": "../evil"}, "name: '../evil' is not a usable name"),
        ({"name": 5}, "name: 5 is not a usable name"),
        ({"version": None}, "version: None is not a usable name"),
        ({"architecture": None}, "architecture: None, expected a str"),
        ({"tasks": "rank"}, "tasks: 'rank', expected a list"),
        ({"tasks": ["dance"]}, "tasks: 'dance' .*expected .*'retrieve'"),
        ({"tasks": [["rank"]]}, "tasks: "),
        ({"tasks": []}, r"tasks: \[\], expected at least one"),
        ({"config": []}, r"config: \[\], expected a dict"),
        ({"features": 3}, "features: 3, expected a dict"),
        ({"head_weights": {"click": "much"}}, r"head_weights: .*'much'"),
        ({"head_weights": {"click": float("nan")}}, r"head_weights: "),
        ({"source": {"checkpoint": "a"}}, "source: .*importer"),
        ({"source": "a.pt"}, "source: "),
        ({"source": {"checkpoint": 5, "importer": "x"}}, "source: .*5"),
        ({"source": {"checkpoint": "a", "importer": "x", "options": []}}, "source: "),
        ({"files": []}, r"files: \[\], expected a dict"),
        ({"files": {"a": {"bytes": 1}}}, "files: a: expected bytes and sha256"),
        ({"files": {"a": {"bytes": "1", "sha256": "x"}}}, "files: a: expected bytes and sha256"),
        ({"files": {"../../secret": {"bytes": 1, "sha256": "x"}}}, "lies outside the bundle"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}}, "lies outside the bundle"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": "x"}}}, "lies outside the bundle"),
    ],
)
def test_a_wrong_field_is_named(bundle: Bundle, fields: dict[str, Any], message: str) -> None:
    edit(bundle, **fields)
    with pytest.raises(BundleError, match=f"config.json: .*{message}"):
        Bundle.open(bundle.path)


def test_what_is_optional_may_be_left_out(bundle: Bundle) -> None:
    edit(bundle, description=None, license=None, head_weights=None, features=None, files=None)
    read = Bundle.open(bundle.path)
    assert (read.description, read.license, read.head_weights) == ("", "", {})
    read.check_files()


def test_a_bundle_without_its_catalogue_is_refused(bundle: Bundle) -> None:
    edit(bundle, files=None)
    (bundle.path / "catalogue.jsonl").unlink()
    with pytest.raises(BundleError, match=r"catalogue\.jsonl"):
        Bundle.open(bundle.path).catalogue()
