"""Options of the engine ``onnxruntime``."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class OnnxRuntimeOptions:
    provider: str = "auto"
    """An execution provider of ONNX Runtime by its name, or the one of the device."""
    reuse: bool = True
    """Whether K and V of histories are kept where the platform has a cache for them."""
    workspace_bytes: int = 512 * _MIB
    """Memory for the attention scores of one run; larger batches are computed in several."""

    def __post_init__(self) -> None:
        if not isinstance(self.provider, str):
            raise ValueError(f"provider is {self.provider!r}; expected a name or 'auto'")
        if not isinstance(self.reuse, bool):
            raise ValueError(f"reuse is {self.reuse!r}; expected true or false")
        size = self.workspace_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < _MIB:
            raise ValueError(f"workspace_bytes is {size!r}; expected at least {_MIB}")
