"""What vLLM counts, under the names that its own metrics have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vllm.v1.metrics.loggers import StatLoggerBase

from gr_core.contracts import Measurement

_MEASURED: Mapping[str, tuple[Literal["gauge", "counter"], str]] = {
    "num_requests_running": ("gauge", "Requests being computed."),
    "num_requests_waiting": ("gauge", "Requests waiting."),
    "kv_cache_usage_perc": ("gauge", "Part of the blocks of K and V in use."),
    "prefix_cache_queries": ("counter", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("counter", "Tokens found in the prefix cache."),
    "num_preemptions": ("counter", "Requests preempted, to be computed again."),
    "prompt_tokens": ("counter", "Tokens of prompts."),
}


class Counts(StatLoggerBase):  # type: ignore[misc]
    """Adds up what vLLM reports after each step."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self._values = dict.fromkeys(_MEASURED, 0.0)

    def start(self) -> None:
        """Nothing runs in a vLLM that is about to start; what was counted stays."""
        for name, (kind, _) in _MEASURED.items():
            if kind == "gauge":
                self._values[name] = 0.0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        values = self._values
        if scheduler_stats is not None:
            values["num_requests_running"] = scheduler_stats.num_running_reqs
            values["num_requests_waiting"] = scheduler_stats.num_waiting_reqs
            values["kv_cache_usage_perc"] = scheduler_stats.kv_cache_usage
            values["prefix_cache_queries"] += scheduler_stats.prefix_cache_stats.queries
            values["prefix_cache_hits"] += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            values["num_preemptions"] += iteration_stats.num_preempted_reqs
            values["prompt_tokens"] += iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        """The platform's log says so."""

    def measurements(self) -> Sequence[Measurement]:
        return [
            Measurement(f"vllm:{name}", self._values[name], kind, description)
            for name, (kind, description) in _MEASURED.items()
        ]
