"""Caches that ship with gr-core, and how caches are made from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gr_core.contracts import Cache, CacheKind
from gr_core.errors import ConfigurationError
from gr_core.plugins.registry import Registry

if TYPE_CHECKING:
    from gr_core.config import CacheSection

AUTO, OFF = "auto", "off"


def open_caches(sections: Mapping[CacheKind, CacheSection], registry: Registry) -> dict[str, Cache]:
    """The caches of a configuration, by what they hold.

    K and V of histories are cached without being asked, where a plugin can: unlike results, which
    repeat only where whole requests do, they serve every user who returns.

    Raises `ConfigurationError` for a cache that cannot hold it and for options that it does not
    know or cannot use; then none stays open.
    """
    caches: dict[str, Cache] = {}
    if CacheKind.USER_KV not in sections and _able(CacheKind.USER_KV, registry):
        from gr_core.config import CacheSection

        sections = {**sections, CacheKind.USER_KV: CacheSection()}
    try:
        for kind, section in sections.items():
            if section.cache != OFF:
                caches[kind] = _open(kind, section, registry)
    except BaseException:
        for cache in caches.values():
            cache.close()
        raise
    return caches


def _able(kind: CacheKind, registry: Registry) -> list[str]:
    return [name for name in registry.caches if kind in registry.caches[name].kinds]


def _open(kind: CacheKind, section: CacheSection, registry: Registry) -> Cache:
    able = _able(kind, registry)
    if section.cache == AUTO and not able:
        raise ConfigurationError(f"cache.{kind}: no installed plugin offers a cache of {kind}")
    descriptor = registry.caches[able[0] if section.cache == AUTO else section.cache]
    if kind not in descriptor.kinds:
        raise ConfigurationError(
            f"cache.{kind}.cache: {section.cache!r} holds {', '.join(descriptor.kinds)}; "
            f"for {kind} there are: {', '.join(able) or 'none installed'}"
        )
    factory = descriptor.resolve()
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = [name for name in section.options if name not in known]
    if unknown and not takes_any:
        raise ConfigurationError(
            f"cache.{kind}.options: {section.cache!r} does not know {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    try:
        cache: Cache = factory(section.capacity_bytes, **section.options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"cache.{kind}: {error}") from error
    return cache
