"""Generation by recomputing: every step runs whole sequences of tokens, batched over all beams.

It keeps no K and V, so it needs nothing of a model but its module; the reference for engines that
do keep them. Shapes: Q requests, R prefixes of all requests, N tokens of a history, P tokens of a
prefix, S codes of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gr_core.contracts import InferenceResult
from gr_core.generation import BeamSearch, CodeTrie, search_width
from gr_core.types import FloatArray, IntArray

_PAIRS_IN_FLIGHT = 2**22
"""Pairs of tokens computed at once; more prefixes are run part by part."""


class BeamLoop:
    """Beam search of several requests, a level of all of them at a time."""

    def __init__(
        self,
        module: nn.Module,
        trie: CodeTrie,
        levels: Sequence[range],
        beam_width: int,
        device: torch.device,
    ) -> None:
        """``module`` is that of `Task.GENERATE`, on the device; the rest is the model's."""
        self._module, self._device = module, device
        self._trie, self._levels, self._beam_width = trie, levels, beam_width

    def __call__(self, inputs: Mapping[str, Tensor], ks: Sequence[int]) -> list[InferenceResult]:
        """The best ``ks[i]`` items of request i; inputs are the model's, batched."""
        searches = [BeamSearch(self._trie, search_width(self._beam_width, k)) for k in ks]
        for level in self._levels:
            counts = [len(search.prefixes) for search in searches]
            request_R = np.repeat(np.arange(len(searches)), counts)
            prefixes_RP = np.concatenate([search.prefixes for search in searches])
            log_probs_RS = self._log_probs(inputs, request_R, prefixes_RP)
            parts = np.split(log_probs_RS, np.cumsum(counts)[:-1])
            for search, log_probs_BS in zip(searches, parts, strict=True):
                prefix, token = search.allowed
                search.advance(log_probs_BS[prefix, token - level.start])
        return [
            InferenceResult(scores, indices)
            for indices, scores in (s.finish(k) for s, k in zip(searches, ks, strict=True))
        ]

    def _log_probs(
        self, inputs: Mapping[str, Tensor], request_R: IntArray, prefixes_RP: IntArray
    ) -> FloatArray:
        longest = inputs["history_tokens"].shape[1] + prefixes_RP.shape[1]
        rows = max(1, _PAIRS_IN_FLIGHT // longest**2)
        prefixes = torch.from_numpy(prefixes_RP).long().to(self._device)
        request = torch.from_numpy(request_R).to(self._device)
        parts = [
            self._module(
                **{name: value[request[start : start + rows]] for name, value in inputs.items()},
                prefixes=prefixes[start : start + rows],
            )
            for start in range(0, len(request_R), rows)
        ]
        return torch.cat(parts).float().cpu().numpy()
