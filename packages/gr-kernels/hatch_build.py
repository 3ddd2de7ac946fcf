"""Builds the native kernels with CMake, into the wheel or, for an editable install, into src.

A hook of our own instead of scikit-build-core's: that one fails the build where there is no
compiler, links wheels to a Python version, and puts the library of an editable install into
site-packages, where the package in src hides it. The library is plain C to the outside, so a wheel
fits every Python 3.

Without a compiler, or on a processor that the kernels are not for, the wheel is a pure one, says
why in ``_native/absent.txt``, and everything runs on torch. In the environment,
``GR_KERNELS_NATIVE`` is ``auto``, ``require`` (what is absent is an error) or ``off``, and
``GR_KERNELS_CMAKE_ARGS`` holds further arguments for CMake.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

MODES = ("auto", "require", "off")
PROCESSORS = ("x86_64", "amd64")
TOOLS = {"cmake": "cmake>=3.24", "ninja": "ninja>=1.11"}
FOLDER = Path("gr_kernels", "_native")
SUFFIXES = {".so", ".dylib", ".dll"}


class Absent(Exception):
    """Why there can be no native kernels here."""


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the build needs beside hatchling, as far as this machine lacks it."""
        if self.target_name != "wheel" or _mode() == "off":
            return []
        return [requirement for tool, requirement in TOOLS.items() if not shutil.which(tool)]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        is_editable = version == "editable"
        # Kept for editable installs, where it makes the next build a short one.
        work = Path(self.root, "build", "editable") if is_editable else Path(tempfile.mkdtemp())
        self._work = None if is_editable else work
        try:
            files = [_build(Path(self.root), work)]
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        except Absent as reason:
            line = f"gr-kernels: without native kernels: {reason}"
            if _mode() == "require":
                raise RuntimeError(f"{line} (GR_KERNELS_NATIVE=require)") from None
            self.app.display_warning(line)
            work.mkdir(parents=True, exist_ok=True)
            files = [work / "absent.txt"]
            files[0].write_text(f"{reason}\n")
        if not is_editable:
            build_data["force_include"].update({str(f): str(FOLDER / f.name) for f in files})
            return
        target = Path(self.root, "src") / FOLDER
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in files:
            shutil.copy2(file, target)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.target_name == "wheel" and self._work is not None:
            shutil.rmtree(self._work)


def _mode() -> str:
    mode = os.environ.get("GR_KERNELS_NATIVE", "auto")
    if mode not in MODES:
        raise ValueError(f"GR_KERNELS_NATIVE is {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def _platform() -> str:
    """This machine's tag, without the promise of any Linux's that only a check of symbols gives."""
    tags = (tag.platform for tag in sys_tags())
    return next(tag for tag in tags if "manylinux" not in tag and "musllinux" not in tag)


def _build(root: Path, work: Path) -> Path:
    """Configures, compiles, and returns the library. Raises `Absent` where that cannot be."""
    if _mode() == "off":
        raise Absent("GR_KERNELS_NATIVE=off")
    if platform.machine().lower() not in PROCESSORS:
        raise Absent(f"they are for x86-64, this processor is {platform.machine()}")
    for tool in TOOLS:
        if not shutil.which(tool):
            raise Absent(f"{tool} is not installed")
    configure = ["cmake", "-G", "Ninja", "-S", str(root), "-B", str(work / "cmake")]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={work / 'installed'}"]
    # Said each time: the last build's may have been in an environment that is gone.
    configure += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
    configure += shlex.split(os.environ.get("GR_KERNELS_CMAKE_ARGS", ""))
    _run(configure, "CMake cannot configure them")
    _run(["cmake", "--build", str(work / "cmake"), "--parallel"], "they did not compile")
    shutil.rmtree(work / "installed", ignore_errors=True)
    _run(["cmake", "--install", str(work / "cmake")], "they could not be installed")
    (library,) = (f for f in (work / "installed").rglob("*") if f.suffix in SUFFIXES)
    return library


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout)
        raise Absent(f"{failure}: {_telling_line(done.stdout)}")


def _telling_line(output: str) -> str:
    """The first error of a compiler or of CMake, which may write it into the line after."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("CMake Error at"):
            return following
        if "error:" in line.lower():
            return line
    return "see the build's output"
