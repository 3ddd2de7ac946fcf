"""The op `hstu_paged_attention` in torch, on any device: K and V gathered, then `hstu_attention`.

A page is (H, 32, K + V) in the dtype of q: K and V of a token side by side, as vLLM lays out its
own. `triton` has the same.

Shapes as in `gr_kernels.ops.hstu_paged_attention.interface`; S keys of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gr_kernels.ops.hstu_attention import blocked
from gr_kernels.ops.hstu_attention import reference as by_pairs
from gr_kernels.ops.hstu_paged_attention.interface import BLOCK_TOKENS, check_call, check_sizes


def plain_page_bytes(heads: int, d_qk: int, d_v: int, dtype: torch.dtype) -> int:
    return heads * BLOCK_TOKENS * (d_qk + d_v) * dtype.itemsize


class TorchPagedAttention:
    """Implements `PagedAttention`; torch's threads are the workers."""

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
        check_sizes(heads, d_qk, d_v, divisor, threads)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; expected a floating-point one")
        self._sizes = (heads, d_qk, d_v, dtype)
        self._alpha, self._divisor = alpha, divisor
        self.page_bytes = plain_page_bytes(heads, d_qk, d_v, dtype)

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
        """See `PagedAttention.__call__`."""
        check_call(
            *self._sizes,
            self.page_bytes,
            q_THK,
            k_THK,
            v_THV,
            pages,
            block_table,
            slots_T,
            query_offsets,
            key_counts,
            low_T,
            high_T,
            bias,
        )
        heads, d_qk, d_v, dtype = self._sizes
        page_PHEC = (
            pages[:, : self.page_bytes].view(dtype).view(-1, heads, BLOCK_TOKENS, d_qk + d_v)
        )
        offsets, counts = query_offsets.tolist(), key_counts.tolist()
        _check_numbers(offsets, counts, len(q_THK), block_table.shape[1])
        new = slice(offsets[0], offsets[-1])
        _store(page_PHEC, k_THK[new], v_THV[new], slots_T[new])
        k_parts, v_parts, own_parts = [k_THK[:0]], [v_THV[:0]], [low_T.new_zeros(offsets[0])]
        for b, keys in enumerate(counts):
            queries = slice(offsets[b], offsets[b + 1])
            cached = keys - (queries.stop - queries.start)
            seen = low_T[queries] < high_T[queries]
            lowest = int(low_T[queries][seen].min()) if seen.any() else cached
            cached_SHC = _gather(page_PHEC, block_table[b], lowest, cached)
            # A new token is in nobody's interval where it is not in its page.
            k_parts += [cached_SHC[..., :d_qk], k_THK[queries]]
            v_parts += [cached_SHC[..., d_qk:], v_THV[queries]]
            own_parts.append(torch.arange(cached, keys, dtype=torch.int32, device=low_T.device))
        own_parts.append(low_T.new_zeros(len(q_THK) - offsets[-1]))
        key_offsets = torch.tensor([0, *counts]).cumsum(0)
        return _attention(q_THK)(
            q_THK,
            torch.cat(k_parts),
            torch.cat(v_parts),
            query_offsets,
            key_offsets,
            low_T,
            high_T,
            torch.cat(own_parts),
            self._alpha,
            self._divisor,
            bias,
        )


def _check_numbers(offsets: list[int], counts: list[int], tokens: int, pages: int) -> None:
    if offsets[0] < 0 or offsets[-1] > tokens or offsets != sorted(offsets):
        raise ValueError(f"query_offsets are {offsets}; expected to rise from 0 to {tokens}")
    for b, keys in enumerate(counts):
        new = offsets[b + 1] - offsets[b]
        if not new <= keys <= pages * BLOCK_TOKENS:
            raise ValueError(
                f"key_counts of sequence {b} is {keys}; expected at least its {new} new tokens and "
                f"at most the {pages * BLOCK_TOKENS} of a row of block_table"
            )


def _store(page_PHEC: Tensor, k_THK: Tensor, v_THV: Tensor, slots_T: Tensor) -> None:
    kept = slots_T >= 0
    slots = slots_T[kept]
    if len(slots) and int(slots.max()) >= len(page_PHEC) * BLOCK_TOKENS:
        raise ValueError(f"slot {int(slots.max())} is beyond the {len(page_PHEC)} pages")
    page, place = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
    page_PHEC[page, :, place] = torch.cat([k_THK[kept], v_THV[kept]], dim=-1)


def _gather(page_PHEC: Tensor, table_M: Tensor, lowest: int, cached: int) -> Tensor:
    """The first ``cached`` keys of a sequence, (S, H, K + V); zero where nobody sees a page."""
    first, end = lowest // BLOCK_TOKENS, -(-cached // BLOCK_TOKENS)
    keys_SHC = page_PHEC.new_zeros(end, BLOCK_TOKENS, *page_PHEC.shape[1::2])
    if first < end:
        numbers = table_M[first:end].long()
        if int(numbers.min()) < 0 or int(numbers.max()) >= len(page_PHEC):
            raise ValueError(
                f"block_table has the pages {int(numbers.min())} to {int(numbers.max())}; expected "
                f"0 to {len(page_PHEC) - 1}"
            )
        keys_SHC[first:] = page_PHEC[numbers].transpose(1, 2)
    return keys_SHC.flatten(0, 1)[:cached]


def _attention(q_THK: Tensor) -> Callable[..., Tensor]:
    """Block by block where that is to be had: on the CPU, but not in float16."""
    if q_THK.device.type == "cpu" and q_THK.dtype != torch.float16:
        return blocked.hstu_attention
    return by_pairs.hstu_attention
