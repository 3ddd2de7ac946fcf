"""A model repository: a folder of ``name/version/`` bundles, one version of each active."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gr_core.errors import BundleError, NotFound
from gr_core.repository.bundle import CONFIG, Bundle, check_name, is_name

ACTIVE = "active.json"
"""Beside the versions of a model; names the active and the previously active one."""


def locate(path: str | Path) -> Path:
    """A folder by path, or ``package:module/folder`` for one that an installed package ships."""
    text = str(path)
    if not text.startswith("package:"):
        return Path(text).expanduser()
    module, _, inside = text.removeprefix("package:").partition("/")
    try:
        root = Path(str(resources.files(module)))
    except ModuleNotFoundError:
        raise NotFound(f"{text}: the module {module} is not installed") from None
    return root / inside


class ModelRepository:
    """Several models and versions side by side.

    The active version is the one that ``active.json`` names, replaced atomically by `activate`;
    without that file it is the newest in natural order ("10" after "9").
    """

    def __init__(self, path: str | Path) -> None:
        self.path = locate(path)
        if not self.path.is_dir():
            raise NotFound(f"model repository {self.path}: no such folder")

    def names(self) -> Sequence[str]:
        folders = [p for p in self.path.iterdir() if is_name(p.name) and p.is_dir()]
        return sorted(p.name for p in folders if self._versions(p))

    def versions(self, name: str) -> Sequence[str]:
        """Versions of a model in natural order. Raises `NotFound`, listing the models."""
        folder = self.path / check_name("model", name)
        found = self._versions(folder) if folder.is_dir() else []
        if not found:
            raise NotFound(f"model {name!r}: not in {self.path}; there are: {_list(self.names())}")
        return found

    def active(self, name: str) -> str:
        versions = self.versions(name)
        state = self._state(name)
        version = state.get("active", "")
        if version and version not in versions:
            raise NotFound(
                f"{self.path / name / ACTIVE} names version {version!r}, which is not there; "
                f"there are: {_list(versions)}"
            )
        return version or versions[-1]

    def bundle(self, name: str, version: str = "") -> Bundle:
        """Opens a version, the active one by default. Raises `NotFound` or `BundleError`."""
        versions = self.versions(name)
        version = version or self.active(name)
        if version not in versions:
            raise NotFound(
                f"model {name!r} has no version {version!r}; there are: {_list(versions)}"
            )
        bundle = Bundle.open(self.path / name / version)
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(
                f"{bundle.path / CONFIG}: says it is {bundle.name}/{bundle.version}; "
                "the folders' names and the bundle's must agree"
            )
        return bundle

    def changed(self, name: str, version: str) -> int:
        """When the files of a version were last changed, in ns since the Unix epoch."""
        return max(p.stat().st_mtime_ns for p in (self.path / name / version).rglob("*"))

    def activate(self, name: str, version: str) -> str:
        """Makes a complete version the active one, atomically, and returns the one before."""
        self.bundle(name, version).check_files()
        state = self._state(name)
        before = state.get("active") or self.versions(name)[-1]
        if before != version:
            self._write_state(name, {"active": version, "previous": before})
        elif "active" not in state:  # from now on because it was said, not because it is newest
            self._write_state(name, {"active": version})
        return before

    def rollback(self, name: str) -> str:
        """Activates the previously active version and returns it."""
        previous = self._state(name).get("previous", "")
        if not previous:
            raise NotFound(f"model {name!r}: no version was active before {self.active(name)!r}")
        self.activate(name, previous)
        return previous

    def _state(self, name: str) -> dict[str, str]:
        file = self.path / name / ACTIVE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise BundleError(f"{file}: {error}; delete it, and the newest is active") from error
        if not isinstance(state, dict) or not all(isinstance(v, str) for v in state.values()):
            raise BundleError(f"{file}: expected an object of strings")
        return state

    def _write_state(self, name: str, state: dict[str, str]) -> None:
        folder = self.path / name
        handle, temporary = tempfile.mkstemp(prefix=".active-", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / ACTIVE)

    @staticmethod
    def _versions(folder: Path) -> list[str]:
        found = [p.name for p in folder.iterdir() if is_name(p.name) and (p / CONFIG).is_file()]
        return sorted(found, key=lambda version: (_natural(version), version))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
