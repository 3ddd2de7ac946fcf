"""What a hook returns: frozen descriptors with a lazy factory.

A descriptor says enough to plan with and costs nothing to make: heavy libraries load only when its
factory (``"module:attribute"``) is resolved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

from gr_core.types import Task

API_VERSION = 1
"""Version of the plugin contracts. A descriptor of another major version is refused."""

Probe: TypeAlias = Callable[[], tuple[bool, str]]
"""Says whether a thing is usable on this machine, and why or why not; quick; never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What all descriptors share."""

    name: str
    """Unique among the descriptors of its kind, e.g. ``torch`` among engines."""
    factory: str
    """``"module:attribute"``, imported when first needed."""
    summary: str = ""
    """One line for people."""
    probe: Probe | None = None
    api_version: int = API_VERSION

    def resolve(self) -> Any:
        """Imports and returns the factory."""
        module, _, attribute = self.factory.partition(":")
        return getattr(import_module(module), attribute)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescriptor(Descriptor):
    """An architecture; ``factory(bundle) -> Model``. The name stands in a bundle's config.json."""

    tasks: tuple[Task, ...]
    formats: tuple[str, ...] = ("torch",)
    """Formats of the artifact that a bundle of this architecture already is."""
    revision: str = "1"
    """Artifacts that were made of a model of another revision are made again. The version of the
    plugin will do, whose modules are what exporters compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterDescriptor(Descriptor):
    """Turns artifacts of ``source`` into ``target``; ``factory() -> Exporter``."""

    source: str
    target: str
    tasks: tuple[Task, ...]
    architectures: tuple[str, ...] = ()
    """Architectures that it can export; empty means any."""
    revision: str = "1"
    """Artifacts that an exporter of another revision made are made again. It names the versions of
    libraries whose files do not outlive them."""
    automatic: bool = True
    """Whether the planner may run it at load time without being asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescriptor(Descriptor):
    """Runs artifacts; ``factory() -> Engine | AsyncEngine``."""

    formats: tuple[str, ...]
    tasks: tuple[Task, ...]
    devices: tuple[str, ...]
    """``cpu``, ``cuda``."""
    dtypes: tuple[str, ...]
    """``float32``, ``bfloat16``, ``float16``, ``int8``; the first is the default."""
    priority: int = 0
    """Among feasible engines the planner takes the highest, unless this machine was measured."""
    architectures: tuple[str, ...] = ()
    """Architectures that it can run; empty means any."""
    batches_itself: bool = False
    device_probe: Callable[[str], tuple[bool, str]] | None = None
    """Like ``probe``, for one of the ``devices`` that this machine has, e.g. whether the installed
    library was built for it."""
    device_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Instead of ``dtypes`` on a kind of device, e.g. on ``cuda``, where these differ."""

    def dtypes_on(self, device: str) -> tuple[str, ...]:
        """What it computes in on a device, e.g. ``cuda:1``; the first is the default."""
        return self.device_dtypes.get(device.split(":")[0], self.dtypes)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDescriptor(Descriptor):
    """``factory(capacity_bytes, **options) -> EntryCache | BlockCache``."""

    kinds: tuple[str, ...]
    """What it may hold, see `gr_core.contracts.CacheKind`: ``user_kv`` calls for a `BlockCache`,
    the others for an `EntryCache`."""
    tiers: tuple[str, ...] = ("memory",)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDescriptor(Descriptor):
    """An implementation of an op; ``factory`` is a callable with the op's signature."""

    op: str
    device: str
    """``cpu``, ``cuda``, or ``any`` for what runs wherever its tensors are."""
    dtypes: tuple[str, ...]
    supports: str = ""
    """Shapes that it supports, for people; the callable itself decides."""
    accepts: Callable[[Mapping[str, int]], tuple[bool, str]] | None = None
    """Whether it computes such sizes, by the names that the op gives them, and why not."""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDescriptor(Descriptor):
    """The name is the protocol, e.g. ``grpc``; ``factory(pipeline, settings, observers)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandDescriptor(Descriptor):
    """A sub-command of ``gr``; ``factory`` is a `click.Command`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverDescriptor(Descriptor):
    """Told of requests, batches and loads; ``factory(settings) -> Observer``."""
