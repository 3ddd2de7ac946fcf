"""Exported artifacts of a test session are kept in a folder of its own, and made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
