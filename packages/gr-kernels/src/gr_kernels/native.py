"""The library of kernels in C++ that the build put beside this module, if it could."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 2
"""Of csrc/gr_kernels.h."""

DTYPES = {"float32": 0, "bfloat16": 1}
"""Numbers of csrc/gr_kernels.h."""

_FOLDER = Path(__file__).parent / "_native"
_SUFFIXES = (".so", ".dylib", ".dll")


def find() -> tuple[Path | None, str]:
    """The library's file, or None and why there is none."""
    files = sorted(_FOLDER.iterdir()) if _FOLDER.is_dir() else []
    for file in files:
        if file.suffix in _SUFFIXES:
            return file, f"built in {file.name}"
    absent = _FOLDER / "absent.txt"
    reason = absent.read_text(encoding="utf-8").strip() if absent.exists() else "not installed"
    return None, f"this installation has no kernels in C++: {reason}"


@functools.cache
def library() -> ctypes.CDLL:
    """Raises `OSError` where it is absent or of no use to this system."""
    file, reason = find()
    if file is None:
        raise OSError(reason)
    found = ctypes.CDLL(str(file))
    if (version := found.gr_abi_version()) != ABI_VERSION:
        raise OSError(f"{file} has the interface {version}, expected {ABI_VERSION}; build it again")
    return found


@functools.cache
def instruction_sets(dtype: str) -> tuple[str, ...]:
    """Instruction sets of this processor that the stack has kernels for, best first.

    Raises `OSError` without the library.
    """
    if dtype not in DTYPES:
        return ()
    found = library()
    found.gr_instruction_sets.restype = ctypes.c_char_p
    return tuple(found.gr_instruction_sets(DTYPES[dtype]).decode().split())


@functools.cache
def amx_absence() -> str:
    """Why the kernels for AMX are not offered; empty where they are."""
    found = library()
    found.gr_amx_absence.restype = ctypes.c_char_p
    return str(found.gr_amx_absence().decode())


def probe(dtype: str) -> tuple[bool, str]:
    try:
        sets = instruction_sets(dtype)
        amx = amx_absence() if dtype == "bfloat16" else ""
    except (OSError, AttributeError) as error:
        return False, str(error)
    if not sets:
        return False, f"this processor has no instructions for {dtype} that the kernels know"
    return True, f"this processor has {', '.join(sets)}" + (f"; not AMX: {amx}" if amx else "")
