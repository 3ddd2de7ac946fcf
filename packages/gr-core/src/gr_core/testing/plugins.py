"""What every plugin must do, whatever it offers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import ClassVar

import pytest

from gr_core.plugins.descriptors import CommandDescriptor, Descriptor
from gr_core.plugins.hooks import PROJECT
from gr_core.plugins.host import PluginHost, PluginInfo
from gr_core.plugins.registry import KINDS
from gr_core.testing.suite import Suite

_PROBE_S = 30.0
_IMPORTED = """
import importlib, json, sys
import gr_core.builtins, gr_core.plugins.host
before = set(sys.modules)
importlib.import_module(sys.argv[1])
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def check_plugin(module: object, name: str = "plugin") -> Sequence[str]:
    """What is wrong with a plugin's module: misspelled hooks, wrong descriptors; empty if fine."""
    host = PluginHost()
    host.register(module, name)
    (info,) = host.plugins(probe=False)
    return [info.reason] if info.status == "error" else []


class PluginSuite(Suite):
    """Subclass it with ``plugin``, the name of its entry point."""

    plugin: ClassVar[str]

    @pytest.fixture
    def info(self) -> PluginInfo:
        found = [info for info in _host().plugins() if info.name == self.plugin]
        assert len(found) == 1, f"plugin {self.plugin!r} is not installed"
        return found[0]

    @pytest.fixture
    def descriptors(self) -> Sequence[Descriptor]:
        return [o.descriptor for o in _host().registry.offers if o.origin.plugin == self.plugin]

    def test_it_is_sound(self, info: PluginInfo) -> None:
        assert info.status not in ("error", "disabled"), info.reason
        assert info.distribution
        assert info.version

    def test_its_module_imports_nothing_heavy(self) -> None:
        """Only gr_core, its own package and the standard library, so that `gr --help` is quick."""
        (entry_point,) = metadata.entry_points(group=PROJECT, name=self.plugin)
        command = [sys.executable, "-c", _IMPORTED, entry_point.module]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        own = entry_point.module.split(".")[0]
        heavy = [
            name
            for name in json.loads(result.stdout)
            if name not in (own, "gr_core") and name not in sys.stdlib_module_names
        ]
        assert not heavy, f"{entry_point.module} imports {heavy}; import them in the factories"

    def test_it_offers_something_and_says_what(self, descriptors: Sequence[Descriptor]) -> None:
        assert descriptors
        for descriptor in descriptors:
            assert descriptor.summary, f"{descriptor.name} has no summary"
            assert "\n" not in descriptor.summary, f"{descriptor.name}: one line, please"

    def test_its_probes_are_quick_and_give_reasons(self, descriptors: Sequence[Descriptor]) -> None:
        for descriptor in descriptors:
            if descriptor.probe is None:
                continue
            started = time.monotonic()
            ok, reason = descriptor.probe()
            assert time.monotonic() - started < _PROBE_S, descriptor.name
            assert isinstance(ok, bool), descriptor.name
            assert isinstance(reason, str), descriptor.name
            assert ok or reason, f"{descriptor.name} is unusable for no reason"

    def test_its_factories_can_be_imported(self, descriptors: Sequence[Descriptor]) -> None:
        """All that can be used on this machine."""
        import click

        for descriptor in descriptors:
            kind = next(kind for kind, type_ in KINDS.items() if isinstance(descriptor, type_))
            if not getattr(_host().registry, kind).usable(descriptor.name)[0]:
                continue
            made = descriptor.resolve()
            assert callable(made), f"{descriptor.factory} is not callable"
            if isinstance(descriptor, CommandDescriptor):
                assert isinstance(made, click.Command), f"{descriptor.factory} is no click.Command"


@cache
def _host() -> PluginHost:
    return PluginHost.discover()
