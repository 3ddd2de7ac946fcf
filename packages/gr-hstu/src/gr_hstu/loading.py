"""What all models read of a bundle: its configuration, its catalogue's size, its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gr_core.errors import BundleError, GrError
from gr_core.repository import Bundle, Catalogue
from gr_hstu.importers import import_checkpoint

_Config = TypeVar("_Config")

logger = logging.getLogger(__name__)


def read_config(bundle: Bundle, from_dict: Callable[[Mapping[str, Any]], _Config]) -> _Config:
    """The architecture's configuration; `BundleError` that names the field otherwise."""
    try:
        return from_dict(bundle.config)
    except ValueError as error:
        raise BundleError(f"{bundle.path}/config.json: config: {error}") from None


def check_catalogue(bundle: Bundle, catalogue: Catalogue, num_items: int) -> None:
    if len(catalogue) != num_items:
        raise BundleError(
            f"{bundle.path}: the catalogue has {len(catalogue)} items, "
            f"config.num_items is {num_items}"
        )


def load_weights(bundle: Bundle, module: nn.Module) -> Sequence[str]:
    """Fills the module and returns what people should know: where the weights came from, and why.

    The open checkpoint that the bundle names is tried first, its own weights are the fallback.
    """
    if bundle.source is not None:
        checkpoint = bundle.path / Path(bundle.source.checkpoint).expanduser()
        try:
            imported = import_checkpoint(
                checkpoint, importer=bundle.source.importer, **bundle.source.options
            )
            _assign(module, imported.state_dict, checkpoint)
        except (GrError, OSError, ValueError) as error:
            note = f"weights: the bundle's own, because {checkpoint} cannot be used: {error}"
        else:
            return (f"weights: the checkpoint {checkpoint}",)
    else:
        note = "weights: the bundle's own"
    try:
        _assign(module, load_file(bundle.weights_path), bundle.weights_path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{bundle.weights_path}: {error} ({note})") from error
    if bundle.source is not None:
        logger.warning("%s/%s: %s", bundle.name, bundle.version, note)
    return (note,)


def _assign(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in sorted(own.keys() - state.keys())]
    wrong += [f"{name} is not expected" for name in sorted(state.keys() - own.keys())]
    wrong += [
        f"{name} has the shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise BundleError(f"{path}: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict({n: t.to(own[n].dtype) for n, t in state.items()}, assign=True)
