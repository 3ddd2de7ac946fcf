"""The server: binds, reports health, serves, drains."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from gr_core.errors import ConfigurationError
from gr_core.observers import Observer
from gr_core.pipeline import Pipeline
from gr_serve_grpc._gen.gr.v1 import cache_service_pb2 as cache_pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc.auth import Tokens, server_credentials
from gr_serve_grpc.calls import Calls, Collected, Gate, Handlers
from gr_serve_grpc.metrics import PrometheusObserver
from gr_serve_grpc.service import CacheMethods, RecommenderMethods
from gr_serve_grpc.settings import GrpcSettings, parse_settings

logger = logging.getLogger(__name__)

RECOMMENDER = pb.DESCRIPTOR.services_by_name["RecommenderService"].full_name
CACHE = cache_pb.DESCRIPTOR.services_by_name["CacheService"].full_name
HEALTH_NAMES = ("", RECOMMENDER, CACHE)
"""What health checks may ask for; the empty name is the whole server."""

FLUSH_S = 0.5
"""Seconds for the last bytes of answered calls, and the end of streams that are not ours."""


def loop_factory() -> asyncio.AbstractEventLoop:
    """The quickest event loop that is installed, for `asyncio.Runner` and `asyncio.run`."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


class GrpcServer:
    """Serves a pipeline as gr.v1, with health and reflection."""

    loop_factory = staticmethod(loop_factory)
    """The event loop that this server runs best on."""

    def __init__(
        self, pipeline: Pipeline, settings: Mapping[str, Any], observers: Sequence[Observer] = ()
    ) -> None:
        """Raises `ConfigurationError` for settings, certificates or tokens that cannot be used."""
        self._pipeline = pipeline
        self._settings = parse_settings(GrpcSettings, settings, "server.grpc")
        self._credentials = server_credentials(self._settings)
        self._tokens = Tokens.of(self._settings)
        self._metrics = next((o for o in observers if isinstance(o, PrometheusObserver)), None)

    async def serve(
        self, stop: asyncio.Event, ready: Callable[[Sequence[str]], None] | None = None
    ) -> None:
        """Serves until ``stop`` is set, then drains. See `gr_core.contracts.Server`."""
        settings = self._settings
        calls = Calls(settings, self._metrics)
        methods = RecommenderMethods(self._pipeline, settings, calls)
        healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]
        server = grpc.aio.server(
            options=_options(settings),
            # Bounds what is held in memory before requests are read and admitted.
            maximum_concurrent_rpcs=2 * settings.max_concurrent_requests,
        )
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        handlers = self._handlers(calls, methods)
        server.add_generic_rpc_handlers((Gate(handlers, self._tokens, self._metrics),))
        address = self._bind(server)
        for name in HEALTH_NAMES:
            await healthy.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(methods.close)
            if self._metrics is not None:
                cleanup.enter_context(self._metrics.watching(self._pipeline))
            await server.start()
            watching = asyncio.create_task(self._watch_health(healthy))
            cleanup.callback(watching.cancel)
            logger.info(
                "grpc on %s (%s)", address, "TLS" if settings.tls else "plaintext",
                extra={"address": address},
            )  # fmt: skip
            try:
                if ready is not None:
                    ready([address])
                await stop.wait()
                await healthy.enter_graceful_shutdown()
                await asyncio.sleep(settings.drain_delay_s)
                await self._drain(server, calls, methods)
            finally:
                await server.stop(None)
            logger.info("grpc on %s has stopped", address)

    def _handlers(self, calls: Calls, methods: RecommenderMethods) -> Iterable[Handlers]:
        cache = CacheMethods(self._pipeline)
        yield grpc.method_handlers_generic_handler(
            RECOMMENDER,
            {
                "Recommend": calls.unary(RECOMMENDER, "Recommend", methods.recommend),
                "RecommendStream": calls.stream(
                    RECOMMENDER, "RecommendStream", methods.recommend_stream
                ),
                "ListModels": calls.unary(RECOMMENDER, "ListModels", methods.list_models),
                "GetModel": calls.unary(RECOMMENDER, "GetModel", methods.get_model),
            },
        )
        yield grpc.method_handlers_generic_handler(
            CACHE, {"DropUserState": calls.unary(CACHE, "DropUserState", cache.drop_user_state)}
        )
        if self._settings.reflection:
            names = (RECOMMENDER, CACHE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            collected = Collected()
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
                reflection.aio.ReflectionServicer(names),  # type: ignore[attr-defined]
                collected,
            )
            yield from collected.handlers

    def _bind(self, server: grpc.aio.Server) -> str:
        settings = self._settings
        wanted = f"{settings.host}:{settings.port}"
        try:
            if self._credentials is None:
                port = server.add_insecure_port(wanted)
            else:
                port = server.add_secure_port(wanted, self._credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigurationError(
                f"server.grpc: cannot listen on {wanted}: the port is in use, the host is not "
                "this machine's, or the certificate and key cannot be used"
            )
        return f"{settings.host}:{port}"

    async def _watch_health(self, healthy: Any) -> None:
        """Keeps the health service in step with the pipeline."""
        was: bool | None = None
        while True:
            found = self._pipeline.health()
            if found.ok is not was:
                was = found.ok
                logger.log(
                    logging.INFO if was else logging.WARNING,
                    "serving" if was else f"not serving: {found.reason}",
                )
                response = health_pb2.HealthCheckResponse
                for name in HEALTH_NAMES:
                    await healthy.set(name, response.SERVING if was else response.NOT_SERVING)
            # Until it is warm it is asked more often, so that nobody waits for nothing.
            await asyncio.sleep(self._settings.health_interval_s / (1 if was else 10))

    async def _drain(
        self, server: grpc.aio.Server, calls: Calls, methods: RecommenderMethods
    ) -> None:
        """Refuses new calls, finishes the accepted ones, ends what would never end by itself."""
        grace = self._settings.drain_grace_s
        stopping = asyncio.create_task(server.stop(grace))
        await asyncio.sleep(0)
        methods.drain()
        try:
            await asyncio.wait_for(calls.idle(), grace)
        except TimeoutError:
            logger.warning("calls were cut off that did not finish in %.0f s", grace)
        # Health watchers and reflection are streams that clients keep open.
        await server.stop(FLUSH_S)
        await stopping


def _options(settings: GrpcSettings) -> Sequence[tuple[str, int]]:
    milliseconds = {
        "grpc.keepalive_time_ms": settings.keepalive_time_s,
        "grpc.keepalive_timeout_ms": settings.keepalive_timeout_s,
        "grpc.http2.min_recv_ping_interval_without_data_ms": settings.min_client_ping_interval_s,
        "grpc.max_connection_age_ms": settings.max_connection_age_s,
        "grpc.max_connection_age_grace_ms": settings.drain_grace_s,
    }
    return [
        ("grpc.max_receive_message_length", 2 * settings.max_receive_bytes),
        ("grpc.max_send_message_length", settings.max_send_bytes),
        ("grpc.so_reuseport", int(settings.reuse_port)),
        ("grpc.keepalive_permit_without_calls", 1),
        *((name, int(s * 1000)) for name, s in milliseconds.items() if s is not None),
    ]
