"""The build hook: a library for the platform, or a pure wheel that says why, or an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        not (PACKAGE / "hatch_build.py").exists() or find_spec("hatchling") is None,
        reason="needs the source tree and hatchling",
    ),
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("ninja")), reason="needs CMake and Ninja"
    ),
]

CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(kernels LANGUAGES CXX)
add_library(kernels MODULE kernels.cpp)
install(TARGETS kernels LIBRARY DESTINATION anywhere)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The package with a small library in place of the kernels."""
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PACKAGE / name, tmp_path)
    module = tmp_path / "src" / "gr_kernels"
    module.mkdir(parents=True)
    for name in ("__init__.py", "_version.py"):
        shutil.copy(PACKAGE / "src" / "gr_kernels" / name, module)
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    (tmp_path / "kernels.cpp").write_text('extern "C" int answer() { return ANSWER; }\n')
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the wheel into ``dist``; the macro ANSWER is there unless the environment says so."""
    flags = {"GR_KERNELS_NATIVE": "auto", "GR_KERNELS_CMAKE_ARGS": "-DCMAKE_CXX_FLAGS=-DANSWER=42"}
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        cwd=project,
        env=os.environ | flags | environment,
        text=True,
        capture_output=True,
        check=False,
    )


def wheel(project: Path) -> zipfile.ZipFile:
    (found,) = (project / "dist").glob("*.whl")
    return zipfile.ZipFile(found)


def test_the_library_is_in_a_wheel_for_any_python_on_this_platform(project: Path):
    done = build(project, GR_KERNELS_NATIVE="require")
    assert done.returncode == 0, done.stderr
    archive = wheel(project)
    assert "-py3-none-" in str(archive.filename)
    assert not str(archive.filename).endswith("-any.whl")
    (library,) = (n for n in archive.namelist() if n.startswith("gr_kernels/_native/"))
    assert "kernels" in library
    assert not (project / "src" / "gr_kernels" / "_native").exists()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/no/such/compiler"}, "CMake cannot configure them: Could not find"),
        ({"GR_KERNELS_CMAKE_ARGS": ""}, "they did not compile: "),
        ({"GR_KERNELS_NATIVE": "off"}, "GR_KERNELS_NATIVE=off"),
    ],
)
def test_without_a_library_the_wheel_is_pure_and_says_why(
    project: Path, environment: dict[str, str], reason: str
):
    done = build(project, **environment)
    assert done.returncode == 0, done.stderr
    assert f"gr-kernels: without native kernels: {reason}" in done.stdout + done.stderr
    archive = wheel(project)
    assert str(archive.filename).endswith("-py3-none-any.whl")
    said = archive.read("gr_kernels/_native/absent.txt").decode()
    assert said.startswith(reason)
    assert len(said.splitlines()) == 1


def test_without_a_library_there_is_no_wheel_where_it_is_required(project: Path):
    done = build(project, GR_KERNELS_NATIVE="require", GR_KERNELS_CMAKE_ARGS="")
    assert done.returncode != 0
    assert "they did not compile: " in done.stderr
    assert not list((project / "dist").glob("*.whl"))


def test_an_unknown_mode_is_named(project: Path):
    done = build(project, GR_KERNELS_NATIVE="maybe")
    assert done.returncode != 0
    assert "GR_KERNELS_NATIVE is 'maybe'; expected one of auto, require, off" in done.stderr
