"""The built-in plugin: what gr-core itself brings, registered as any plugin's."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core.contracts import CacheKind
from gr_core.plugins.descriptors import CacheDescriptor, CommandDescriptor, ObserverDescriptor
from gr_core.plugins.hooks import hookimpl

COMMANDS = tuple(
    CommandDescriptor(name=name, factory=f"gr_core.cli.{module}:{name}", summary=summary)
    for name, module, summary in (
        ("check", "check", "Check this machine: versions, devices, plugins, what is missing."),
        ("plugins", "plugins", "List plugins, what they offer, and why some cannot be used."),
        ("plan", "plan", "Show which chain of plugins would run each model, and why."),
        ("config", "config", "Make, show and validate the configuration."),
        ("models", "models", "List models and versions; activate one or roll back."),
        ("recommend", "recommend", "Recommend once, without a server."),
        ("serve", "serve", "Serve recommendations."),
        ("verify", "verify", "Compare every engine with the float32 reference on a model."),
        ("export", "export", "Turn a model into another format."),
        ("bench", "bench", "Measure this machine's engines on a model."),
    )
)


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return COMMANDS


@hookimpl
def gr_register_caches() -> Iterable[CacheDescriptor]:
    return [
        CacheDescriptor(
            name="memory",
            factory="gr_core.caches.memory:MemoryCache",
            summary="Least recently used, in this process's memory.",
            kinds=(CacheKind.RESULTS.value, CacheKind.EMBEDDINGS.value),
        )
    ]


@hookimpl
def gr_register_observers() -> Iterable[ObserverDescriptor]:
    return [
        ObserverDescriptor(
            name="log",
            factory="gr_core.logs:LogObserver",
            summary="Logs requests, drops and loads; settings: level (info).",
        )
    ]
