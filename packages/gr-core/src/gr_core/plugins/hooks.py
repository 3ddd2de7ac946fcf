"""The hooks that a plugin may implement.

A plugin is a module with functions of these names, each decorated with `hookimpl`, and an entry
point in the group ``gr`` that names the module. All hooks are called once, at start-up, never per
request. A plugin module imports gr_core alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from gr_core.plugins.descriptors import (
    CacheDescriptor,
    CommandDescriptor,
    EngineDescriptor,
    ExporterDescriptor,
    KernelDescriptor,
    ModelDescriptor,
    ObserverDescriptor,
    ServerDescriptor,
)

PROJECT = "gr"
"""Name of the pluggy project and of the entry point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def gr_register_models() -> Iterable[ModelDescriptor]:
    """Architectures that this plugin can load and encode requests for."""
    raise AssertionError


@hookspec
def gr_register_exporters() -> Iterable[ExporterDescriptor]:
    """Ways from one artifact format to another."""
    raise AssertionError


@hookspec
def gr_register_engines() -> Iterable[EngineDescriptor]:
    """Engines that run artifacts."""
    raise AssertionError


@hookspec
def gr_register_caches() -> Iterable[CacheDescriptor]:
    """Bounded stores for results, user state or embeddings."""
    raise AssertionError


@hookspec
def gr_register_kernels() -> Iterable[KernelDescriptor]:
    """Implementations of ops, chosen by device, dtype and priority."""
    raise AssertionError


@hookspec
def gr_register_servers() -> Iterable[ServerDescriptor]:
    """Protocols over which a pipeline can be served."""
    raise AssertionError


@hookspec
def gr_register_commands() -> Iterable[CommandDescriptor]:
    """Sub-commands of ``gr``."""
    raise AssertionError


@hookspec
def gr_register_observers() -> Iterable[ObserverDescriptor]:
    """Observers of requests, batches and loads."""
    raise AssertionError
