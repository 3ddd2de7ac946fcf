"""Nothing of these tests is kept in the user's cache folder, and no property has a time limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "gr", deadline=None, max_examples=int(os.environ.get("GR_TEST_EXAMPLES", "100"))
)
settings.load_profile("gr")

# On small tensors a second thread costs more than it gives, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR_CACHE_DIR", str(tmp_path / "cache"))
