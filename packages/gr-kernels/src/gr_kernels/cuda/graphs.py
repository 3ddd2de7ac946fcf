"""CUDA graphs: the launches of a step recorded once, so that replaying them costs little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], None]


class Recorder:
    """Records steps on the current CUDA device; their graphs share the memory of temporaries.

    So of all that one recorder has recorded, only one may be replayed at a time, in any order.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """What replays the step: the same launches on the same memory, on the current stream.

        The step runs once before, so that what it compiles or allocates for good is there. It may
        not wait for the device.
        """
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with other work meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay
