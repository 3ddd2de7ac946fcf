"""What the tests of Triton's kernels share: where they run, and how they compile without a GPU.

The numbers are computed on a GPU where there is one, else by Triton's interpreter, which has to be
chosen before Triton is imported: `run_on_the_interpreter` runs a file of tests once more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may use, by compute capability (CUDA programming guide)."""
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; pip install gr-kernels[triton]"
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def device_for(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of `DEVICES` for a test that computes; skips it where that is not to be had."""
    if name == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")
    if name == "cpu":
        if not INTERPRETED:
            pytest.skip("test_on_the_interpreter runs it")
        _teach_bfloat16(monkeypatch)
    return name


def _teach_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies matrices of bfloat16 as if their bits were integers, and rounds
    to it toward zero, which doubles errors: GPUs round to the nearest."""
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def nearest(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert_float(value, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(value, np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(value.shape)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any
    ) -> interpreter.TensorHandle:
        one, other = (
            (x.data.astype(np.uint32) << 16).view(np.float32)
            if x.data.dtype == np.uint16
            else x.data
            for x in (a, b)
        )
        return interpreter.TensorHandle(
            np.matmul(one, other, dtype=d.data.dtype) + d.data, d.dtype.scalar
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def run_on_the_interpreter(file: str) -> None:
    """Runs a file's tests in a process of their own, on the interpreter."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 cannot loop with the newest NumPy")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


class Launches:
    """Stands where a kernel does, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **keywords: self.given.append((args, keywords))

    def compile(self, capability: int) -> Any:
        """As Triton does for a launch: what is 1 is a constant, multiples of 16 are known.

        Only the first launch. Fails where that needs more shared memory than there is.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        args, keywords = self.given[0]
        names = self.kernel.arg_names
        options = {name: value for name, value in keywords.items() if name not in names}
        values = dict(zip(names, args, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                known = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], known = "fp32", False
            elif name in keywords or value is None or value == 1:
                signature[name], constants[name], known = "constexpr", value, False
            else:
                signature[name], known = "i32" if value < 2**31 else "i64", value % 16 == 0
            if known:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert compiled.metadata.shared <= SHARED_BYTES[capability]
        return compiled


class Recorded:
    """Stands for a module of kernels: each name that is asked for records its launches."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.launches: dict[str, Launches] = {}

    def __getattr__(self, name: str) -> Launches:
        launches: Launches = self.launches.setdefault(name, Launches(getattr(self._module, name)))
        return launches
