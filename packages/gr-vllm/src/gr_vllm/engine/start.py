"""Starting an AsyncLLM on a model directory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr_core.errors import PlanError
from gr_vllm import front
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.engine.options import Sizes, VllmOptions
from gr_vllm.worker.kernels import PAGE_TOKENS

_IMPORT = {"VLLM_CONFIGURE_LOGGING": "0"}
"""In this process its messages go where the platform's go."""
_QUIET = {
    # Its processes say what went wrong, and nothing is reported to anybody.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The newer runner forgets what a pooling prompt has, once it is preempted.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
_IN_ITS_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The only worker shares its core's process, as it does on a GPU. On a CPU vLLM gives it one of its
own, to set its threads, which are set here; each pass then takes a few milliseconds more."""
_NAMES = {  # longer ones before their parts
    "--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE": "kv_cache_bytes",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "--kv-cache-memory-bytes": "kv_cache_bytes",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--max-model-len": "max_model_len",
}
_starting = threading.Lock()
"""The environment is the whole process's: one vLLM starts at a time."""


def variables(device: str, threads: int, ranks: int) -> Mapping[str, str]:
    """For vLLM's processes; what a user has set stays, but for what the configuration says."""
    said: dict[str, str] = {}
    free = dict(_QUIET)
    if device == "cpu":
        free |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # More threads than free cores make each pass wait for the slowest.
            "OMP_NUM_THREADS": str(max(1, (len(os.sched_getaffinity(0)) - 1) // ranks)),
            # There is nothing to compile, and vLLM's sampler would, at the first request.
            "TORCHDYNAMO_DISABLE": "1",
        }
        if threads:
            said["OMP_NUM_THREADS"] = str(threads)
    return {name: value for name, value in free.items() if name not in os.environ} | said


def arguments(
    folder: Path, checkpoint: Checkpoint, options: VllmOptions, sizes: Sizes, device: str
) -> dict[str, Any]:
    """Of vLLM's ``AsyncEngineArgs``."""
    found: dict[str, Any] = {
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
    if device == "cpu" and options.tensor_parallel_size == 1:
        found["distributed_executor_backend"] = _IN_ITS_CORE
    _, numbered, first = device.partition(":")
    if numbered:
        found["device_ids"] = [int(first) + i for i in range(options.tensor_parallel_size)]
    if checkpoint.role != "ranking":
        found |= {"max_logprobs": -1, "logprobs_mode": "processed_logits"}
    if sizes.kv_cache_bytes:
        found["kv_cache_memory_bytes"] = sizes.kv_cache_bytes
    else:
        found["gpu_memory_utilization"] = options.gpu_memory_utilization
    return found


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
    with _starting:
        with environment(_IMPORT):
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            from gr_vllm.worker.registration import register

            register()
        own = variables(device, threads, options.tensor_parallel_size)
        with tempfile.TemporaryDirectory(prefix="gr-vllm-") as folder_of_cause:
            cause = Path(folder_of_cause) / "cause"
            with environment({**own, **front.variables(cause)}):
                try:
                    made = AsyncEngineArgs(**arguments(folder, checkpoint, options, sizes, device))
                    return AsyncLLM.from_engine_args(made, stat_loggers=loggers)
                except (ValueError, RuntimeError, TimeoutError) as error:
                    raise PlanError(
                        f"engine vllm: vLLM did not start on {checkpoint.name}: "
                        f"{_in_our_words(front.read(cause) or str(error))}"
                    ) from error


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that vLLM and its processes read as they start."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_our_words(message: str) -> str:
    """One line, with the names that options have here."""
    for theirs, ours in _NAMES.items():
        message = message.replace(theirs, ours)
    lines = message.strip().splitlines()
    return lines[0] if lines else "it gave no reason"
