"""Options of exporters and engines, and one check for all of them.

A chain of exporters and the engine behind it get the same options. So each takes its own from
them, and refuses only what none of this package knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, TypeVar

from gr_core.errors import PlanError

KINDS = (
    "gr_trt.export.options:OnnxOptions",
    "gr_trt.quantization.options:QuantizationOptions",
    "gr_trt.onnx_runtime.options:OnnxRuntimeOptions",
    "gr_trt.tensorrt.options:BuildOptions",
    "gr_trt.tensorrt.options:TensorRTOptions",
    "gr_trt.triton.options:RepositoryOptions",
)
"""Dataclasses with a default for every field; a wrong value is a ValueError in __post_init__."""

Options = TypeVar("Options")


def own_options(kind: type[Options], extra: Mapping[str, Any], who: str) -> Options:
    """The options of one ``kind``. Raises `PlanError` in the name of ``who``, see above."""
    known = {field.name for every in _kinds() for field in fields(every)}
    for name in extra:
        if name not in known:
            mine = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
            raise PlanError(f"{who} has no option {name!r}; there are: {mine}")
    own = {f.name: extra[f.name] for f in fields(kind) if f.name in extra}  # type: ignore[arg-type]
    try:
        return kind(**own)
    except ValueError as error:
        raise PlanError(f"{who}: option {error}") from None


def _kinds() -> list[Any]:
    kinds = []
    for kind in KINDS:
        module, _, name = kind.partition(":")
        kinds.append(getattr(import_module(module), name))
    return kinds
