"""How engines compute batches from graphs, whatever runs these."""

from __future__ import annotations
