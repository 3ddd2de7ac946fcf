"""What loads what: the platform can ask about this plugin before torch, and export without vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*(n for n in sys.modules if '.' not in n))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_plugin_loads_gr_core_alone():
    loaded = loaded_by("gr_vllm.plugin", "gr_vllm.probes", "gr_vllm.compat")
    assert not loaded & {"torch", "vllm", "transformers", "gr_hstu"}


@pytest.mark.parametrize(
    "module",
    [
        "gr_vllm.worker.torch_attention",
        "gr_vllm.worker.kernels",
        "gr_vllm.worker.bias",
        "gr_vllm.worker.step",
        "gr_vllm.export.exporter",
        "gr_vllm.export.reader",
        "gr_vllm.prompts",
    ],
)
def test_what_needs_no_vllm_loads_none(module: str):
    loaded = loaded_by(module)
    assert "torch" in loaded
    assert not loaded & {"vllm", "transformers", "gr_hstu", "gr_kernels"}
