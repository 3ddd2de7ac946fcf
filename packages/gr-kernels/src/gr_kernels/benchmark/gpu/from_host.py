"""Returning users whose K and V are in the host's memory: copied back, or computed anew?

The cache is that of the engine `native`. Before each run everything is evicted from the device, so
that all K and V of a history come through the cache's host tier. Looking them up is a part of the
run, so the host's clock counts, as it does for a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gr_core.contracts import Arrivals
from gr_kernels.benchmark.gpu.device import Device
from gr_kernels.benchmark.gpu.layers import (
    ANEW,
    DTYPE,
    OURS,
    PLAIN,
    LayersPoint,
    LayersWork,
    PlainSide,
    StackSide,
    arithmetic,
    segment,
)
from gr_kernels.benchmark.gpu.measure import Case, CaseResult, Entry, Kind, Side
from gr_kernels.benchmark.gpu.plain import User, candidate_rows
from gr_kernels.cache.lease import PagedLease
from gr_kernels.ops.hstu_stack.cuda import CudaStack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment

OVERLAPPED = "gr-kernels, from the host, layer by layer"
FIRST = "gr-kernels, from the host, copied first"
_WIDTH = 8
"""Bytes of a token's content: enough to tell them apart."""


class HostSide(Side):
    """`CudaStack` on blocks of the paged cache that come from pinned memory of the host."""

    def __init__(self, work: LayersWork, device: Device, *, overlapped: bool) -> None:
        of, stack = work.point, work.stack
        self._point, self._device, self._overlapped = of, device, overlapped
        self.runner = CudaStack(
            stack, DTYPE, device=device.name, ops=device.ops(DTYPE, (stack.d_qk, stack.d_v))
        )
        self.implementation = self.runner.name
        blocks = sum(-(-(of.cached + new) // BLOCK_TOKENS) for new in of.lengths)
        # With room for the smallest pieces in which memory is taken.
        enough = (blocks * 5 // 4 + 64) * self.runner.block_bytes + (4 << 20)
        self._blocks = enough // self.runner.block_bytes
        self._cache = device.cache(enough, enough)
        self._space = self._cache.space(
            b"benchmark",
            block_tokens=BLOCK_TOKENS,
            block_bytes=self.runner.block_bytes,
            token_cost=1.0,
            pair_cost=1.0,
            device=device.cache_device,
            layers=len(stack.layers),
        )
        rng = np.random.default_rng(0)
        self._contents = [
            rng.integers(0, 256, (of.cached + new, _WIDTH), np.uint8) for new in of.lengths
        ]
        self._inputs = [work.input(number) for number in range(work.sets)]
        self._x_TD = torch.empty_like(self._inputs[0])
        users = User.all_of(of.lengths, of.candidates)
        self._rows_R = candidate_rows(users, self._x_TD.device)
        self._leases: list[PagedLease] = []
        self._floods = self._runs = 0
        self._fill(work)
        self.flops = arithmetic(
            stack, [self._segment(user, lease) for user, lease in enumerate(self._acquire())]
        ).total
        self._release()

    def _segment(self, user: int, lease: PagedLease) -> Segment:
        of = self._point
        return segment(lease.blocks, of.cached, of.lengths[user], of.candidates, Rows.CANDIDATES)

    def _fill(self, work: LayersWork) -> None:
        cached, x_TD = self._point.cached, work.input(0, begin="cached", end="cached")
        parts = zip(self._contents, torch.split(x_TD, cached), strict=True)
        for content, part_TD in parts:
            lease = self._space.acquire(b"", content[:cached], 0)
            assert lease is not None
            own = segment(lease.blocks, 0, cached, 0, Rows.ALL)
            self.runner.run(part_TD, [own], lease.arrivals)
            self._device.synchronize()
            lease.commit(cached)
            lease.release()

    def _acquire(self) -> Sequence[PagedLease]:
        for content in self._contents:
            lease = self._space.acquire(b"", content, self._point.cached)
            if lease is None:
                raise RuntimeError("the cache has no room for a batch that it was made for")
            self._leases.append(lease)
            if lease.reused != self._point.cached:
                raise RuntimeError(
                    f"{lease.reused} tokens were reused; expected {self._point.cached}"
                )
        return self._leases

    def _release(self) -> None:
        """Of leases whose blocks the device may still be using."""
        for arrivals in _distinct(self._leases):
            arrivals.wait(self._point.layers - 1)
        self._device.synchronize()
        for lease in self._leases:
            lease.release()
        self._leases = []

    def _evict(self) -> None:
        """Takes all of the device's blocks, so that what they held is in the host's memory."""
        taken: list[PagedLease] = []
        content = np.zeros((BLOCK_TOKENS, _WIDTH), np.uint8)
        for _ in range(self._blocks + 1):
            self._floods += 1
            lease = self._space.acquire(f"flood {self._floods}".encode(), content, 0)
            if lease is None:
                break
            taken.append(lease)
        for arrivals in _distinct(taken):
            arrivals.wait(self._point.layers - 1)
        self._device.synchronize()
        for lease in taken:
            lease.release()

    def before(self, number: int) -> None:
        self._release()
        self._evict()
        self._x_TD.copy_(self._inputs[number])

    def run(self, number: int) -> None:
        leases = self._acquire()
        segments = [self._segment(user, lease) for user, lease in enumerate(leases)]
        arrivals = _Together(_distinct(leases))
        if self._overlapped:
            self.runner.run(self._x_TD, segments, arrivals)
        else:
            arrivals.wait(self._point.layers - 1)
            self.runner.run(self._x_TD, segments)

    def output(self) -> Tensor:
        tokens = self._point.users * self._point.cached
        hits = self._cache.statistics().tiers["host"].hits
        # Since the last time; in between are runs that were only timed.
        if hits - self._runs < tokens or (hits - self._runs) % tokens:
            raise RuntimeError(
                f"{hits - self._runs} tokens came from the host's memory; expected a multiple of "
                f"{tokens}"
            )
        self._runs = hits
        return self._x_TD.index_select(0, self._rows_R)

    def close(self) -> None:
        self._release()
        self._space.close()
        self._cache.close()
        self.runner.close()


class _Together:
    """Implements `Arrivals` for those of several leases."""

    def __init__(self, parts: Sequence[Arrivals]) -> None:
        self._parts = parts

    def start(self) -> None:
        for part in self._parts:
            part.start()

    def wait(self, layer: int) -> None:
        for part in self._parts:
            part.wait(layer)


def _distinct(leases: Sequence[PagedLease]) -> Sequence[Arrivals]:
    found = {id(lease.arrivals): lease.arrivals for lease in leases}
    return [arrivals for arrivals in found.values() if arrivals is not None]


def case(of: LayersPoint, device: Device, *, name: str) -> Case:
    """The same new tokens and candidates, K and V of what came before from everywhere."""
    # One set: what is on the device serves as a comparison, and is larger than a cache.
    work = LayersWork(of, 1, device)
    host = partial(HostSide, work, device)
    entries = [
        Entry(OVERLAPPED, Kind.OURS, partial(host, overlapped=True)),
        Entry(FIRST, Kind.OURS, partial(host, overlapped=False)),
        Entry(ANEW, Kind.OURS, partial(StackSide, work, device, anew=True)),
        Entry(OURS, Kind.OURS, partial(StackSide, work, device)),
        Entry(PLAIN, Kind.PLAIN, partial(PlainSide, work, device, all_rows=False)),
    ]
    return Case(name, of.facts, 1, work.right, entries, OVERLAPPED, by_host=True)


def break_even(results: Sequence[tuple[LayersPoint, CaseResult]]) -> Mapping[int, str]:
    """From which number of cached tokens on copying takes less time than computing, by batch.

    Only of those that were measured. A batch of which something is wrong has none.
    """
    found = {}
    for batch in sorted({of.users for of, _ in results}):
        series = sorted(
            ((of.cached, case) for of, case in results if of.users == batch), key=lambda one: one[0]
        )
        ratios = [(cached, case.ratio(ANEW, OVERLAPPED)) for cached, case in series]
        if any(ratio is None for _, ratio in ratios):
            continue
        worth = None
        for cached, ratio in reversed(ratios):
            if ratio is None or ratio <= 1:
                break
            worth = cached
        found[batch] = "never" if worth is None else f"from {worth} tokens on"
    return found
