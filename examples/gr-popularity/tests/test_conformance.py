"""The plugin passes the conformance kit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gr_core import Task
from gr_core.repository import Bundle, Catalogue, write_bundle
from gr_core.testing import EngineSuite, ModelSuite, PluginSuite

ITEMS = 50


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    shares = np.random.default_rng(0).dirichlet(np.ones(ITEMS + 1)).astype(np.float32)
    return write_bundle(
        tmp_path / "popular" / "1",
        name="popular",
        version="1",
        architecture="popularity",
        tasks=(Task.RETRIEVE, Task.RANK),
        config={},
        catalogue=Catalogue([f"item-{i}" for i in range(ITEMS)]),
        weights=lambda path: save_file({"shares": shares}, path),
    )


class TestPlugin(PluginSuite):
    plugin = "popularity"


class TestModel(ModelSuite):
    @pytest.fixture
    def bundle(self, bundle: Bundle) -> Bundle:
        return bundle


class TestEngine(EngineSuite):
    engine = "popularity"

    @pytest.fixture
    def bundle(self, bundle: Bundle) -> Bundle:
        return bundle
