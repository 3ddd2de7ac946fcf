"""The registry: what the plugins offer, by kind and name, and what of it this machine can use.

Probes run when something is first asked for, one at a time and each in a thread of its own with a
time limit, so that neither a slow nor a broken one can stop the host.
"""

from __future__ import annotations

import difflib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gr_core.errors import PluginError
from gr_core.plugins.descriptors import (
    CacheDescriptor,
    CommandDescriptor,
    Descriptor,
    EngineDescriptor,
    ExporterDescriptor,
    KernelDescriptor,
    ModelDescriptor,
    ObserverDescriptor,
    Probe,
    ServerDescriptor,
)

logger = logging.getLogger(__name__)

D = TypeVar("D", bound=Descriptor)

PROBE_TIMEOUT_S = 20.0
"""A probe may import a heavy library; one that takes longer makes its descriptor unusable."""

KINDS: Mapping[str, type[Descriptor]] = {
    "models": ModelDescriptor,
    "exporters": ExporterDescriptor,
    "engines": EngineDescriptor,
    "caches": CacheDescriptor,
    "kernels": KernelDescriptor,
    "servers": ServerDescriptor,
    "commands": CommandDescriptor,
    "observers": ObserverDescriptor,
}
"""What can be registered: ``gr_register_<kind>`` returns descriptors of this type."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a descriptor comes from."""

    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        if not self.distribution:
            return f"plugin {self.plugin!r}"
        return f"{self.distribution} {self.version} (plugin {self.plugin!r})"


@dataclass(frozen=True, slots=True)
class Offer:
    """A descriptor with its kind, its origin, and why it was refused, if it was."""

    kind: str
    descriptor: Descriptor
    origin: Origin
    refused: str = ""


def run_probe(probe: Probe | None, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[bool, str]:
    """The probe's answer; an exception, a wrong answer or none in time means unusable."""
    if probe is None:
        return True, ""
    answers: list[tuple[bool, str]] = []

    def ask() -> None:
        try:
            ok, reason = probe()
            answers.append((bool(ok), str(reason)))
        except BaseException as error:  # a probe must not raise, and none can end the host
            answers.append((False, f"its probe raised {type(error).__name__}: {error}"))

    thread = threading.Thread(target=ask, name="gr-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else (False, f"its probe did not answer within {timeout_s:g} s")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to append to a message, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class Offers(Generic[D]):
    """The descriptors of one kind by name, in alphabetical order. Iteration gives usable names."""

    def __init__(
        self, kind: str, offers: Sequence[Offer], troubles: Mapping[str, str], timeout_s: float
    ) -> None:
        self.kind = kind.removesuffix("s")
        self._timeout_s = timeout_s
        self._troubles = troubles
        self._sound: dict[str, D] = {}
        self._origins: dict[str, Origin] = {}
        self._refused: dict[str, str] = {}
        self._answers: dict[str, tuple[bool, str]] = {}
        for offer in sorted(offers, key=lambda o: o.descriptor.name):
            name = offer.descriptor.name
            if offer.refused:
                self._refused[name] = offer.refused
            else:
                assert name not in self._sound, f"two sound offers of {self.kind} {name!r}"
                self._sound[name] = offer.descriptor  # type: ignore[assignment]
                self._origins[name] = offer.origin
        for name in self._sound:
            self._refused.pop(name, None)

    def declared(self) -> Sequence[D]:
        """All sound descriptors, without asking their probes."""
        return tuple(self._sound.values())

    def usable(self, name: str) -> tuple[bool, str]:
        """Whether a descriptor is usable on this machine, and why or why not. Asks its probe."""
        if name in self._refused:
            return False, self._refused[name]
        if name not in self._sound:
            return False, f"no {self.kind} of this name is installed"
        if name not in self._answers:
            self._answers[name] = run_probe(self._sound[name].probe, self._timeout_s)
            if not self._answers[name][0]:
                logger.info("%s %s is unusable: %s", self.kind, name, self._answers[name][1])
        return self._answers[name]

    def origin(self, name: str) -> Origin:
        return self._origins[name]

    def unusable(self) -> Mapping[str, str]:
        """Why each unusable name is so. Asks all probes."""
        names = sorted({*self._sound, *self._refused})
        return {name: self.usable(name)[1] for name in names if not self.usable(name)[0]}

    def get(self, name: str) -> D | None:
        return self._sound[name] if self.usable(name)[0] else None

    def values(self) -> Sequence[D]:
        """The usable descriptors."""
        return tuple(self._sound[name] for name in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._sound if self.usable(name)[0])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.usable(name)[0]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> D:
        """The usable descriptor of this name; raises `PluginError` that lists the alternatives."""
        ok, reason = self.usable(name)
        if ok:
            return self._sound[name]
        raise PluginError(
            f"{self.kind} {name!r} cannot be used: {reason}. {self.alternatives(name)}"
        )

    def alternatives(self, name: str) -> str:
        """What could be used instead."""
        return f"Usable {self.kind}s: {', '.join(self) or 'none'}. {self.hint(name)}".rstrip()

    def hint(self, name: str) -> str:
        """The name that may have been meant, and which plugins failed and so offer nothing."""
        known = {*self._sound, *self._refused}
        hint = "" if name in known else did_you_mean(name, known).lstrip()
        failed = "; ".join(f"{plugin}: {why}" for plugin, why in self._troubles.items())
        return f"{hint} Plugins that failed: {failed}".lstrip() if failed else hint


@dataclass(frozen=True)
class Registry:
    """Everything that plugins offer, by kind. ``troubles`` says which plugins failed, and why."""

    offers: Sequence[Offer] = ()
    troubles: Mapping[str, str] = field(default_factory=dict)
    probe_timeout_s: float = PROBE_TIMEOUT_S

    models: Offers[ModelDescriptor] = field(init=False)
    exporters: Offers[ExporterDescriptor] = field(init=False)
    engines: Offers[EngineDescriptor] = field(init=False)
    caches: Offers[CacheDescriptor] = field(init=False)
    kernels: Offers[KernelDescriptor] = field(init=False)
    servers: Offers[ServerDescriptor] = field(init=False)
    commands: Offers[CommandDescriptor] = field(init=False)
    observers: Offers[ObserverDescriptor] = field(init=False)
    _devices: dict[tuple[str, str], tuple[bool, str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            of_kind = [offer for offer in self.offers if offer.kind == kind]
            shelf: Offers[Descriptor] = Offers(kind, of_kind, self.troubles, self.probe_timeout_s)
            object.__setattr__(self, kind, shelf)

    def device_usable(self, engine: EngineDescriptor, device: str) -> tuple[bool, str]:
        """Whether an engine can use a device, as its ``device_probe`` says."""
        if (engine.name, device) not in self._devices:
            probe = engine.device_probe
            ask = functools.partial(probe, device) if probe else None
            self._devices[engine.name, device] = run_probe(ask, self.probe_timeout_s)
        return self._devices[engine.name, device]

    @staticmethod
    def of(*descriptors: Descriptor, probe_timeout_s: float = PROBE_TIMEOUT_S) -> Registry:
        """A registry of descriptors made by hand, for tests and scripts."""
        kind_of = {type_: kind for kind, type_ in KINDS.items()}
        offers = [Offer(kind_of[type(d)], d, Origin("direct")) for d in descriptors]
        return Registry(offers, probe_timeout_s=probe_timeout_s)
