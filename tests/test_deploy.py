"""The files of deploy/ fit the code: settings that exist, metrics that are exported."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import generate_latest

from gr_core.config import Config
from gr_serve_grpc.metrics import PrometheusObserver
from gr_serve_grpc.settings import GrpcSettings, PrometheusSettings, parse_settings

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_production_configuration_is_valid() -> None:
    config = Config.load(DEPLOY / "gr.toml", environ={})
    assert config.profile == "production"
    grpc = parse_settings(GrpcSettings, config.server["grpc"], "server.grpc")
    assert grpc.tls
    assert not grpc.allow_insecure
    parse_settings(PrometheusSettings, config.observers["prometheus"], "observers.prometheus")


def test_stopping_waits_for_the_drain() -> None:
    config = Config.load(DEPLOY / "gr.toml", environ={})
    grpc = parse_settings(GrpcSettings, config.server["grpc"], "server.grpc")
    needed = grpc.drain_delay_s + grpc.drain_grace_s
    unit = re.search(r"TimeoutStopSec=(\d+)", (DEPLOY / "gr.service").read_text())
    pod = re.search(
        r"terminationGracePeriodSeconds: (\d+)", (DEPLOY / "kubernetes.yaml").read_text()
    )
    assert unit is not None
    assert pod is not None
    assert int(unit[1]) > needed
    assert int(pod[1]) > needed


def test_alerts_use_metrics_that_are_exported() -> None:
    observer = PrometheusObserver({"port": 0})
    exported = set(
        re.findall(r"^# TYPE (\w+) ", generate_latest(observer.registry).decode(), re.MULTILINE)
    )
    text = (DEPLOY / "alerts.yml").read_text()
    used = set(re.findall(r"\b((?:gr|grpc)_\w+?)(?:_bucket)?[{\[]", text))
    assert used
    assert used <= exported
