"""What the importers share: the result, safe loading, and the check of names and shapes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig


@dataclass(frozen=True)
class ImportedModel:
    """A checkpoint in this package's terms."""

    config: HSTUConfig
    state_dict: dict[str, Tensor]
    """float32, of the module that `config` describes."""
    item_count: int
    """Items of the catalogue: their indices, and ids in the checkpoint, are 1..item_count."""
    max_history: int
    """Behaviours that the model was trained to read."""
    notes: tuple[str, ...] = ()
    """What was assumed, for the model card."""


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Reads a file that torch.save wrote, without running anything in it.

    Raises ValueError for a file that is not such, or that holds more than tensors and plain values.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to load it unsafely
        raise ValueError(
            f"{path}: not read, because it is not a file of tensors and plain values"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{path}: damaged, or not a file that torch.save wrote ({error or 'it is empty'})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}; expected a state dict")
    return dict(loaded)


def without_prefix(state: Mapping[str, Any], marker: str) -> dict[str, Any]:
    """Drops what stands before `marker` in names, such as the `module.` of data parallelism."""
    prefixes = {name[: name.index(marker)] for name in state if marker in name}
    if len(prefixes) != 1:
        return dict(state)
    prefix = prefixes.pop()
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def require(state: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError listing those of `names` that the checkpoint lacks."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"the checkpoint lacks {', '.join(missing)}; it holds {_listing(sorted(state))}"
        )


def check_state(module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Raises ValueError naming every missing, unexpected and misshaped tensor.

    `module` may live on the meta device. `names` gives the checkpoint's name of each of ours.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append("missing " + _listing([names.get(name, name) for name in missing]))
    if unexpected := sorted(set(state) - set(expected)):
        problems.append("unexpected " + _listing([names.get(name, name) for name in unexpected]))
    for name in sorted(set(state) & set(expected)):
        if (found := tuple(state[name].shape)) != expected[name]:
            problems.append(
                f"{names.get(name, name)} becomes {found} where {expected[name]} is expected"
            )
    if problems:
        raise ValueError("the checkpoint does not fit: " + "; ".join(problems))


def num_layers(state: Mapping[str, Any], prefix: str) -> int:
    """How many layers `prefix`0., `prefix`1., ... there are. Raises ValueError for none or gaps."""
    found = sorted(
        {
            int(name.removeprefix(prefix).split(".", 1)[0])
            for name in state
            if name.startswith(prefix) and name.removeprefix(prefix).split(".", 1)[0].isdigit()
        }
    )
    if not found or found != list(range(len(found))):
        raise ValueError(f"the checkpoint holds the layers {found} under {prefix!r}")
    return len(found)


def split_heads(total: int, num_heads: int, what: str) -> int:
    """Columns per head. Raises ValueError if they do not divide."""
    if num_heads < 1 or total % num_heads:
        raise ValueError(f"num_heads is {num_heads}, which does not divide the {total} {what}")
    return total // num_heads


def _listing(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
