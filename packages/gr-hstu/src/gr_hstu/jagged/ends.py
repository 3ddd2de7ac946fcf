"""The ends of a model on a device, without the layers between them."""

from __future__ import annotations

from typing import TypeVar, cast

from gr_hstu.models import MTGR, HSTURanking, HSTURetrieval, build_model
from gr_hstu.modules.skeleton import skeleton

M = TypeVar("M", bound=HSTURetrieval | HSTURanking | MTGR)

_LAYERS = "stack."


def without_layers(module: M, device: str) -> M:
    """A copy of the module with weights on a device, e.g. ``cuda:0``; its layers have none."""
    with skeleton():
        copy = build_model(module.config)
    weights = {
        name: tensor.to(device, copy=True)
        for name, tensor in module.state_dict().items()
        if not name.startswith(_LAYERS)
    }
    missing, unexpected = copy.load_state_dict(weights, strict=False, assign=True)
    assert all(name.startswith(_LAYERS) for name in missing), missing
    assert not unexpected, unexpected
    return cast("M", copy.eval().requires_grad_(False))
