"""Importers of checkpoints that other projects' code wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr_hstu.importers import meta_ranking, meta_research
from gr_hstu.importers.common import ImportedModel

IMPORTERS: dict[str, Callable[..., ImportedModel]] = {
    "meta-research": meta_research.import_checkpoint,
    "meta-ranking": meta_ranking.import_checkpoint,
}


def import_checkpoint(path: str | Path, *, importer: str, **options: Any) -> ImportedModel:
    """Imports a checkpoint by the importer's name; `options` are its keyword arguments.

    Raises ValueError for an unknown importer or option, and for what the importer refuses.
    """
    if importer not in IMPORTERS:
        raise ValueError(f"no importer {importer!r}; there are {', '.join(IMPORTERS)}")
    known = list(inspect.signature(IMPORTERS[importer]).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"the importer {importer} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return IMPORTERS[importer](path, **options)


__all__ = ["IMPORTERS", "ImportedModel", "import_checkpoint"]
