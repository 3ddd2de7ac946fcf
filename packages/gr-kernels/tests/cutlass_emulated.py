"""The kernels in CUDA C++ on a CPU: what the tests of them share.

`emulated` compiles the sources as they are with the system's C++ compiler, on ``cuda/``'s headers,
which compute what a GPU's instructions do. What comes out is a library like nvcc's, for tensors on
the CPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from gr_kernels.cuda.library import SOURCES, Library

HEADERS = Path(__file__).parent / "cuda"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}

needs_compiler = pytest.mark.skipif(
    COMPILER is None or os.name != "posix", reason="needs g++ and POSIX, to emulate a GPU"
)


def command(number: str, file: str) -> list[str]:
    """What compiles the library for an architecture."""
    flags = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-x", "c++", "-DGR_CUDA_EMULATED", f"-DGR_CUDA_ARCHITECTURE={number}"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HEADERS}"]
    return [str(COMPILER), *flags, str(SOURCES / "gr_cuda.cu"), "-o", file]


@functools.cache
def emulated() -> dict[str, Library]:
    """By architecture; both are compiled at the same time."""
    folder = Path(tempfile.mkdtemp(prefix="gr-emulated-"))
    try:
        compiling = {
            architecture: subprocess.Popen(
                command(str(number), str(folder / f"{architecture}.so")),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for architecture, number in ARCHITECTURES.items()
        }
        for process in compiling.values():
            output, _ = process.communicate()
            assert process.returncode == 0, output
        return {one: Library(folder / f"{one}.so") for one in compiling}
    finally:
        shutil.rmtree(folder)  # loaded is loaded
