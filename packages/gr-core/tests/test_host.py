"""The plugin host against distributions that are really installed in a folder on sys.path."""

from __future__ import annotations

import importlib
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import (
    API_VERSION,
    EngineDescriptor,
    ModelDescriptor,
    ObserverDescriptor,
    Task,
    hookimpl,
)
from gr_core.errors import PluginError
from gr_core.plugins.host import PluginHost, PluginInfo

ENGINE = """
    from gr_core import EngineDescriptor, Task, hookimpl

    @hookimpl
    def gr_register_engines():
        return [EngineDescriptor(name="{name}", factory="nowhere:make", formats=("torch",),
            tasks=(Task.RANK,), devices=("cpu",), dtypes=("float32",))]
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with entry points and one module for each into a folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("GR_PLUGINS", raising=False)
    monkeypatch.delenv("GR_DISABLED_PLUGINS", raising=False)
    before = set(sys.modules)

    def install(distribution: str, modules: Mapping[str, str], version: str = "1.0") -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = []
        for name, source in modules.items():
            module = f"{distribution.replace('-', '_')}_{name}"
            tmp_path.joinpath(f"{module}.py").write_text(textwrap.dedent(source))
            lines.append(f"{name} = {module}\n")
        info.joinpath("entry_points.txt").write_text("[gr]\n" + "".join(lines))
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if hasattr(sys.modules[name], "__file__") and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def info_of(host: PluginHost, name: str) -> PluginInfo:
    (info,) = [info for info in host.plugins() if info.name == name]
    return info


def discover(*names: str, **options: object) -> PluginHost:
    return PluginHost.discover(allow=names, **options)  # type: ignore[arg-type]


def test_a_sound_plugin_is_found_with_its_distribution(install: Install) -> None:
    install("acme", {"fast": ENGINE.format(name="fast")}, version="3.2")
    host = discover("fast")
    info = info_of(host, "fast")
    assert (info.distribution, info.version, info.status) == ("acme", "3.2", "ok")
    assert info.hooks == ("gr_register_engines",)
    assert info.offers == ("engine fast",)
    assert host.registry.engines["fast"].formats == ("torch",)
    assert str(host.registry.engines.origin("fast")) == "acme 3.2 (plugin 'fast')"


def test_a_failing_import_is_isolated_and_keeps_its_traceback(install: Install) -> None:
    install("broken", {"bad": "import no_such_library\n"})
    install("acme", {"fast": ENGINE.format(name="fast")})
    host = discover("bad", "fast")
    info = info_of(host, "bad")
    assert info.status == "error"
    assert info.reason == (
        "could not be imported: ModuleNotFoundError: No module named 'no_such_library'"
    )
    assert "import no_such_library" in info.traceback
    assert "fast" in host.registry.engines


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "raise RuntimeError('x')", "x = ("])
def test_no_import_takes_the_host_down(install: Install, source: str) -> None:
    install("broken", {"bad": source})
    assert info_of(discover("bad"), "bad").status == "error"


def test_a_required_plugin_that_fails_raises_with_its_cause(install: Install) -> None:
    install("broken", {"bad": "import no_such_library\n"})
    with pytest.raises(PluginError, match=r"requires the plugin 'bad'.*no_such_library") as caught:
        discover("bad", required=["bad"])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_required_plugin_must_be_installed_and_allowed(install: Install) -> None:
    install("acme", {"fast": ENGINE.format(name="fast")})
    with pytest.raises(PluginError, match=r"'fasd', which is not installed.*Did you mean 'fast'"):
        discover("fast", required=["fasd"])
    with pytest.raises(PluginError, match="'fast', which cannot be used: blocked"):
        PluginHost.discover(block=["fast"], required=["fast"])


def test_what_is_ruled_out_is_never_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", {"one": "raise RuntimeError", "two": ENGINE.format(name="two")})
    monkeypatch.setenv("GR_DISABLED_PLUGINS", "one, something")
    monkeypatch.setenv("GR_PLUGINS", "one,two")
    host = PluginHost.discover()
    assert info_of(host, "one").status == "disabled"
    assert "acme_one" not in sys.modules
    assert list(host.registry.engines) == ["two"]
    assert info_of(host, "core").status == "ok", "the built-in plugin is always allowed"
    monkeypatch.setenv("GR_DISABLED_PLUGINS", "core")
    assert info_of(PluginHost.discover(), "core").status == "disabled"


def test_the_same_entry_point_found_twice_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", {"fast": ENGINE.format(name="fast")})
    install("acme-copy", {})
    copy = tmp_path / "acme_copy-1.0.dist-info" / "entry_points.txt"
    copy.write_text("[gr]\nfast = acme_fast\n")
    assert info_of(discover("fast"), "fast").status == "ok"


def test_two_plugins_of_one_name_are_both_refused(install: Install) -> None:
    install("acme", {"fast": ENGINE.format(name="a")})
    install("zeta", {"fast": ENGINE.format(name="b")}, version="2.0")
    host = discover("fast")
    infos = [info for info in host.plugins() if info.name == "fast"]
    assert [info.status for info in infos] == ["error", "error"]
    for info in infos:
        assert "acme 1.0" in info.reason
        assert "zeta 2.0" in info.reason
    assert not list(host.registry.engines)


def test_two_descriptors_of_one_name_are_both_unusable(install: Install) -> None:
    install("acme", {"one": ENGINE.format(name="fast")})
    install("zeta", {"two": ENGINE.format(name="fast") + "\n"})
    host = discover("one", "two")
    with pytest.raises(PluginError, match=r"acme 1\.0.*zeta 1\.0.*neither is used"):
        host.registry.engines["fast"]
    assert {info_of(host, name).status for name in ("one", "two")} == {"error"}
    with pytest.raises(PluginError, match=r"acme 1\.0.*zeta 1\.0"):
        discover("one", "two", required=["two"])


def test_names_of_the_built_in_plugin_cannot_be_taken(install: Install) -> None:
    taker = """
        from gr_core import CacheDescriptor, hookimpl

        @hookimpl
        def gr_register_caches():
            return [CacheDescriptor(name="memory", factory="nowhere:make", kinds=("results",))]
    """
    install("acme", {"taker": taker, "core": ENGINE.format(name="x")})
    host = discover("taker", "core")
    assert host.registry.caches["memory"].factory == "gr_core.caches.memory:MemoryCache"
    assert "is reserved for gr-core" in info_of(host, "taker").reason
    usurper = next(i for i in host.plugins() if i.name == "core" and i.distribution == "acme")
    assert usurper.status == "error"
    assert "'core' is reserved for gr-core" in usurper.reason


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "@hookimpl\ndef gr_register_engine(): return []",
            "there is no hook 'gr_register_engine'. Did you mean 'gr_register_engines'?",
        ),
        (
            "def gr_register_engines(): return []",
            "the hook 'gr_register_engines' is not decorated with gr_core.hookimpl",
        ),
        (
            "def gr_register_modles(): return []",
            "'gr_register_modles' is neither a hook nor decorated with gr_core.hookimpl. "
            "Did you mean 'gr_register_models'?",
        ),
        ("@hookimpl\ndef gr_register_engines(registry): return []", "has an invalid hook"),
        (
            "@hookimpl\ndef gr_register_engines(): return 7",
            "gr_register_engines returned 7 of type int; expected an iterable of EngineDescriptor",
        ),
        (
            "@hookimpl\ndef gr_register_engines(): raise KeyError('x')",
            "gr_register_engines raised KeyError: 'x'",
        ),
        (
            "@hookimpl\ndef gr_register_engines():\n    yield 1\n    raise KeyError('late')",
            "raised KeyError: 'late'",
        ),
        (
            "@hookimpl\ndef gr_register_engines():"
            "\n    return [ObserverDescriptor(name='o', factory='a:b')]",
            "returned the ObserverDescriptor 'o'; expected EngineDescriptor",
        ),
        (
            "@hookimpl\ndef gr_register_observers():"
            "\n    return ObserverDescriptor(name='o', factory='a:b')",
            "returned the ObserverDescriptor 'o'; expected an iterable of ObserverDescriptor",
        ),
    ],
)
def test_a_mistake_in_a_hook_is_named_and_the_rest_stays_in_use(
    install: Install, source: str, expected: str
) -> None:
    rest = """
from gr_core import ModelDescriptor, ObserverDescriptor, Task, hookimpl

@hookimpl
def gr_register_models():
    return [ModelDescriptor(name="m", factory="a:b", tasks=(Task.RANK,))]
"""
    install("acme", {"odd": rest + source})
    host = discover("odd")
    info = info_of(host, "odd")
    assert info.status == "error"
    assert expected in info.reason
    if "invalid hook" not in expected:  # pluggy registers all of a module's hooks, or none
        assert "m" in host.registry.models


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"api_version": API_VERSION + 1}, "version 2 of the plugin interface"),
        ({"name": "two words"}, "whose name must be"),
        ({"name": 3}, "whose name must be"),
        ({"factory": "module.attribute"}, "expected 'module:attribute'"),
        ({"probe": True}, "expected a function"),
        ({"tasks": "rank"}, r"tasks='rank'; expected a tuple such as ('rank',)"),
        ({"dtypes": ()}, "empty dtypes"),
    ],
)
def test_a_wrong_descriptor_is_refused(changes: dict[str, object], expected: str) -> None:
    values: dict[str, object] = {
        "name": "e",
        "factory": "a:b",
        "formats": ("torch",),
        "tasks": (Task.RANK,),
        "devices": ("cpu",),
        "dtypes": ("float32",),
    }
    host = host_of(engines=[EngineDescriptor(**(values | changes))])  # type: ignore[arg-type]
    assert expected in info_of(host, "test").reason
    assert not list(host.registry.engines)


def host_of(**offers: list[object]) -> PluginHost:
    """A host with one plugin, registered directly, that returns these descriptors."""
    plugin = SimpleNamespace()
    for kind, descriptors in offers.items():
        plugin.__dict__[f"gr_register_{kind}"] = hookimpl(_returning(descriptors))
    host = PluginHost(probe_timeout_s=0.2)
    host.register(plugin, "test")
    return host


def _returning(value: object) -> Callable[[], object]:
    return lambda: value


def observer(name: str, probe: object = None) -> ObserverDescriptor:
    return ObserverDescriptor(name=name, factory="a:b", probe=probe)  # type: ignore[arg-type]


def _raise() -> tuple[bool, str]:
    raise OSError("no driver")


def _exit() -> tuple[bool, str]:
    sys.exit(1)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (lambda: (False, "no device"), "no device"),
        (lambda: time.sleep(60), "its probe did not answer within 0.2 s"),
        (_raise, "its probe raised OSError: no driver"),
        (_exit, "its probe raised SystemExit: 1"),
        (lambda: None, "its probe raised TypeError"),
    ],
)
def test_a_bad_probe_makes_its_descriptor_unusable(probe: object, reason: str) -> None:
    host = host_of(observers=[observer("bad", probe), observer("good")])
    assert list(host.registry.observers) == ["good"]
    assert host.registry.observers.unusable()["bad"].startswith(reason)
    info = info_of(host, "test")
    assert info.status == "partial"
    assert reason in info.reason
    with pytest.raises(PluginError, match=r"observer 'bad' cannot be used.*Usable.*: good"):
        host.registry.observers["bad"]


def test_a_hanging_probe_of_an_installed_plugin(install: Install) -> None:
    hanging = "import time\n" + textwrap.dedent(ENGINE.format(name="slow")).replace(
        "tasks=", "probe=lambda: time.sleep(60), tasks="
    )
    install("sleepy", {"sleepy": hanging})
    install("acme", {"fast": ENGINE.format(name="fast")})
    started = time.monotonic()
    host = discover("sleepy", "fast", probe_timeout_s=0.3)
    info = info_of(host, "sleepy")
    assert (info.status, info.offers) == ("unusable", ())
    assert info.reason == "engine slow: its probe did not answer within 0.3 s"
    assert list(host.registry.engines) == ["fast"]
    assert time.monotonic() - started < 5


def test_probes_run_when_asked_for_and_once() -> None:
    asked = []
    host = host_of(observers=[observer("o", lambda: (asked.append(1) or True, ""))])
    assert [info.status for info in host.plugins(probe=False)] == ["ok"]
    assert len(host.registry.observers.declared()) == 1
    assert asked == []
    assert "o" in host.registry.observers
    assert "o" in host.registry.observers
    assert asked == [1]


def test_a_plugin_without_anything_usable_is_unusable() -> None:
    host = host_of(observers=[observer("o", lambda: (False, "no device"))])
    assert info_of(host, "test").status == "unusable"


def test_a_lookup_says_which_plugins_failed(install: Install) -> None:
    install("broken", {"bad": "import no_such_library\n"})
    install("acme", {"fast": ENGINE.format(name="fast")})
    with pytest.raises(PluginError) as caught:
        discover("bad", "fast").registry.engines["fsat"]
    assert "Usable engines: fast. Did you mean 'fast'?" in str(caught.value)
    assert "bad: could not be imported" in str(caught.value)


def test_registering_twice_is_an_error() -> None:
    host = host_of()
    with pytest.raises(PluginError, match="registered already"):
        host.register(SimpleNamespace(), "test")


# ── Properties ────────────────────────────────────────────────────────────────────────────────

_names = st.sampled_from(["a", "b", "c", "d"])
_probes = st.sampled_from([None, lambda: (True, ""), lambda: (False, "no"), _raise])
_model = st.builds(
    lambda name, probe: ModelDescriptor(name=name, factory="a:b", tasks=(Task.RANK,), probe=probe),
    _names,
    _probes,
)
_broken = st.sampled_from(["not a descriptor", None, 3, observer("x")])
_plugins = st.dictionaries(
    st.sampled_from(["p", "q", "r", "core2"]), st.lists(_model | _broken, max_size=3), max_size=4
)


def _host(plugins: Mapping[str, list[object]]) -> PluginHost:
    host = PluginHost()
    for name, descriptors in plugins.items():
        module = SimpleNamespace(gr_register_models=hookimpl(_returning(descriptors)))
        host.register(module, name)
    return host


@given(_plugins, st.randoms(use_true_random=False))
def test_whatever_plugins_do_the_host_answers_and_order_never_matters(plugins, random) -> None:  # type: ignore[no-untyped-def]
    order = list(plugins)
    random.shuffle(order)
    host = _host(plugins)
    again = _host({name: plugins[name] for name in order})
    assert list(host.registry.models) == list(again.registry.models)
    # An error names the owners, so its text is the same whatever the order.
    assert list(host.plugins()) == list(again.plugins())
    for info in host.plugins():
        assert info.status in ("ok", "partial", "unusable", "error")
        assert (info.status == "ok") == (info.reason == "")


@given(_plugins)
def test_a_name_is_usable_exactly_if_one_sound_usable_descriptor_has_it(plugins) -> None:  # type: ignore[no-untyped-def]
    host = _host(plugins)
    for name in "abcd":
        sound = [
            d
            for descriptors in plugins.values()
            for d in descriptors
            if isinstance(d, ModelDescriptor) and d.name == name
        ]
        usable = len(sound) == 1 and (
            sound[0].probe is None or (sound[0].probe is not _raise and sound[0].probe()[0])
        )
        assert (name in host.registry.models) == usable
