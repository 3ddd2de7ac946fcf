"""The plugin host: finds plugins, imports them in isolation, and collects what they offer.

Each plugin gets a pluggy manager of its own, so that one plugin's mistake can only be that
plugin's: a failing import, a misspelled or raising hook, or a wrong descriptor is recorded with
its reason, and what is sound of the plugin stays in use.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from typing import Any

import pluggy

from gr_core.errors import PluginError
from gr_core.plugins import hooks
from gr_core.plugins.descriptors import API_VERSION, Descriptor
from gr_core.plugins.registry import (
    KINDS,
    PROBE_TIMEOUT_S,
    Offer,
    Origin,
    Registry,
    did_you_mean,
)

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "GR_PLUGINS"
BLOCK_VARIABLE = "GR_DISABLED_PLUGINS"
BUILTIN = "core"
BUILTIN_MODULE = "gr_core.builtins"
"""The built-in plugin. Its names are reserved: a clash refuses only the other side."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What became of a plugin, for people and for ``gr plugins list``."""

    name: str
    distribution: str
    version: str
    status: str
    """``ok``; ``partial`` or ``unusable`` if this machine cannot use some or all of what it
    offers; ``error`` if something in it is broken; ``disabled`` if it was not loaded."""
    hooks: Sequence[str]
    """The hooks that it implements."""
    offers: Sequence[str]
    """What it registered and can be used, e.g. ``engine torch``."""
    reason: str
    """Why it is not ``ok``."""
    traceback: str = ""
    """Of the exception that broke it."""


@dataclass
class _Plugin:
    """A plugin as it was found, and what is learned of it."""

    origin: Origin
    load: Callable[[], object]
    disabled: str = ""
    errors: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    cause: BaseException | None = None
    hooks: list[str] = field(default_factory=list)
    offers: list[tuple[str, Descriptor]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.origin.plugin

    @property
    def broken(self) -> str:
        return "; ".join([*self.errors, *self.clashes])

    def fail(self, message: str, cause: BaseException | None = None) -> None:
        self.errors.append(message)
        self.cause = self.cause or cause
        logger.warning("plugin %s: %s", self.name, message)
        if cause is not None:
            logger.debug("plugin %s", self.name, exc_info=cause)


class PluginHost:
    """The plugins of this process. `discover` finds the installed ones."""

    def __init__(self, *, probe_timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._plugins: list[_Plugin] = []
        self._probe_timeout_s = probe_timeout_s
        self._registry: Registry | None = None

    @classmethod
    def discover(
        cls,
        *,
        allow: Iterable[str] | None = None,
        block: Iterable[str] | None = None,
        required: Iterable[str] = (),
        probe_timeout_s: float = PROBE_TIMEOUT_S,
    ) -> PluginHost:
        """Loads the installed plugins: the entry points of the group ``gr``.

        ``allow`` and ``block`` are names of entry points and default to the comma-separated
        environment variables GR_PLUGINS and GR_DISABLED_PLUGINS; what they rule out is never
        imported. The built-in plugin is always allowed, though it can be blocked. Raises
        `PluginError` with its cause if a ``required`` plugin is not installed, ruled out, or
        broken.
        """
        allowed = _from_environment(ALLOW_VARIABLE) if allow is None else frozenset(allow)
        blocked = _from_environment(BLOCK_VARIABLE) if block is None else frozenset(block)
        installed = _entry_points()
        for name in sorted((allowed | blocked) - installed.keys()):
            hint = did_you_mean(name, installed)
            logger.warning("plugin %r is allowed or blocked but not installed.%s", name, hint)

        host = cls(probe_timeout_s=probe_timeout_s)
        for name, entry_points in installed.items():
            owners = " and ".join(sorted(_describe(e) for e in entry_points))
            for entry_point in entry_points:
                plugin = _Plugin(_origin(entry_point), entry_point.load)
                builtin = (name, entry_point.value) == (BUILTIN, BUILTIN_MODULE)
                if name in blocked:
                    plugin.disabled = "blocked"
                elif allowed and name not in allowed and not builtin:
                    plugin.disabled = "not among the allowed plugins"
                elif name == BUILTIN and not builtin:
                    plugin.fail(f"the plugin name {name!r} is reserved for gr-core")
                elif len(entry_points) > 1 and not builtin:
                    plugin.fail(
                        f"the name {name!r} is taken by {owners}; "
                        f"uninstall one of them, or set {BLOCK_VARIABLE}={name} to use neither"
                    )
                host._admit(plugin)
        host._require(required)
        return host

    def register(
        self, module: object, name: str, *, distribution: str = "", version: str = ""
    ) -> None:
        """Adds a module or object with hooks directly, as if it were installed."""
        if any(plugin.name == name for plugin in self._plugins):
            raise PluginError(f"a plugin {name!r} is registered already")
        self._admit(_Plugin(Origin(name, distribution, version), lambda: module))

    @property
    def registry(self) -> Registry:
        """What the plugins offer, without what is broken or clashes."""
        if self._registry is None:
            offers = self._offers()
            troubles = {p.name: p.broken for p in self._plugins if p.broken}
            self._registry = Registry(offers, troubles, self._probe_timeout_s)
        return self._registry

    def plugins(self, *, probe: bool = True) -> Sequence[PluginInfo]:
        """What became of each plugin, by name; without ``probe`` no probe is asked."""
        infos = [self._info(plugin, probe) for plugin in self._plugins]
        return sorted(infos, key=lambda info: (info.name, info.distribution))

    # ── Loading ───────────────────────────────────────────────────────────────────────────────

    def _admit(self, plugin: _Plugin) -> None:
        self._registry = None
        self._plugins.append(plugin)
        if plugin.disabled or plugin.errors:
            return
        try:
            module = plugin.load()
        except (Exception, SystemExit) as error:
            plugin.fail(f"could not be imported: {type(error).__name__}: {error}", error)
            return
        manager = pluggy.PluginManager(hooks.PROJECT)
        manager.add_hookspecs(hooks)
        try:
            manager.register(module, plugin.name)
        except (pluggy.PluginValidationError, ValueError) as error:
            plugin.fail(f"has an invalid hook: {error}", error)
            return
        for problem in _misnamed_hooks(module, manager):
            plugin.fail(problem)
        for caller in sorted(manager.get_hookcallers(module) or (), key=lambda c: c.name):
            if caller.has_spec():
                plugin.hooks.append(caller.name)
                _collect(plugin, caller)

    def _require(self, required: Iterable[str]) -> None:
        _ = self.registry  # settles clashes
        plugins = {plugin.name: plugin for plugin in self._plugins}
        for name in required:
            if name not in plugins:
                raise PluginError(
                    f"the configuration requires the plugin {name!r}, which is not installed; "
                    f"installed are {', '.join(sorted(plugins)) or 'none'}."
                    + did_you_mean(name, plugins)
                )
            if why := plugins[name].disabled or plugins[name].broken:
                raise PluginError(
                    f"the configuration requires the plugin {name!r}, which cannot be used: {why}"
                ) from plugins[name].cause

    # ── What became of it ─────────────────────────────────────────────────────────────────────

    def _offers(self) -> Sequence[Offer]:
        """All offers; the ones whose name clashes are refused."""
        owners: dict[tuple[str, str], list[_Plugin]] = defaultdict(list)
        for plugin in self._plugins:
            plugin.clashes.clear()
            for kind, descriptor in plugin.offers:
                owners[kind, descriptor.name].append(plugin)
        offers = []
        for plugin in self._plugins:
            for kind, descriptor in plugin.offers:
                clash = _clash(kind, descriptor.name, plugin, owners[kind, descriptor.name])
                if clash and clash not in plugin.clashes:
                    plugin.clashes.append(clash)
                    logger.warning("plugin %s: %s", plugin.name, clash)
                offers.append(Offer(kind, descriptor, plugin.origin, clash))
        return offers

    def _info(self, plugin: _Plugin, probe: bool) -> PluginInfo:
        usable: list[str] = []
        labels: dict[str, list[str]] = {}  # of what is unusable, by the reason
        for offer in self.registry.offers:
            if offer.origin != plugin.origin or offer.refused:
                continue
            label = f"{offer.kind.removesuffix('s')} {offer.descriptor.name}"
            shelf = getattr(self.registry, offer.kind)
            ok, why = shelf.usable(offer.descriptor.name) if probe else (True, "")
            if ok:
                usable.append(label)
            else:
                labels.setdefault(why, []).append(label)
        unusable = [f"{', '.join(names)}: {why}" for why, names in labels.items()]
        if plugin.disabled:
            status = "disabled"
        elif plugin.broken:
            status = "error"
        elif unusable:
            status = "partial" if usable else "unusable"
        else:
            status = "ok"
        cause = plugin.cause
        return PluginInfo(
            name=plugin.name,
            distribution=plugin.origin.distribution,
            version=plugin.origin.version,
            status=status,
            hooks=tuple(plugin.hooks),
            offers=tuple(usable),
            reason="; ".join(filter(None, [plugin.disabled, plugin.broken, *unusable])),
            traceback="".join(traceback.format_exception(cause)) if cause else "",
        )


def _from_environment(variable: str) -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(variable, "").split(",")) - {""}


def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Entry points by name, in alphabetical order; the same one found twice counts once."""
    unique: dict[tuple[str, str], metadata.EntryPoint] = {}
    for entry_point in metadata.entry_points(group=hooks.PROJECT):
        unique.setdefault((entry_point.name, entry_point.value), entry_point)
    by_name: dict[str, list[metadata.EntryPoint]] = defaultdict(list)
    for (name, _), entry_point in sorted(unique.items(), key=lambda item: item[0]):
        by_name[name].append(entry_point)
    return by_name


def _origin(entry_point: metadata.EntryPoint) -> Origin:
    dist = entry_point.dist
    return Origin(entry_point.name, dist.name, dist.version) if dist else Origin(entry_point.name)


def _describe(entry_point: metadata.EntryPoint) -> str:
    origin = _origin(entry_point)
    return f"{origin.distribution} {origin.version} ({entry_point.value})"


def _misnamed_hooks(module: object, manager: pluggy.PluginManager) -> list[str]:
    """Functions that were meant to be hooks and would silently never be called."""
    problems = []
    known = [f"gr_register_{kind}" for kind in KINDS]
    callers = {caller.name: caller for caller in manager.get_hookcallers(module) or ()}
    for caller in callers.values():
        optional = all(impl.opts.get("optionalhook") for impl in caller.get_hookimpls())
        if not caller.has_spec() and not optional:
            problems.append(f"there is no hook {caller.name!r}.{did_you_mean(caller.name, known)}")
    for name in dir(module):
        found = getattr(module, name, None)
        marked = hasattr(found, "gr_impl") or hasattr(found, "gr_spec")
        if not name.startswith("gr_register_") or not callable(found) or marked:
            continue
        if name in known:
            problems.append(f"the hook {name!r} is not decorated with gr_core.hookimpl")
        else:
            problems.append(
                f"{name!r} is neither a hook nor decorated with gr_core.hookimpl."
                + did_you_mean(name, known)
            )
    return sorted(problems)


def _collect(plugin: _Plugin, caller: pluggy.HookCaller) -> None:
    kind = caller.name.removeprefix("gr_register_")
    expected = KINDS[kind]
    try:
        for returned in caller():
            if isinstance(returned, Descriptor) or not isinstance(returned, Iterable):
                plugin.fail(
                    f"{caller.name} returned {_shown(returned)}; "
                    f"expected an iterable of {expected.__name__}"
                )
                continue
            for descriptor in returned:
                if problem := _problem(descriptor, expected):
                    plugin.fail(f"{caller.name} returned {problem}")
                else:
                    plugin.offers.append((kind, descriptor))
    except (Exception, SystemExit) as error:
        plugin.fail(f"{caller.name} raised {type(error).__name__}: {error}", error)


def _problem(descriptor: Any, expected: type[Descriptor]) -> str:
    """What is wrong with a descriptor; empty if nothing is."""
    shown = _shown(descriptor)
    if not isinstance(descriptor, expected):
        return f"{shown}; expected {expected.__name__}"
    if descriptor.api_version != API_VERSION:
        return (
            f"{shown} made for version {descriptor.api_version} of the plugin interface; this "
            f"gr-core has version {API_VERSION}: install versions that fit together"
        )
    # Any, because what a stranger's module returns need not have the declared types.
    name: Any = descriptor.name
    factory: Any = descriptor.factory
    probe: Any = descriptor.probe
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{shown}, whose name must be letters, digits, '.', '_' and '-'"
    if not isinstance(factory, str) or not _FACTORY.fullmatch(factory):
        return f"{shown} with factory={factory!r}; expected 'module:attribute'"
    if probe is not None and not callable(probe):
        return f"{shown} with probe={probe!r}; expected a function without arguments"
    for f in fields(descriptor):
        value = getattr(descriptor, f.name)
        if not str(f.type).startswith("tuple["):
            continue
        if not isinstance(value, tuple):
            return f"{shown} with {f.name}={value!r}; expected a tuple such as ({value!r},)"
        if not value and f.default is MISSING:
            return f"{shown} with empty {f.name}"
    return ""


def _shown(value: object) -> str:
    if isinstance(value, Descriptor):
        return f"the {type(value).__name__} {value.name!r}"
    return f"{value!r:.60} of type {type(value).__name__}"


def _clash(kind: str, name: str, plugin: _Plugin, owners: Sequence[_Plugin]) -> str:
    """Why the name cannot be used by this plugin; empty if it is the only one or built in."""
    builtin = [owner for owner in owners if owner.name == BUILTIN and not owner.errors]
    if len(owners) == 1 or plugin in builtin:
        return ""
    thing = f"the {kind.removesuffix('s')} {name!r}"
    if builtin:
        return f"{thing} is reserved for {builtin[0].origin}"
    if all(owner is plugin for owner in owners):
        return f"{thing} is registered more than once by {plugin.origin}"
    both = " and ".join(sorted({str(owner.origin) for owner in owners}))
    others = " or ".join(sorted({owner.name for owner in owners}))
    return (
        f"{thing} is offered by both {both}, so neither is used; "
        f"set {BLOCK_VARIABLE} to {others}, or uninstall one"
    )
