"""Exported artifacts of a test session are kept in a folder of its own, and made once.

Suites of the conformance kit say ``artifacts = "trt"`` to share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`GR_CACHE_DIR` of the session."""
    folder = tmp_path_factory.getbasetemp() / "gr-cache" / "trt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_CACHE_DIR", str(folder))
        yield folder
