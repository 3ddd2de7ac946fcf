"""Modules without memory: for counting parameters, checking shapes, and loading weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutRandomInit(TorchFunctionMode):
    """Leaves out `normal_`, whose meta implementation would import torch's compiler (seconds)."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.__name__ == "normal_":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def skeleton() -> Iterator[None]:
    """Modules made inside have parameters on the meta device: shapes, and no memory.

    `module.load_state_dict(tensors, assign=True)` gives them weights, without the time and memory
    of a random initialization.
    """
    with torch.device("meta"), _WithoutRandomInit():
        yield
