"""Importers of checkpoints that other projects' code wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gr_hstu.importers import meta_ranking, meta_research
from gr_hstu.importers.common import ImportedModel

__all__ = ["IMPORTERS", "ImportedModel", "import_checkpoint"]

IMPORTERS: Mapping[str, Callable[..., ImportedModel]] = {
    "meta-research": meta_research.import_checkpoint,
    "meta-ranking": meta_ranking.import_checkpoint,
}
"""By the name that ``gr hstu import --from`` and the ``source`` of a bundle give."""


def import_checkpoint(path: str | Path, *, importer: str, **options: Any) -> ImportedModel:
    """Reads a checkpoint by the importer of that name; ``options`` are the importer's own.

    Raises ValueError for an unknown importer or option and for a checkpoint that does not fit, and
    OSError for a file that cannot be read.
    """
    if importer not in IMPORTERS:
        raise ValueError(f"importer {importer!r} is unknown; there are: {', '.join(IMPORTERS)}")
    try:
        return IMPORTERS[importer](path, **options)
    except TypeError as error:
        raise ValueError(f"importer {importer}: {error}") from error
