"""The op `item_topk`: the items of a catalogue with the largest dot products, see `interface`."""

from __future__ import annotations
