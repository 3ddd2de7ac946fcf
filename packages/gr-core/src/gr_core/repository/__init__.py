"""Models on disk: bundles, their catalogue, and repositories of versions."""

from gr_core.repository.bundle import Bundle, BundleSource, with_files, write_bundle
from gr_core.repository.catalogue import Catalogue
from gr_core.repository.repository import ModelRepository, locate

__all__ = [
    "Bundle",
    "BundleSource",
    "Catalogue",
    "ModelRepository",
    "locate",
    "with_files",
    "write_bundle",
]
