"""Options that only the engine ``native`` knows, from a model's table ``options``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gr_core.errors import PlanError

INDEXES = ("exact", "hnsw")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class NativeOptions:
    isa: str = "auto"
    """Instruction set of the kernels, as `gr check` lists them, or ``torch``."""
    index: str = "exact"
    """How a catalogue is searched: ``exact``, or ``hnsw`` (approximate, needs faiss)."""
    workspace_bytes: int = 256 * _MIB
    """Memory for the tokens of one pass; more tokens are computed in several."""

    @staticmethod
    def of(extra: Mapping[str, Any]) -> NativeOptions:
        """Raises `PlanError` for an unknown option or a value that it cannot have."""
        known = [field.name for field in fields(NativeOptions)]
        for name in extra:
            if name not in known:
                raise PlanError(
                    f"engine native has no option {name!r}; there are: {', '.join(known)}"
                )
        options = NativeOptions(**extra)
        if options.index not in INDEXES:
            raise PlanError(
                f"engine native: option index is {options.index!r}; "
                f"expected one of {', '.join(INDEXES)}"
            )
        size = options.workspace_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < _MIB:
            raise PlanError(
                f"engine native: option workspace_bytes is {size!r}; expected at least {_MIB}"
            )
        return options
