"""Versions in service: loading, following the repository, and swapping without dropping a request.

A new version is loaded and warmed up beside the old one, takes its place in one assignment, and
the old one is freed when the last request that uses it has been answered. A version that cannot be
loaded is refused, and the one in service stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gr_core.contracts import Health, Measurement
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.errors import BundleError, ConfigurationError, GrError, NotFound, Unavailable
from gr_core.observers import LoadEvent
from gr_core.repository import Bundle, ModelRepository
from gr_core.types import Task

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Slot:
    """The versions of one model that are loaded; ``active`` is one of them."""

    spec: ModelSpec
    active: str = ""
    versions: dict[str, Deployment] = field(default_factory=dict)
    refused: tuple[str, int] = ("", 0)
    """The version that was last refused and when its files were last changed: it is not tried again
    before it changes or another one is activated."""
    warned: str = ""
    """What was last said of the repository, so that it is not said at every look."""


class Rollout:
    """Keeps the deployments of the served models in step with the repository."""

    def __init__(
        self,
        repository: ModelRepository,
        specs: Sequence[ModelSpec],
        environment: Environment,
        poll_seconds: float,
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ConfigurationError(f"models: a name occurs twice: {', '.join(sorted(names))}")
        self._repository = repository
        self._environment = environment
        self._poll_seconds = poll_seconds
        self._slots = {spec.name: _Slot(spec) for spec in specs}
        self._watcher: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Loads every model; raises the first reason why one cannot be served."""
        try:
            for slot in self._slots.values():
                active = self._repository.active(slot.spec.name)
                for version in slot.spec.versions or (active,):
                    slot.versions[version] = await self._load(slot.spec, version)
                slot.active = active if active in slot.versions else slot.spec.versions[-1]
                _check_alike(slot)
        except BaseException:
            await self.close()
            raise
        if self._poll_seconds > 0:
            self._watcher = asyncio.create_task(self._watch())

    def deployment(self, model: str, version: str = "") -> Deployment:
        """The deployment that answers now. Raises `NotFound` for a version that is not loaded."""
        slot = self._slots[model]
        found = slot.versions.get(version or slot.active)
        if found is None:
            if not slot.versions:
                raise Unavailable(f"model {model!r} is not loaded")
            raise NotFound(
                f"version: {version!r} of {model} is not loaded; there are: "
                f"{', '.join(slot.versions)}"
            )
        return found

    def deployments(self, model: str) -> Sequence[tuple[Deployment, bool]]:
        """The loaded versions of a model, each with whether it is the active one."""
        slot = self._slots[model]
        return [(d, version == slot.active) for version, d in slot.versions.items()]

    def health(self) -> Health:
        for name, slot in self._slots.items():
            active = slot.versions.get(slot.active)
            if active is None:
                return Health(False, f"{name}: not loaded")
            if not (health := active.health()).ok:
                return health
        return Health(True)

    def queue_depths(self) -> dict[str, int]:
        return {
            name: depth
            for slot in self._slots.values()
            for deployment in slot.versions.values()
            for name, depth in deployment.queue_depths().items()
        }

    def measurements(self) -> dict[str, Sequence[Measurement]]:
        return {
            name: measured
            for slot in self._slots.values()
            for deployment in slot.versions.values()
            for name, measured in deployment.measurements().items()
        }

    async def close(self) -> None:
        """Stops watching, waits for requests in flight, frees all deployments."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        for slot in self._slots.values():
            while slot.versions:
                _, deployment = slot.versions.popitem()
                self._retire(deployment)
        await asyncio.gather(*self._retiring)

    async def follow(self) -> None:
        """Loads and swaps in what the repository says is active and is not yet."""
        for slot in self._slots.values():
            try:
                await self._follow(slot)
            except GrError as error:
                _warn(slot, f"version {slot.active} stays: {error}")

    async def _follow(self, slot: _Slot) -> None:
        name = slot.spec.name
        wanted = await asyncio.to_thread(self._repository.active, name)
        if wanted == slot.active:
            slot.refused, slot.warned = ("", 0), ""
        elif wanted in slot.versions:
            logger.info("%s: version %s is active instead of %s", name, wanted, slot.active)
            slot.active = wanted
        elif slot.spec.versions:
            _warn(
                slot,
                f"version {slot.active} stays: version {wanted} was activated, but only "
                f"{', '.join(slot.spec.versions)} are to be served",
            )
        else:
            changed = await asyncio.to_thread(self._repository.changed, name, wanted)
            if slot.refused != (wanted, changed):
                slot.refused = (wanted, changed)  # unless it can be loaded
                await self._swap(slot, wanted)

    async def _swap(self, slot: _Slot, wanted: str) -> None:
        old = slot.versions[slot.active]
        try:
            new = await self._load(slot.spec, wanted, needed=old.tasks)
        except Exception as error:
            logger.log(
                logging.WARNING,
                "%s: version %s refused, version %s stays: %s",
                slot.spec.name,
                wanted,
                slot.active,
                error,
                exc_info=not isinstance(error, GrError),
            )
            return
        slot.versions = {wanted: new}
        slot.active = wanted
        slot.refused = ("", 0)
        logger.info("%s: version %s took the place of %s", slot.spec.name, wanted, old.version)
        self._retire(old)

    async def _load(self, spec: ModelSpec, version: str, needed: Sequence[Task] = ()) -> Deployment:
        """Loads a version on a thread. Raises `BundleError` if it lacks one of the tasks needed."""
        started = time.monotonic()
        notify = self._environment.observers.notify
        try:
            bundle = await asyncio.to_thread(self._repository.bundle, spec.name, version)
            if missing := [task for task in needed if task not in bundle.tasks]:
                raise BundleError(
                    f"{bundle.path}: tasks: it cannot {missing[0]}, which requests rely on"
                )
            deployment = await self._load_on_thread(bundle, spec)
        except Exception as error:
            seconds = time.monotonic() - started
            notify(LoadEvent(spec.name, version, "refused", seconds, str(error)))
            raise
        notify(LoadEvent(spec.name, version, "ready", time.monotonic() - started))
        return deployment

    async def _load_on_thread(self, bundle: Bundle, spec: ModelSpec) -> Deployment:
        loading = asyncio.create_task(
            asyncio.to_thread(Deployment.load, bundle, spec, self._environment)
        )
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: what it still makes is freed.
            with contextlib.suppress(Exception):
                await asyncio.to_thread((await loading).close)
            raise

    def _retire(self, deployment: Deployment) -> None:
        async def retire() -> None:
            try:
                await deployment.retire()
            except Exception:
                logger.exception("%s/%s failed to close", deployment.name, deployment.version)
            self._environment.observers.notify(
                LoadEvent(deployment.name, deployment.version, "unloaded")
            )

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.follow()
            except Exception:
                logger.exception("following the repository failed, trying again")


def _check_alike(slot: _Slot) -> None:
    """Requests may name any of the versions, for whatever the model is said to do."""
    tasks = {version: sorted(d.tasks) for version, d in slot.versions.items()}
    if any(can != tasks[slot.active] for can in tasks.values()):
        listing = "; ".join(f"{version} can {', '.join(can)}" for version, can in tasks.items())
        raise ConfigurationError(
            f"models: {slot.spec.name}: versions: they must have the same tasks, but {listing}"
        )


def _warn(slot: _Slot, text: str) -> None:
    if slot.warned != text:
        slot.warned = text
        logger.warning("%s: %s", slot.spec.name, text)
