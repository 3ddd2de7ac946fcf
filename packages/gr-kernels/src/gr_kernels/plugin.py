"""What gr-kernels registers. Imports gr_core alone; torch and the kernels load when needed."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import KernelDescriptor, hookimpl


@hookimpl
def gr_register_kernels() -> Iterable[KernelDescriptor]:
    return []
