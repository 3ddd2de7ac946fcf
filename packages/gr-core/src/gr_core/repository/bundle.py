"""A bundle: one version of a model on disk.

``config.json`` says what it is (architecture, tasks, the architecture's own configuration, feature
schema) and lists the other files with their size and digest; ``model.safetensors`` holds the
weights, ``catalogue.jsonl`` the items, ``MODEL_CARD.md`` what people should know.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from gr_core.errors import BundleError
from gr_core.repository.catalogue import Catalogue
from gr_core.types import Task

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CATALOGUE = "catalogue.jsonl"
CARD = "MODEL_CARD.md"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_CONFIG_BYTES = 16 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_name(value: object) -> TypeGuard[str]:
    """Whether a name or version is safe as a folder's name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def check_name(kind: str, value: object) -> str:
    """The name or version itself. Raises `BundleError` for one that is not `is_name`."""
    if not is_name(value):
        raise BundleError(
            f"{kind}: {value!r} is not a usable name; use letters, digits, '.', '_', '-', "
            "starting with a letter or digit, at most 128"
        )
    return value


@dataclass(frozen=True, slots=True)
class BundleSource:
    """Where the weights come from, in the order in which they are tried.

    ``checkpoint`` is an open checkpoint, a path relative to the bundle or absolute, that
    ``importer`` reads with ``options``. Where it is absent or unusable, the bundle's own weights
    are the fallback.
    """

    checkpoint: str
    importer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The opened configuration of a bundle; weights are read by the architecture's plugin."""

    path: Path
    name: str
    version: str
    architecture: str
    tasks: tuple[Task, ...]
    config: Mapping[str, Any]
    """The architecture's own configuration."""
    features: Mapping[str, Any]
    """The feature schema: signals, user, context and candidate features."""
    head_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the heads in a ranked item's score; empty means all alike."""
    description: str = ""
    license: str = ""
    source: BundleSource | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size in bytes and SHA-256 of every other file."""

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    @property
    def identity(self) -> bytes:
        """16 bytes, a digest of all that the bundle says and of the files that it lists.

        What a ``source`` outside of the bundle holds is not part of it.
        """
        facts = [self.name, self.version, self.architecture, self.config, self.features, self.files]
        text = json.dumps(facts, sort_keys=True, default=dict)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def catalogue(self) -> Catalogue:
        return Catalogue.read(self.path / CATALOGUE)

    def check_files(self) -> None:
        """Raises `BundleError` for a file that is missing, truncated or altered."""
        for name, facts in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{path}: missing; {CONFIG} lists it; copy the bundle again")
            size = path.stat().st_size
            if size != facts["bytes"]:
                raise BundleError(
                    f"{path}: {size} bytes, expected {facts['bytes']}; copy the bundle again"
                )
            if _digest(path) != facts["sha256"]:
                raise BundleError(
                    f"{path}: its SHA-256 differs from the one in {CONFIG}; copy the bundle again"
                )

    @staticmethod
    def open(path: Path) -> Bundle:
        """Reads ``config.json``. Raises `BundleError`, naming the file and the field."""
        file = path / CONFIG
        try:
            if file.stat().st_size > _MAX_CONFIG_BYTES:
                raise BundleError(f"{file}: larger than {_MAX_CONFIG_BYTES} bytes")
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{path}: not a bundle, it has no {CONFIG}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file}: {error}") from error
        return _from_json(path, file, data)


def _from_json(path: Path, file: Path, data: Any) -> Bundle:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = data.get(key, default)
        if not isinstance(value, kind):
            raise BundleError(f"{file}: {key}: {value!r}, expected a {kind.__name__}")
        return value

    if not isinstance(data, dict):
        raise BundleError(f"{file}: expected an object")
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{file}: format_version: {data.get('format_version')!r}, "
            f"this release reads {FORMAT_VERSION}"
        )
    try:
        tasks = tuple(Task(t) for t in get("tasks", list))
    except ValueError as error:
        raise BundleError(f"{file}: tasks: {error}, expected {[t.value for t in Task]}") from None
    if not tasks:
        raise BundleError(f"{file}: tasks: [], expected at least one of {[t.value for t in Task]}")
    source = data.get("source")
    head_weights = get("head_weights", dict, {})
    for head, weight in head_weights.items():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise BundleError(f"{file}: head_weights: {head}: {weight!r}, expected a number")
    files = get("files", dict, {})
    for name, facts in files.items():
        inside = Path(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise BundleError(f"{file}: files: {name!r} lies outside the bundle")
        found = facts if isinstance(facts, dict) else {}
        if [type(found.get(key)) for key in ("bytes", "sha256")] != [int, str]:
            raise BundleError(f"{file}: files: {name}: expected bytes and sha256")
    return Bundle(
        path=path,
        name=check_name(f"{file}: name", data.get("name")),
        version=check_name(f"{file}: version", data.get("version")),
        architecture=get("architecture", str),
        tasks=tasks,
        config=get("config", dict),
        features=get("features", dict, {}),
        head_weights=head_weights,
        description=get("description", str, ""),
        license=get("license", str, ""),
        source=None if source is None else _source(file, source),
        files=files,
    )


def _source(file: Path, data: Any) -> BundleSource:
    try:
        source = BundleSource(**data)
    except TypeError as error:
        raise BundleError(f"{file}: source: {error}") from None
    for name, kind in (("checkpoint", str), ("importer", str), ("options", dict)):
        value = getattr(source, name)
        if not isinstance(value, kind):
            raise BundleError(f"{file}: source: {name}: {value!r}, expected a {kind.__name__}")
    return source


def write_bundle(
    out_dir: Path,
    *,
    name: str,
    version: str,
    architecture: str,
    tasks: Sequence[Task],
    config: Mapping[str, Any],
    catalogue: Catalogue,
    weights: Callable[[Path], None],
    features: Mapping[str, Any] | None = None,
    head_weights: Mapping[str, float] | None = None,
    description: str = "",
    license: str = "",
    card: str = "",
    source: BundleSource | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Writes a bundle to ``out_dir`` at once or not at all.

    ``weights`` is called with the path to write ``model.safetensors`` to. ``extra_files`` are
    written beside it by name. Raises `BundleError` if ``out_dir`` exists and not ``overwrite``.
    """
    check_name("name", name)
    check_name("version", version)
    taken = any(out_dir.iterdir()) if out_dir.is_dir() else out_dir.exists()
    if taken and not overwrite:
        raise BundleError(f"{out_dir}: exists; choose another folder, or say --overwrite")
    with atomic_folder(out_dir) as partial:
        weights(partial / WEIGHTS)
        # Some writers make files that only their owner can read; a server is another user.
        (partial / WEIGHTS).chmod(0o644)
        catalogue.write(partial / CATALOGUE)
        if card:
            (partial / CARD).write_text(card, encoding="utf-8")
        for file, content in (extra_files or {}).items():
            (partial / file).write_bytes(content)
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "version": version,
            "architecture": architecture,
            "tasks": [t.value for t in tasks],
            "description": description,
            "license": license,
            "config": dict(config),
            "features": dict(features or {}),
            "head_weights": dict(head_weights or {}),
            "files": {
                f.name: {"bytes": f.stat().st_size, "sha256": _digest(f)}
                for f in sorted(partial.iterdir())
            },
        }
        if source is not None:
            data["source"] = {
                "checkpoint": source.checkpoint,
                "importer": source.importer,
                "options": dict(source.options),
            }
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
    return Bundle.open(out_dir)


def with_files(bundle: Bundle, files: Mapping[str, bytes]) -> Bundle:
    """Adds files beside the weights, or replaces them, at once or not at all.

    Everything else stays as it is, its digests too. Raises `BundleError` for a bundle whose files
    are not those that it lists, and for ``config.json`` itself.
    """
    for name in files:
        check_name("file", name)
        if name == CONFIG:
            raise BundleError(f"{CONFIG}: is written from the other files; change those")
    bundle.check_files()
    data = json.loads((bundle.path / CONFIG).read_text(encoding="utf-8"))
    with atomic_folder(bundle.path) as partial:
        shutil.copytree(bundle.path, partial, dirs_exist_ok=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
            listed = {"bytes": len(content), "sha256": _digest(partial / name)}
            data["files"] = dict(sorted({**data.get("files", {}), name: listed}.items()))
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
    return Bundle.open(bundle.path)


@contextmanager
def room_at(path: Path) -> Iterator[None]:
    """A full disk, which is nobody's fault of ours, as a `BundleError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BundleError(
            f"{path}: no room ({error.strerror}); free some, or write to another disk; "
            "nothing half-written is left"
        ) from error


@contextmanager
def atomic_folder(out_dir: Path) -> Iterator[Path]:
    """A new folder beside ``out_dir`` that takes its place when the block ends without an error.

    Raises `BundleError` where the disk is full.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        with room_at(out_dir):
            yield partial
        partial.chmod(0o755)
        if out_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-old-", dir=out_dir.parent))
            os.replace(out_dir, old / "bundle")
            os.replace(partial, out_dir)
            shutil.rmtree(old)
        else:
            os.replace(partial, out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
