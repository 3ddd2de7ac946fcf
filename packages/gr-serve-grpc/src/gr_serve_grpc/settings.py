"""Settings of the server, of its metrics and of clients' channels."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gr_core.errors import ConfigurationError

MIB = 1024 * 1024


class GrpcSettings(BaseModel):
    """The table ``[server.grpc]`` of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs TLS or `allow_insecure`."""
    port: int = Field(50051, ge=0, le=65535)
    """0 lets the system choose a free port."""
    reuse_port: bool = False
    """Lets several server processes share the port, each taking some of the connections."""

    tls_certificate: Path | None = None
    """PEM file with the server's certificate chain."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    tls_client_ca: Path | None = None
    """PEM file with the authorities whose client certificates are required (mutual TLS)."""
    token_file: Path | None = None
    """File with the accepted bearer tokens, one a line."""
    token_env: str | None = None
    """Environment variable with the accepted bearer tokens, separated by commas or lines."""
    allow_insecure: bool = False
    """Allows plaintext, and so tokens in plaintext, on addresses other than loopback."""
    reflection: bool = True
    """Whether tools like grpcurl may ask for the API's description."""

    max_receive_bytes: int = Field(16 * MIB, ge=1024, le=512 * MIB)
    """Size of a request; a larger one is INVALID_ARGUMENT, or cut off by the transport with
    RESOURCE_EXHAUSTED where it is larger than twice that."""
    max_send_bytes: int = Field(16 * MIB, ge=1024, le=512 * MIB)
    """Size of an answer."""
    max_concurrent_requests: int = Field(1024, ge=1)
    """Requests in work; more are refused at once with RESOURCE_EXHAUSTED."""
    max_stream_in_flight: int = Field(64, ge=1)
    """Unanswered requests of one stream; the server reads no more until one is answered."""
    default_timeout_s: float = Field(30.0, gt=0)
    """Deadline of requests that come without one."""

    keepalive_time_s: float = Field(60.0, gt=0)
    """Idle seconds after which a connection is probed."""
    keepalive_timeout_s: float = Field(20.0, gt=0)
    """Seconds without an answer to the probe after which the connection is closed."""
    min_client_ping_interval_s: float = Field(10.0, gt=0)
    """Clients that probe more often are disconnected."""
    max_connection_age_s: float | None = Field(None, gt=0)
    """Age after which a connection is closed gently, so that balancers can spread clients anew."""
    drain_delay_s: float = Field(0.0, ge=0)
    """Seconds between reporting NOT_SERVING and refusing new requests, for balancers to notice."""
    drain_grace_s: float = Field(30.0, gt=0)
    """Seconds that accepted requests have to finish at shutdown."""
    health_interval_s: float = Field(1.0, gt=0)
    """How often the health of the models is looked at."""
    access_log: bool = False
    """Logs every request; otherwise only internal errors."""

    @property
    def tls(self) -> bool:
        return self.tls_certificate is not None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be given together")
        if self.tls_client_ca is not None and not self.tls:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.token_file is not None and self.token_env is not None:
            raise ValueError("give token_file or token_env, not both")
        if not (self.tls or self.allow_insecure or is_loopback(self.host)):
            raise ValueError(
                f"{self.host} is reachable from other machines and traffic would be plaintext: "
                "give tls_certificate and tls_key, or set allow_insecure = true"
            )
        return self


class PrometheusSettings(BaseModel):
    """The table ``[observers.prometheus]`` of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address of the metrics page. Metrics hold no user data, but are not for everyone."""
    port: int = Field(9464, ge=0, le=65535)
    """0 lets the system choose a free port."""


Settings = TypeVar("Settings", bound=BaseModel)


def parse_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Checks a table of the configuration; one `ConfigurationError` names all that is wrong."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        problems = []
        for e in error.errors():
            name = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                problems.append(f"{name}: not a setting; the settings are {known}")
            elif name:
                problems.append(f"{name} = {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}")
            else:
                problems.append(e["msg"].removeprefix("Value error, "))
        raise ConfigurationError(f"{where}: " + "; ".join(problems)) from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
