"""vLLM reads its environment once, and one of it runs in this process at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .in_process import InProcess, Model, export

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_HOST_IP="127.0.0.1",
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",
    OMP_NUM_THREADS="1",
)
torch.set_num_threads(1)

Start = Callable[..., InProcess]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Exports a model and starts vLLM on it; of one module, one runs at a time."""
    running: list[InProcess] = []

    def start(
        model: Model, exported: str = "float32", quantization: str = "", **options: Any
    ) -> Any:
        while running:
            running.pop().close()
        folder = tmp_path_factory.mktemp("exported")
        running.append(InProcess(export(model, folder, exported, quantization), model, **options))
        return running[-1]

    yield start
    while running:
        running.pop().close()
