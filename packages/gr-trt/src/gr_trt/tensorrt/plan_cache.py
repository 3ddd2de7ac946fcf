"""Plans that were built before, in the cache folder, by a digest of all that they depend on.

An entry that is damaged, or not what its name stands for, is built anew. The folder is bounded:
the plans that were not used for longest go first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from gr_core.artifacts import cache_folder
from gr_core.errors import GrError
from gr_trt.tensorrt import plan_file
from gr_trt.tensorrt.graphs import OnnxGraph
from gr_trt.tensorrt.library import Library
from gr_trt.tensorrt.options import BuildOptions
from gr_trt.tensorrt.plan_file import SUFFIX, PlanFacts
from gr_trt.tensorrt.profiles import Profile

logger = logging.getLogger(__name__)

_MIB = 2**20
_NOT_OF_THE_PLAN = ("library", "target", "plan_cache_mib")
"""Options that are in the key by what they lead to, or not at all."""


def folder() -> Path:
    return cache_folder() / "tensorrt" / "plans"


def key(
    graph: OnnxGraph,
    library: Library,
    targets: Sequence[str],
    device: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
) -> str:
    """Hexadecimal: the same for the same plan, whatever folder or machine asks for it."""
    own = {k: v for k, v in asdict(options).items() if k not in _NOT_OF_THE_PLAN}
    facts = [
        plan_file.FORMAT_VERSION,
        graph.digest,
        library.label,
        sorted(targets),
        device,
        plan_file.this_platform(),
        [profile.as_dict() for profile in profiles],
        own,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()


def get(key: str) -> tuple[bytes, PlanFacts] | None:
    """A whole plan, or None; what is damaged is removed."""
    path = _path(key)
    if not path.is_file():
        return None
    try:
        found = plan_file.read(path)
    except GrError as error:
        logger.warning("a plan of the cache is built anew: %s", error)
        _remove(path)
        return None
    os.utime(path)
    return found


def put(key: str, plan: bytes | memoryview, facts: PlanFacts, capacity_mib: int) -> None:
    """Keeps a plan. A cache that cannot be written to is no reason to fail."""
    path = _path(key)
    if facts.bytes > capacity_mib * _MIB:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(capacity_mib * _MIB - facts.bytes)
        plan_file.write(path, plan, facts)
    except (GrError, OSError) as error:
        logger.warning("the plan is not kept for the next time: %s", error)


def refittable(library: Library, facts: PlanFacts) -> tuple[bytes, PlanFacts] | None:
    """A plan of the same graph with other weights, for the same GPU, that can take new ones."""
    for path in _plans():
        try:
            theirs = plan_file.read_facts(path)
            same = (
                theirs.refit
                and theirs.structure == facts.structure
                and theirs.targets == facts.targets
                and theirs.device == facts.device
                and theirs.profiles == facts.profiles
                and (theirs.library, theirs.version) == (library.name, library.version)
                and theirs.platform == facts.platform
            )
            if same:
                return plan_file.read(path)
        except GrError as error:
            logger.info("a plan of the cache is passed over: %s", error)
    return None


def _path(key: str) -> Path:
    return folder() / f"{key[:40]}{SUFFIX}"


def _plans() -> Iterator[Path]:
    yield from folder().glob(f"*{SUFFIX}")


def _make_room(capacity: int) -> None:
    found = []
    for path in _plans():
        try:
            status = path.stat()
        except OSError:  # another process removed it
            continue
        found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= capacity:
            return
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    plan_file.sidecar(path).unlink(missing_ok=True)
