"""Who may call: bearer tokens and TLS."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

import grpc

from gr_core.errors import ConfigurationError
from gr_serve_grpc.settings import GrpcSettings

MIN_TOKEN = 16
"""Characters of a token. Shorter ones could be guessed."""


class Tokens:
    """The accepted bearer tokens. Only digests are kept, compared in constant time."""

    def __init__(self, tokens: Sequence[str], source: str) -> None:
        if not tokens:
            raise ConfigurationError(f"{source}: no token; give at least one, or leave it out")
        if any(len(t) < MIN_TOKEN for t in tokens):
            raise ConfigurationError(f"{source}: a token has less than {MIN_TOKEN} characters")
        self._digests = [_digest(token.encode()) for token in tokens]

    @classmethod
    def of(cls, settings: GrpcSettings) -> Tokens | None:
        """The tokens that the settings name; None if they name none. Raises ConfigurationError."""
        if settings.token_file is not None:
            text = read_file(settings.token_file, "token_file").decode()
            return cls(text.split(), f"token_file {settings.token_file}")
        if settings.token_env is not None:
            text = os.environ.get(settings.token_env, "")
            return cls(text.replace(",", " ").split(), f"environment variable {settings.token_env}")
        return None

    def accept(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """Whether a call's metadata has ``authorization: Bearer TOKEN`` with an accepted token."""
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str) and value[:7].lower() == "bearer ":
                digest = _digest(value[7:].strip().encode())
                # All are compared, so that the time does not tell which one matched.
                matches = [hmac.compare_digest(digest, known) for known in self._digests]
                return any(matches)
        return False


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def server_credentials(settings: GrpcSettings) -> grpc.ServerCredentials | None:
    """TLS credentials as the settings say; None for plaintext. Raises ConfigurationError."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    pair = (
        read_file(settings.tls_key, "tls_key"),
        read_file(settings.tls_certificate, "tls_certificate"),
    )
    if settings.tls_client_ca is None:
        return grpc.ssl_server_credentials([pair])
    authorities = read_file(settings.tls_client_ca, "tls_client_ca")
    return grpc.ssl_server_credentials([pair], authorities, require_client_auth=True)


def read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting} = {path}: {error.strerror}") from None
