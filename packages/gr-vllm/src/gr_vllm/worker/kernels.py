"""Which attention runs on vLLM's pages: the best of the installed kernels, else torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from gr_core.plugins.descriptors import KernelDescriptor
from gr_core.plugins.host import PluginHost
from gr_core.plugins.registry import Registry
from gr_vllm.checkpoint import Layers
from gr_vllm.worker.torch_attention import TorchPagedAttention

logger = logging.getLogger(__name__)

OP = "hstu_paged_attention"
PAGE_TOKENS = 32
_TIME_BYTES = 4


class PagedAttention(Protocol):
    """An implementation of the op `hstu_paged_attention` for one kind of layer.

    Stores K and V of new tokens in pages and computes their attention on all that their sequences
    have there. Shapes: T new tokens, B sequences, P pages, H heads, K columns of Q and K per head,
    V columns of V per head.
    """

    page_bytes: int
    """K and V of `PAGE_TOKENS` tokens of all heads; their order is the implementation's own."""

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
        """(T, H, V). Sequence b's new tokens are its last ones. Token i sees the keys with the
        places low[i] to high[i] - 1 of its sequence, and its own. ``pages`` is uint8
        (pages, bytes), ``bias`` float32 of all pairs of new tokens and keys."""
        ...


def paged_attention(
    heads: int, d_qk: int, d_v: int, dtype: torch.dtype, alpha: float, divisor: float, device: str
) -> PagedAttention:
    """The implementation of highest priority for a kind of layer; said once with its reason."""
    make = _choose(heads, d_qk, d_v, dtype, alpha, divisor, device)
    kernel: PagedAttention = make(heads, d_qk, d_v, dtype, alpha, divisor)
    return kernel


def time_bytes(layers: Layers) -> int:
    """Of a page, behind its K and V: the times of its tokens, where the stack has a time bias."""
    return PAGE_TOKENS * _TIME_BYTES if layers.time_buckets else 0


def page_columns(kernel: PagedAttention, layers: Layers, heads: int, dtype: torch.dtype) -> int:
    """Numbers for each token and head of a page that holds K, V and times."""
    row_bytes = heads * PAGE_TOKENS * dtype.itemsize
    return -(-(kernel.page_bytes + time_bytes(layers)) // row_bytes)


@functools.cache
def _choose(
    heads: int, d_qk: int, d_v: int, dtype: torch.dtype, alpha: float, divisor: float, device: str
) -> Callable[..., Any]:
    registry: Registry = PluginHost.discover().registry
    name, make = best(
        registry.kernels.values(), dtype, device, (heads, d_qk, d_v, dtype, alpha, divisor)
    )
    logger.info("op %s in %s on %s: %s", OP, dtype, device, name)
    return make


def best(
    kernels: Iterable[KernelDescriptor], dtype: torch.dtype, device: str, layer: tuple[Any, ...]
) -> tuple[str, Callable[..., Any]]:
    """Name and factory of the first by priority that this machine can run and that takes a layer.

    ``layer`` are the arguments of its factory, which raises `ValueError` for what it cannot do.
    """
    fitting = [
        kernel
        for kernel in kernels
        if kernel.op == OP
        and kernel.device in (device, "any")
        and str(dtype).removeprefix("torch.") in kernel.dtypes
    ]
    for kernel in sorted(fitting, key=lambda kernel: -kernel.priority):
        usable, why = (True, "") if kernel.probe is None else kernel.probe()
        if usable:
            make: Callable[..., Any] = kernel.resolve()
            try:
                make(*layer)
            except ValueError as error:
                usable, why = False, str(error)
        if usable:
            return kernel.name, make
        logger.info("op %s: not %s: %s", OP, kernel.name, why)
    return "torch, gathering K and V", TorchPagedAttention
