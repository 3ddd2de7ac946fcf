"""The conformance kit: what every plugin must do, as tests that a plugin subclasses.

```python
from gr_core.testing import EngineSuite

class TestMyEngine(EngineSuite):
    engine = "mine"

    @pytest.fixture
    def bundle(self, tmp_path):
        return write_a_small_model(tmp_path)
```

A case that cannot hold is left out by its name with a reason, ``skip = {"one_item": "why"}``;
overriding a case is refused. The kit needs the extra ``gr-core[testing]``.
"""

from gr_core.testing.block_caches import BlockCacheSuite
from gr_core.testing.caches import CacheSuite
from gr_core.testing.engines import EngineSuite
from gr_core.testing.exporters import ExporterSuite
from gr_core.testing.kernels import KernelCase, KernelSuite
from gr_core.testing.models import ModelSuite
from gr_core.testing.plugins import PluginSuite, check_plugin
from gr_core.testing.servers import Client, ServerSuite
from gr_core.testing.suite import Suite, installed

__all__ = [
    "BlockCacheSuite",
    "CacheSuite",
    "Client",
    "EngineSuite",
    "ExporterSuite",
    "KernelCase",
    "KernelSuite",
    "ModelSuite",
    "PluginSuite",
    "ServerSuite",
    "Suite",
    "check_plugin",
    "installed",
]
