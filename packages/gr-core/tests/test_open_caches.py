"""Caches as the configuration names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gr_core.caches import open_caches
from gr_core.caches.memory import MemoryCache
from gr_core.config import CacheSection, Config, parse_bytes
from gr_core.contracts import CacheKind
from gr_core.errors import ConfigurationError
from gr_core.plugins.descriptors import CacheDescriptor
from gr_core.plugins.registry import Registry

MADE: list[Any] = []


class OptionedCache(MemoryCache):
    def __init__(self, capacity_bytes: int, *, file: str = "", copies: int = 1) -> None:
        super().__init__(capacity_bytes)
        if copies < 1:
            raise ValueError(f"copies: {copies}, expected at least 1")
        self.file, self.copies, self.closed = file, copies, False
        MADE.append(self)

    def close(self) -> None:
        super().close()
        self.closed = True


REGISTRY = Registry.of(
    CacheDescriptor(name="optioned", factory=f"{__name__}:OptionedCache", kinds=("user_kv",)),
    CacheDescriptor(name="memory", factory="gr_core.caches.memory:MemoryCache", kinds=("results",)),
)


@pytest.fixture(autouse=True)
def _none_made(monkeypatch: pytest.MonkeyPatch) -> None:
    MADE.clear()
    # The tests are no package that the descriptor's factory could be imported from.
    monkeypatch.setattr(CacheDescriptor, "resolve", resolve)


def resolve(descriptor: CacheDescriptor) -> Any:
    return OptionedCache if descriptor.name == "optioned" else MemoryCache


def opened(**options: Any) -> Any:
    section = CacheSection(cache="optioned", capacity_bytes=100, options=options)
    return open_caches({CacheKind.USER_KV: section}, REGISTRY)[CacheKind.USER_KV]


def test_options_reach_the_plugin(tmp_path: Path) -> None:
    file = tmp_path / "gr.toml"
    file.write_text(
        "[cache.user_kv]\ncache = 'optioned'\n[cache.user_kv.options]\nfile = 'x'\ncopies = 3\n"
    )
    section = Config.load(file, environ={}).cache[CacheKind.USER_KV]
    cache: Any = open_caches({CacheKind.USER_KV: section}, REGISTRY)[CacheKind.USER_KV]
    assert (cache.file, cache.copies) == ("x", 3)


def test_an_option_may_come_from_the_environment() -> None:
    environ = {
        "GR_CACHE__USER_KV__CACHE": "optioned",
        "GR_CACHE__USER_KV__OPTIONS__COPIES": "2",
    }
    section = Config.load(environ=environ).cache[CacheKind.USER_KV]
    assert opened(**section.options).copies == 2


def test_options_that_the_plugin_does_not_know_are_named() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"cache\.user_kv\.options: 'optioned' does not know size, speed; "
        r"its options: file, copies",
    ):
        opened(size=1, copies=2, speed=3)


def test_a_wrong_value_says_where() -> None:
    with pytest.raises(ConfigurationError, match=r"cache\.user_kv: copies: 0, expected at least 1"):
        opened(copies=0)


def test_a_cache_that_cannot_hold_it() -> None:
    section = CacheSection(cache="memory")
    with pytest.raises(
        ConfigurationError,
        match=r"cache\.user_kv\.cache: 'memory' holds results; for user_kv there are: optioned",
    ):
        open_caches({CacheKind.USER_KV: section}, REGISTRY)


def test_none_stays_open_when_one_cannot_be_had() -> None:
    sections = {
        CacheKind.USER_KV: CacheSection(cache="optioned"),
        CacheKind.RESULTS: CacheSection(cache="memory", options={"file": "x"}),
    }
    with pytest.raises(ConfigurationError, match="does not know file; its options: none"):
        open_caches(sections, REGISTRY)
    assert [cache.closed for cache in MADE] == [True]


@pytest.mark.parametrize(
    ("value", "size"), [(7, 7), ("12", 12), ("4KiB", 4096), (" 1 GiB ", 1 << 30), (0, 0)]
)
def test_sizes(value: object, size: int) -> None:
    assert parse_bytes("file_bytes", value) == size


@pytest.mark.parametrize("value", [-1, 1.5, True, "4 apples", None])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match=r"file_bytes: .*, expected a number of bytes"):
        parse_bytes("file_bytes", value)
