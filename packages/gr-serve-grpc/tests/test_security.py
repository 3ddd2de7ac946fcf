"""TLS, mutual TLS, tokens, and what the settings refuse."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gr_core.errors import ConfigurationError, Unavailable
from gr_serve_grpc.auth import Tokens
from gr_serve_grpc.client import AsyncClient, CallError, Retries, Tls
from gr_serve_grpc.metrics import PrometheusObserver
from gr_serve_grpc.server import GrpcServer
from gr_serve_grpc.settings import GrpcSettings, PrometheusSettings, parse_settings

ONCE = Retries(attempts=1)
TOKEN, OTHER = "a-token-of-24-characters", "another-token-that-counts"


# ── Certificates ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Pair:
    certificate: Path
    key: Path


class Authority:
    """Makes certificates for tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Test {folder.name}")])
        constraints = (x509.BasicConstraints(ca=True, path_length=None), True)
        self.certificate = self._write("ca.pem", self._sign(self._name, self._key, constraints))

    def issue(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signed = self._sign(subject, key, (x509.SubjectAlternativeName(names), False))
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Pair(self._write(f"{name}.pem", signed), self._write(f"{name}.key", pem))

    def _sign(self, subject, key, extension) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(*extension)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def test_tls(serve, authority: Authority):
    pair = authority.issue("server")
    async with serve(tls_certificate=pair.certificate, tls_key=pair.key) as running:
        async with AsyncClient(running.address, tls=Tls(authority.certificate)) as client:
            assert (await client.recommend()).items
        async with AsyncClient(running.address, retries=ONCE) as plain:
            with pytest.raises(Unavailable):
                await plain.recommend()


async def test_a_certificate_of_another_authority_is_refused(
    serve, authority: Authority, tmp_path: Path
):
    pair, other = authority.issue("server"), Authority(tmp_path / "other")
    async with (
        serve(tls_certificate=pair.certificate, tls_key=pair.key) as running,
        AsyncClient(running.address, tls=Tls(other.certificate), retries=ONCE) as client,
    ):
        with pytest.raises(Unavailable):
            await client.recommend()


async def test_mutual_tls(serve, authority: Authority, tmp_path: Path):
    pair, mine = authority.issue("server"), authority.issue("client")
    strange = Authority(tmp_path / "other").issue("stranger")
    async with serve(
        tls_certificate=pair.certificate, tls_key=pair.key, tls_client_ca=authority.certificate
    ) as running:
        accepted = Tls(authority.certificate, mine.certificate, mine.key)
        async with AsyncClient(running.address, tls=accepted) as client:
            assert (await client.recommend()).items
        for refused in (
            Tls(authority.certificate),
            Tls(authority.certificate, strange.certificate, strange.key),
        ):
            async with AsyncClient(running.address, tls=refused, retries=ONCE) as client:
                with pytest.raises(Unavailable):
                    await client.recommend()


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────


async def code_with(address: str, token: str | None) -> str:
    async with AsyncClient(address, token=token, retries=ONCE) as client:
        try:
            await client.recommend()
        except CallError as error:
            return error.code.name
        return "OK"


async def test_tokens_from_a_file(serve, tmp_path: Path, caplog):
    caplog.set_level("DEBUG")
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{OTHER}\n")
    observer = PrometheusObserver(PrometheusSettings())
    async with serve(token_file=file, access_log=True, observers=[observer]) as running:
        assert await code_with(running.address, TOKEN) == "OK"
        assert await code_with(running.address, OTHER) == "OK"
        for wrong in (None, "", "x", TOKEN + "x", TOKEN[:-1], TOKEN.upper()):
            assert await code_with(running.address, wrong) == "UNAUTHENTICATED"
        async with grpc.aio.insecure_channel(running.address) as channel:
            # Health is for orchestrators, which have no token; the API's description is not.
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with AsyncClient(running.address, token="no", retries=ONCE) as client:
            with pytest.raises(CallError, match="UNAUTHENTICATED"):
                await anext(client.recommend_stream([]))
    assert observer.registry.get_sample_value("gr_unauthenticated_total") == 8
    assert not any(TOKEN in str(vars(record)) for record in caplog.records)


async def test_tokens_from_the_environment(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVER_TOKENS", f"{TOKEN},{OTHER}")
    async with serve(token_env="SERVER_TOKENS") as running:
        assert await code_with(running.address, OTHER) == "OK"
        assert await code_with(running.address, "x" * 24) == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (TOKEN, False),
        (f"Basic {TOKEN}", False),
        (f"Bearer {TOKEN} {TOKEN}", False),
    ],
)
def test_the_header_of_a_token(header: str, accepted: bool):
    assert Tokens([TOKEN], "test").accept([("authorization", header)]) is accepted


@pytest.mark.parametrize(("tokens", "problem"), [([], "no token"), (["short"], "less than 16")])
def test_tokens_that_protect_nothing(tokens: list[str], problem: str):
    with pytest.raises(ConfigurationError, match=problem) as caught:
        Tokens(tokens, "token_file x")
    assert "short" not in str(caught.value)


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0 is reachable from other machines .* allow_insecure = true"),
        ({"host": "::"}, "reachable from other machines"),
        ({"host": "example.org"}, "reachable from other machines"),
        ({"tls_key": "k"}, "tls_certificate and tls_key must be given together"),
        ({"tls_client_ca": "c"}, "tls_client_ca needs tls_certificate"),
        ({"token_file": "a", "token_env": "B"}, "not both"),
        ({"prot": 1}, "prot: not a setting; the settings are host, port"),
        ({"port": 70000, "max_send_bytes": 1}, "port = 70000: .*; max_send_bytes = 1: "),
        ({"drain_grace_s": "long"}, "drain_grace_s = 'long': "),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], message: str):
    with pytest.raises(ConfigurationError, match=f"^server.grpc: .*{message}"):
        parse_settings(GrpcSettings, settings, "server.grpc")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "localhost"},
        {"host": "127.1.2.3"},
        {"host": "::1"},
        {"host": "[::1]"},
        {"host": "0.0.0.0", "allow_insecure": True},
        {"host": "0.0.0.0", "tls_certificate": "a", "tls_key": "b"},
    ],
)
def test_settings_that_can_be_used(settings: dict[str, object]):
    parse_settings(GrpcSettings, settings, "server.grpc")


@pytest.mark.parametrize("setting", ["tls_certificate", "token_file"])
def test_files_that_are_not_there(setting: str, tmp_path: Path):
    missing = tmp_path / "missing"
    settings: dict[str, object] = {setting: missing}
    if setting == "tls_certificate":
        settings["tls_key"] = missing
    with pytest.raises(ConfigurationError, match=r"missing: No such file"):
        GrpcServer(None, settings)  # type: ignore[arg-type]


async def test_certificates_that_are_none(serve, tmp_path: Path):
    (tmp_path / "pem").write_text("not a certificate")
    with pytest.raises(ConfigurationError, match="certificate and key cannot be used"):
        async with serve(tls_certificate=tmp_path / "pem", tls_key=tmp_path / "pem"):
            pass
