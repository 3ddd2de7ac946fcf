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

from gr_core.contracts import Health
from gr_core.deployment import Deployment, Environment, ModelSpec
from gr_core.errors import ConfigurationError, GrError, NotFound, Unavailable
from gr_core.observers import LoadEvent
from gr_core.repository import ModelRepository

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Slot:
    """The versions of one model that are loaded; ``active`` is one of them."""

    spec: ModelSpec
    active: str = ""
    versions: dict[str, Deployment] = field(default_factory=dict)
    refused: str = ""
    """The version that was last refused; it is not tried again until another one is activated."""


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
            name = slot.spec.name
            try:
                wanted = await asyncio.to_thread(self._repository.active, name)
            except GrError as error:
                logger.warning("%s: keeping version %s: %s", name, slot.active, error)
                continue
            if wanted == slot.active:
                slot.refused = ""
                continue
            if wanted in slot.versions:
                slot.active = wanted
            elif wanted != slot.refused:
                await self._swap(slot, wanted)

    async def _swap(self, slot: _Slot, wanted: str) -> None:
        try:
            new = await self._load(slot.spec, wanted)
        except Exception as error:
            slot.refused = wanted
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
        before = slot.active
        slot.versions[wanted] = new
        slot.active = wanted
        logger.info("%s: version %s took the place of %s", slot.spec.name, wanted, before)
        if before not in slot.spec.versions:
            self._retire(slot.versions.pop(before))

    async def _load(self, spec: ModelSpec, version: str) -> Deployment:
        started = time.monotonic()
        notify = self._environment.observers.notify
        try:
            bundle = await asyncio.to_thread(self._repository.bundle, spec.name, version)
            deployment = await asyncio.to_thread(Deployment.load, bundle, spec, self._environment)
        except Exception as error:
            seconds = time.monotonic() - started
            notify(LoadEvent(spec.name, version, "refused", seconds, str(error)))
            raise
        notify(LoadEvent(spec.name, version, "ready", time.monotonic() - started))
        return deployment

    def _retire(self, deployment: Deployment) -> None:
        async def retire() -> None:
            await deployment.retire()
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
