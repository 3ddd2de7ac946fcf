"""What vLLM counts, under the names that its own metrics have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vllm.v1.metrics.loggers import StatLoggerBase

from gr_core.contracts import Measurement


class Counts(StatLoggerBase):  # type: ignore[misc]
    """Adds up what vLLM reports after each step."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self._gauges = dict.fromkeys(("running", "waiting", "usage"), 0.0)
        self._counters = dict.fromkeys(("queries", "hits", "preemptions", "prompt_tokens"), 0.0)

    def start(self) -> None:
        """Nothing runs in a vLLM that is about to start; what was counted stays."""
        self._gauges = dict.fromkeys(self._gauges, 0.0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._gauges["running"] = scheduler_stats.num_running_reqs
            self._gauges["waiting"] = scheduler_stats.num_waiting_reqs
            self._gauges["usage"] = scheduler_stats.kv_cache_usage
            self._counters["queries"] += scheduler_stats.prefix_cache_stats.queries
            self._counters["hits"] += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._counters["preemptions"] += iteration_stats.num_preempted_reqs
            self._counters["prompt_tokens"] += iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        """The platform's log says so."""

    def measurements(self) -> Sequence[Measurement]:
        return [
            Measurement(f"vllm:{name}", value, kind, description)
            for (name, kind, description), value in zip(_NAMES, self._values(), strict=True)
        ]

    def _values(self) -> Sequence[float]:
        return (*self._gauges.values(), *self._counters.values())


_NAMES: Sequence[tuple[str, Literal["gauge", "counter"], str]] = (
    ("num_requests_running", "gauge", "Requests being computed."),
    ("num_requests_waiting", "gauge", "Requests waiting."),
    ("kv_cache_usage_perc", "gauge", "Part of the blocks of K and V in use."),
    ("prefix_cache_queries", "counter", "Tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "counter", "Tokens found in the prefix cache."),
    ("num_preemptions", "counter", "Requests preempted, to be computed again."),
    ("prompt_tokens", "counter", "Tokens of prompts."),
)
