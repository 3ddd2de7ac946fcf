"""What a GPU is prepared for before the first request: graphs, and when K and V are worth copying.

Shapes: N tokens of one history.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from gr_core.contracts import BlockSpace, Rates
from gr_core.samples import for_task, sample_requests
from gr_core.stack import Stack, StackModel
from gr_core.types import Task
from gr_kernels.cuda.graphs import Recorder
from gr_kernels.cuda.transfers import measure_copies
from gr_kernels.engine.scratch import Scratch
from gr_kernels.ops.hstu_stack.cuda import CudaStack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, Rows, Segment

logger = logging.getLogger(__name__)

_LONGEST = 65536
_RUNS = 5


def prepare(
    model: StackModel,
    task: Task,
    runner: CudaStack,
    space: BlockSpace | None,
    graph_tokens: Sequence[int],
    segments: int,
) -> None:
    """Records graphs for up to so many ``segments`` of the model's longest histories."""
    longest = _longest_history(model, task)
    if graph_tokens:
        runner.record(graph_tokens, segments, -(-longest // BLOCK_TOKENS), Recorder())
    runner.prepared = True
    if space is None or not longest:
        return
    rates = Rates(
        bytes_per_second=measure_copies(
            str(runner.device),
            block_bytes=runner.block_bytes,
            layers=len(model.stack(task).layers),
        ),
        costs_per_second=_computing_rate(model.stack(task), runner, longest),
    )
    space.set_rates(rates)
    logger.info(
        "%s: copies %.1f GB/s, computes %.1f T multiplications/s a layer",
        runner.device,
        rates.bytes_per_second / 1e9,
        rates.costs_per_second / 1e12,
    )


def costs(stack: Stack) -> tuple[float, float]:
    """Multiplications of one layer for a token, and for each key that it sees.

    Projections, and scores with their values.
    """
    width = stack.num_heads * (stack.d_qk + stack.d_v)
    return 2.0 * width * stack.d_model + stack.layers[0].output_weight.numel(), float(width)


def _longest_history(model: StackModel, task: Task) -> int:
    """N of the longest history that the model reads."""
    request = sample_requests(model, 3, made_up=True, max_history=_LONGEST)[-1]
    return model.sequence(model.encode(for_task(request, task), task).request).history


def _computing_rate(stack: Stack, runner: CudaStack, longest: int) -> float:
    """Costs per second, of a short or a long history, whichever is computed faster.

    So that K and V are copied where that is faster in any case.
    """
    token_cost, pair_cost = costs(stack)
    scratch = Scratch(BLOCK_TOKENS, runner.block_bytes, str(runner.device))
    found = []
    for tokens in sorted({min(longest, 256), longest}):
        lease = scratch.lease(tokens)
        times = np.arange(tokens) if stack.layers[0].time_bias is not None else None
        segment = Segment(
            blocks=lease.blocks,
            cached=0,
            new=tokens,
            candidates=0,
            low=np.zeros(tokens, np.int32),
            high=np.arange(tokens, dtype=np.int32),
            groups=np.zeros(tokens, np.uint8) if stack.groups > 1 else None,
            times=times,
            next_times=times,
            rows=Rows.ALL,
        )
        x_TD = torch.randn(tokens, stack.d_model, device=runner.device)
        seconds = []
        for _ in range(_RUNS):
            events = [_event(), _event()]
            events[0].record()
            runner.run(x_TD.clone(), [segment])
            events[1].record()
            events[1].synchronize()
            seconds.append(events[0].elapsed_time(events[1]) / 1e3)
        lease.release()
        cost = tokens * token_cost + tokens * (tokens - 1) / 2 * pair_cost
        found.append(cost / float(np.median(seconds[1:])))
    return max(found)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
