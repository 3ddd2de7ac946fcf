"""What a model's histories are like, found out by encoding some."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr_core.samples import for_task, sample_requests
from gr_core.stack import StackModel
from gr_core.types import Task

_LONG = 1 << 16
"""Behaviours more than any model takes."""
_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Histories:
    tokens: int
    """Of the longest."""
    causal: bool
    """Whether no token of a history sees a later one."""
    candidates: bool
    """Whether candidates are tokens of their own, which answers are read from."""


def longest_history(model: StackModel, task: Task) -> Histories:
    """From made-up histories of every length up to very long ones."""
    tokens, causal, candidates = 1, True, False
    for request in sample_requests(model, _SAMPLES, max_history=_LONG, made_up=True):
        sequence = model.sequence(model.encode(for_task(request, task), task).request)
        n = sequence.history
        tokens = max(tokens, n)
        candidates = candidates or sequence.candidates > 0
        causal = causal and bool((sequence.high[:n] <= np.arange(1, n + 1)).all())
    return Histories(tokens, causal, candidates)
