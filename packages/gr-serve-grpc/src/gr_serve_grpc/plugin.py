"""What the plugin registers. Imports gr_core alone; grpc loads when a server or client is made."""

from __future__ import annotations

from collections.abc import Iterable

from gr_core import CommandDescriptor, ObserverDescriptor, ServerDescriptor, hookimpl


@hookimpl
def gr_register_servers() -> Iterable[ServerDescriptor]:
    return [
        ServerDescriptor(
            name="grpc",
            factory="gr_serve_grpc.server:GrpcServer",
            summary="gr.v1 over gRPC, with health and reflection",
        )
    ]


@hookimpl
def gr_register_commands() -> Iterable[CommandDescriptor]:
    return [
        CommandDescriptor(
            name="call",
            factory="gr_serve_grpc.command:call",
            summary="Ask a running server for recommendations",
        )
    ]


@hookimpl
def gr_register_observers() -> Iterable[ObserverDescriptor]:
    return [
        ObserverDescriptor(
            name="prometheus",
            factory="gr_serve_grpc.metrics:prometheus_observer",
            summary="Prometheus metrics on their own port",
        )
    ]
