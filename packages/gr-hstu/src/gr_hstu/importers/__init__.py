"""Importers of checkpoints that other projects' code wrote."""

from __future__ import annotations

from gr_hstu.importers.common import ImportedModel

__all__ = ["ImportedModel"]
