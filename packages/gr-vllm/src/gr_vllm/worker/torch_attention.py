"""The op `hstu_paged_attention` in torch: what runs where no kernel is installed.

Shapes: T new tokens, B sequences, P pages, S keys of one sequence, n new tokens of one sequence, H
heads, K columns of Q and K per head, V columns of V per head, C = K + V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAGE_TOKENS = 32
_ROWS = 256
"""Queries whose scores are held at once."""


class TorchPagedAttention:
    """Pages hold (H, tokens, C) numbers: K and V of a token side by side. On any device."""

    def __init__(
        self,
        heads: int,
        d_qk: int,
        d_v: int,
        dtype: torch.dtype,
        alpha: float,
        divisor: float,
        *,
        threads: int = 0,
    ) -> None:
        del threads  # torch has one number of threads for the whole process
        self._shape = (heads, _PAGE_TOKENS, d_qk + d_v)
        self._d_qk = d_qk
        self._dtype = dtype
        self._alpha = alpha
        self._divisor = divisor
        self.page_bytes = heads * _PAGE_TOKENS * (d_qk + d_v) * dtype.itemsize

    def __call__(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        pages: Tensor,
        block_table: Tensor,
        slots_T: Tensor,
        query_offsets: Tensor,
        key_counts: Tensor,
        low_T: Tensor,
        high_T: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        held_PHNC = pages[:, : self.page_bytes].view(self._dtype).view(-1, *self._shape)
        stored = slots_T >= 0
        slots = slots_T[stored]
        new_THC = torch.cat([k_THK, v_THV], dim=2)
        held_PHNC[slots // _PAGE_TOKENS, :, slots % _PAGE_TOKENS] = new_THC[stored]
        a_THV = v_THV.new_zeros(v_THV.shape)
        ends, counts = query_offsets.tolist(), key_counts.tolist()
        pair = 0
        for b, keys in enumerate(counts):
            count = ends[b + 1] - ends[b]
            if not count:
                continue
            table = block_table[b, : -(-keys // _PAGE_TOKENS)].long()
            kept_HSC = held_PHNC[table].transpose(0, 1).flatten(1, 2)[:, :keys]
            # Of a new token that is stored nowhere, only its own row knows K and V.
            kept_HSC[:, keys - count :] = new_THC[ends[b] : ends[b + 1]].transpose(0, 1)
            given = None if bias is None else bias[pair : pair + count * keys].view(count, keys)
            pair += count * keys
            for first in range(0, count, _ROWS):
                of_b = slice(first, min(first + _ROWS, count))
                rows = slice(ends[b] + of_b.start, ends[b] + of_b.stop)
                a_THV[rows] = self._attend(
                    q_THK[rows],
                    kept_HSC,
                    low_T[rows],
                    high_T[rows],
                    keys - count + first,
                    None if given is None else given[of_b],
                )
        return a_THV

    def _attend(
        self,
        q_nHK: Tensor,
        kept_HSC: Tensor,
        low_n: Tensor,
        high_n: Tensor,
        place: int,
        bias_nS: Tensor | None,
    ) -> Tensor:
        """Of the tokens from ``place`` on."""
        keys = kept_HSC.shape[1]
        key_S = torch.arange(keys, device=q_nHK.device)
        own_n = torch.arange(place, place + len(q_nHK), device=q_nHK.device)
        seen_nS = (key_S >= low_n[:, None]) & (key_S < high_n[:, None]) | (key_S == own_n[:, None])
        # What nobody sees may never have been stored, and a zero times a NaN is none.
        kept_HSC = kept_HSC.masked_fill(~seen_nS.any(0)[:, None], 0.0)
        scores_HnS = self._alpha * (q_nHK.transpose(0, 1) @ kept_HSC[..., : self._d_qk].mT)
        if bias_nS is not None:
            scores_HnS = scores_HnS + bias_nS
        weights_HnS = F.silu(scores_HnS).masked_fill(~seen_nS, 0.0) / self._divisor
        a_HnV = weights_HnS.to(kept_HSC.dtype) @ kept_HSC[..., self._d_qk :]
        return a_HnV.transpose(0, 1)
