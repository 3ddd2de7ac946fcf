"""docs/operations.md lists every metric, and its settings are read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from gr_serve_grpc.metrics import PipelineCollector, PrometheusObserver
from gr_serve_grpc.settings import GrpcSettings, PrometheusSettings

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def test_every_metric_is_listed():
    rows = re.findall(r"^\| (`gr[^|]*) \|", PAGE, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    # What describes a pipeline's metrics asks it nothing.
    pipeline: Any = None
    metrics = [
        *PrometheusObserver(PrometheusSettings(port=0)).registry.collect(),
        *PipelineCollector(pipeline, pipeline).describe(),
    ]
    assert listed == {m.name + ("_total" if m.type == "counter" else "") for m in metrics}


def test_the_settings_shown_are_valid():
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    settings = GrpcSettings.model_validate(tomllib.loads(text)["server"]["grpc"])
    assert settings.tls
    assert not settings.reflection
