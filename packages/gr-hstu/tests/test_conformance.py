"""The plugin, its models and its engine pass the conformance kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from gr_core.repository import Bundle
from gr_core.testing import EngineSuite, ModelSuite, PluginSuite
from gr_hstu.testing import KINDS, SID, write


@pytest.fixture(params=[*KINDS, SID])
def any_bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return write(tmp_path, request.param)


class TestPlugin(PluginSuite):
    plugin = "hstu"


class TestModels(ModelSuite):
    @pytest.fixture
    def bundle(self, any_bundle: Bundle) -> Bundle:
        return any_bundle


class TestEngineInFloat32(EngineSuite):
    engine = "torch"

    @pytest.fixture
    def bundle(self, any_bundle: Bundle) -> Bundle:
        return any_bundle


class TestEngineInBfloat16(EngineSuite):
    engine = "torch"
    dtype = "bfloat16"

    @pytest.fixture
    def bundle(self, any_bundle: Bundle) -> Bundle:
        return any_bundle
