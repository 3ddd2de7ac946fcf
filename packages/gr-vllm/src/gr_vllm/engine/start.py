"""Starting an AsyncLLM on a model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr_core.errors import PlanError
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.engine.options import Sizes, VllmOptions
from gr_vllm.engine.process import environment
from gr_vllm.worker.kernels import PAGE_TOKENS

_FRONT = {"VLLM_CONFIGURE_LOGGING": "0"}
"""In this process its messages go where the platform's go."""
_QUIET = {
    # Its processes say what went wrong, and nothing is reported to anybody.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def variables(device: str, threads: int, ranks: int) -> Mapping[str, str]:
    """For vLLM's processes. More threads than free cores make each pass wait for the scheduler."""
    if device != "cpu":
        return _QUIET
    cores = len(os.sched_getaffinity(0))
    each = threads or max(1, (cores - 1) // ranks)
    return {
        **_QUIET,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(each),
        # There is nothing to compile, and vLLM's sampler would, at the first request.
        "TORCHDYNAMO_DISABLE": "1",
    }


def start(
    folder: Path,
    checkpoint: Checkpoint,
    options: VllmOptions,
    sizes: Sizes,
    device: str,
    threads: int,
    loggers: list[Any],
) -> Any:
    """An AsyncLLM. Raises `PlanError` with vLLM's reason where it does not start."""
    with environment(_FRONT):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from gr_vllm.worker.registration import register

        register()
    with environment(variables(device, threads, options.tensor_parallel_size)):
        arguments: dict[str, Any] = {
            "model": str(folder),
            "runner": "pooling" if checkpoint.role == "ranking" else "generate",
            "dtype": checkpoint.dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": PAGE_TOKENS,
            "max_model_len": sizes.max_model_len,
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "max_num_seqs": options.max_num_seqs,
            "enable_chunked_prefill": sizes.chunked,
            "enable_prefix_caching": options.prefix_caching,
            "enable_prompt_embeds": checkpoint.tokens != "ids",
            "tensor_parallel_size": options.tensor_parallel_size,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if checkpoint.role != "ranking":
            arguments |= {"max_logprobs": -1, "logprobs_mode": "processed_logits"}
        if sizes.kv_cache_bytes:
            arguments["kv_cache_memory_bytes"] = sizes.kv_cache_bytes
        else:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=loggers)
        except (ValueError, RuntimeError) as error:
            raise PlanError(
                f"engine vllm: vLLM did not start on {checkpoint.name}: {_first_line(error)}"
            ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
