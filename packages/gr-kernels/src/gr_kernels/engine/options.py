"""Options that only the engine ``native`` knows, from a model's table ``options``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gr_core.errors import PlanError

INDEXES = ("exact", "hnsw")
MOST_GRAPH_TOKENS = 2**16
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class NativeOptions:
    isa: str = "auto"
    """Instruction set of the kernels, as `gr check` lists them, or ``torch``."""
    index: str = "exact"
    """How a catalogue is searched: ``exact``, or ``hnsw`` (approximate, needs faiss)."""
    workspace_bytes: int = 0
    """Memory for the tokens of one pass; more tokens are computed in several. 0: 256 MiB on a CPU,
    2 GiB on a GPU."""
    kernels: Sequence[str] = ()
    """Names of kernels to be taken, as `gr kernels list` shows them; the others are chosen."""
    graph_tokens: Sequence[int] = (64, 128, 256, 512, 1024, 2048)
    """On a GPU: batches of up to so many tokens are replayed from CUDA graphs. Empty: none are."""

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
        if not isinstance(size, int) or isinstance(size, bool) or 0 != size < _MIB:
            raise PlanError(
                f"engine native: option workspace_bytes is {size!r}; expected at least {_MIB}, or 0"
            )
        tokens = options.graph_tokens
        if isinstance(tokens, str | int) or not all(
            isinstance(t, int) and 1 <= t <= MOST_GRAPH_TOKENS for t in tokens
        ):
            raise PlanError(
                f"engine native: option graph_tokens is {tokens!r}; expected a list of numbers of "
                f"tokens from 1 to {MOST_GRAPH_TOKENS}"
            )
        if isinstance(options.kernels, str):
            raise PlanError(
                f"engine native: option kernels is {options.kernels!r}; expected a list of names"
            )
        return options

    def workspace(self, device: str) -> int:
        """Bytes for the tokens of one pass on a device."""
        return self.workspace_bytes or (256 * _MIB if device == "cpu" else 2048 * _MIB)
