"""Prometheus metrics, on a port of their own.

The names ``grpc_server_*`` are those of the other gRPC implementations, so that existing dashboards
work; what only this platform has is called ``gr_*``. Labels never come from requests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gr_core.contracts import CacheStatistics, Measurement
from gr_core.errors import ConfigurationError
from gr_core.observers import BatchEvent, DropEvent, LoadEvent, Observer, RequestEvent
from gr_serve_grpc.settings import PrometheusSettings, parse_settings

if TYPE_CHECKING:
    from gr_core.pipeline import Pipeline

logger = logging.getLogger(__name__)

SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class CallMetrics:
    """The metrics of one gRPC method."""

    def __init__(self, observer: PrometheusObserver, service: str, method: str, kind: str) -> None:
        self._labels = (kind, service, method)
        self._started = observer.started.labels(*self._labels)
        self._seconds = observer.handling_seconds.labels(*self._labels)
        self._handled = observer.handled
        self._by_code: dict[grpc.StatusCode, Counter] = {}

    def started(self) -> None:
        self._started.inc()

    def handled(self, code: grpc.StatusCode, seconds: float) -> None:
        if code not in self._by_code:
            self._by_code[code] = self._handled.labels(*self._labels, _code_name(code))
        self._by_code[code].inc()
        self._seconds.observe(seconds)


def _code_name(code: grpc.StatusCode) -> str:
    """``InvalidArgument`` for INVALID_ARGUMENT, as the metrics of the other implementations say."""
    return "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "")


class _Series(dict[tuple[str, ...], tuple[Any, ...]]):
    """The children of metrics with the same labels, by the labels' values.

    They are kept here because prometheus_client takes longer to find one than to count.
    """

    def __init__(self, *metrics: Counter | Histogram) -> None:
        self._metrics = metrics

    def __missing__(self, labels: tuple[str, ...]) -> tuple[Any, ...]:
        self[labels] = found = tuple(metric.labels(*labels) for metric in self._metrics)
        return found


class PrometheusObserver(Observer):
    """Keeps metrics in a registry of its own. `listen` opens the page, `close` closes it."""

    def __init__(self, settings: PrometheusSettings) -> None:
        self.settings = settings
        self.registry = CollectorRegistry()
        self._page: Any = None

        call = ("grpc_type", "grpc_service", "grpc_method")
        self.started = self._counter("grpc_server_started", "RPCs started on the server.", call)
        self.handled = self._counter(
            "grpc_server_handled", "RPCs completed on the server.", (*call, "grpc_code")
        )
        self.handling_seconds = self._histogram(
            "grpc_server_handling_seconds", "Seconds from an RPC's start to its end.", call, SECONDS
        )

        self.unauthenticated = self._counter(
            "gr_unauthenticated", "Calls without an accepted token, which are not read.", ()
        )

        model, stage = ("model",), ("model", "version", "task", "engine")
        self._outcomes = _Series(
            self._counter("gr_requests", "Requests by what became of them.", ("model", "outcome"))
        )
        self._answered = _Series(
            self._histogram("gr_request_seconds", "Seconds in the pipeline.", model, SECONDS),
            self._histogram(
                "gr_features_seconds", "Seconds of validation and features.", model, SECONDS
            ),
        )
        self._stages = _Series(
            self._histogram(
                "gr_stage_queue_seconds", "Seconds waited for a place in a batch.", stage, SECONDS
            ),
            self._histogram(
                "gr_stage_compute_seconds", "Seconds of requests in the engine.", stage, SECONDS
            ),
            self._counter("gr_tokens", "Tokens of requests.", stage),
            self._counter(
                "gr_tokens_reused", "Tokens of requests whose state came from a cache.", stage
            ),
        )
        self._batches = _Series(
            self._histogram("gr_batch_size", "Requests in a batch.", stage, SIZES),
            self._histogram("gr_batch_seconds", "Seconds to compute a batch.", stage, SECONDS),
            self._counter(
                "gr_padded_tokens", "Tokens that a padding engine computes, with padding.", stage
            ),
        )
        self._dropped = self._counter(
            "gr_dropped",
            "Requests dropped before they were computed.",
            ("model", "engine", "reason"),
        )
        self._loads = self._counter(
            "gr_model_loads", "Versions by what became of them.", ("model", "version", "state")
        )

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: Iterable[float]
    ) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))

    def listen(self) -> str:
        """Opens the metrics page and returns its address. Raises `ConfigurationError`."""
        settings = self.settings
        try:
            self._page, _ = start_http_server(settings.port, settings.host, self.registry)
        except OSError as error:
            raise ConfigurationError(
                f"observers.prometheus: cannot listen on {settings.host}:{settings.port}: "
                f"{error.strerror}; choose another host or port"
            ) from None
        logger.info("metrics on http://%s/metrics", self.address)
        return self.address

    @property
    def address(self) -> str:
        """``host:port`` of the page, once it is open."""
        return f"{self.settings.host}:{self._page.server_port}"

    def close(self) -> None:
        if self._page is not None:
            self._page.shutdown()
            self._page.server_close()
            self._page = None

    @contextmanager
    def watching(self, pipeline: Pipeline) -> Iterator[None]:
        """Adds the pipeline's queues and caches, read when the page is. For its event loop."""
        collector = PipelineCollector(pipeline, asyncio.get_running_loop())
        self.registry.register(collector)
        try:
            yield
        finally:
            self.registry.unregister(collector)

    def on_request(self, event: RequestEvent) -> None:
        self._outcomes[event.model, event.outcome][0].inc()
        if event.outcome != "ok":
            return
        total, features = self._answered[event.model,]
        total.observe(event.total_s)
        features.observe(event.features_s)
        for stage in event.stages:
            queue, compute, tokens, reused = self._stages[
                stage.model, stage.version, stage.task, stage.engine
            ]
            queue.observe(stage.queue_s)
            compute.observe(stage.compute_s)
            tokens.inc(stage.tokens)
            reused.inc(stage.tokens_reused)

    def on_batch(self, event: BatchEvent) -> None:
        size, seconds, padded = self._batches[event.model, event.version, event.task, event.engine]
        size.observe(event.size)
        seconds.observe(event.compute_s)
        padded.inc(event.padded_tokens)

    def on_drop(self, event: DropEvent) -> None:
        self._dropped.labels(event.model, event.engine, event.reason).inc()

    def on_load(self, event: LoadEvent) -> None:
        self._loads.labels(event.model, event.version, event.state).inc()


class PipelineCollector(Collector):
    """What the pipeline and its engines count, asked of the pipeline on its event loop."""

    TIMEOUT_S = 2.0

    def __init__(self, pipeline: Pipeline, loop: asyncio.AbstractEventLoop) -> None:
        self._pipeline = pipeline
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        return self._families({}, {}, {})

    def collect(self) -> Iterable[Metric]:
        answer: concurrent.futures.Future[
            tuple[
                Mapping[str, int],
                Mapping[str, CacheStatistics],
                Mapping[str, Sequence[Measurement]],
            ]
        ] = concurrent.futures.Future()
        pipeline = self._pipeline

        def ask() -> None:
            try:
                answer.set_result(
                    (pipeline.queue_depths(), pipeline.cache_statistics(), pipeline.measurements())
                )
            except Exception as error:
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(ask)
            return self._families(*answer.result(self.TIMEOUT_S))
        except Exception:
            logger.exception("queues, caches and engines are left out of the metrics")
            return self._families({}, {}, {})

    def _families(
        self,
        depths: Mapping[str, int],
        caches: Mapping[str, CacheStatistics],
        engines: Mapping[str, Sequence[Measurement]],
    ) -> Iterator[Metric]:
        queue = GaugeMetricFamily("gr_queue_depth", "Requests waiting.", labels=["queue"])
        for name, depth in depths.items():
            queue.add_metric([name], depth)
        yield queue
        for field, text in (
            ("hits", "Lookups that found something."),
            ("misses", "Lookups that found nothing."),
            ("evictions", "Entries that made room for others."),
        ):
            counter = CounterMetricFamily(f"gr_cache_{field}", text, labels=["cache"])
            for name, statistics in caches.items():
                counter.add_metric([name], getattr(statistics, field))
            yield counter
        for field, text in (
            ("entries", "Entries held."),
            ("bytes", "Bytes held."),
            ("capacity_bytes", "Bytes that may be held."),
        ):
            gauge = GaugeMetricFamily(f"gr_cache_{field}", text, labels=["cache"])
            for name, statistics in caches.items():
                gauge.add_metric([name], getattr(statistics, field))
            yield gauge
        yield from _measured(engines)


def _measured(engines: Mapping[str, Sequence[Measurement]]) -> Iterator[Metric]:
    """A family for each name, whatever engines have it."""
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for engine, measurements in engines.items():
        for one in measurements:
            if one.name not in families:
                make = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
                families[one.name] = make(one.name, one.description, labels=["engine"])
            families[one.name].add_metric([engine], one.value)
    yield from families.values()


def prometheus_observer(settings: Mapping[str, Any]) -> PrometheusObserver:
    """The observer ``prometheus``, with its page open."""
    # Otherwise each series has a gauge beside it that says when it began.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    observer = PrometheusObserver(
        parse_settings(PrometheusSettings, settings, "observers.prometheus")
    )
    observer.listen()
    return observer
