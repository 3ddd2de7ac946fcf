"""docs/configuration.md is what the code checks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gr_core.config import PROFILES, Config
from gr_serve_grpc.settings import GrpcSettings, PrometheusSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_reference_is_up_to_date():
    command = [sys.executable, "scripts/document_config.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_file_shown_is_valid(tmp_path: Path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "gr.toml").write_text(text)
    config = Config.load(tmp_path / "gr.toml", environ={})
    assert config.pipelines[0].retrieve_k == 200
    assert config.cache["results"].capacity_bytes == 256 << 20
    GrpcSettings.model_validate(config.server["grpc"])
    PrometheusSettings.model_validate(config.observers["prometheus"])


def test_the_variables_shown_are_read():
    variables = dict(re.findall(r"`(GR_\w+__\w+)=(\w+)`", PAGE))
    assert len(variables) == 3
    config = Config.load(environ={"GR_MODELS__0__NAME": "m", **variables})
    assert config.batching.max_queue == 64
    assert config.server["grpc"]["port"] == 8080
    assert config.models[0].device == "cuda"


def test_the_profiles_are_those_of_the_code():
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert {row[0] for row in rows} == {
        f"{section}.{field}"
        for profile in PROFILES.values()
        for section, values in profile.items()
        for field in values
    }
    for field, *shown in rows:
        section, name = field.split(".")
        for profile, value in zip(("development", "testing", "production"), shown, strict=True):
            config = Config.load(environ={"GR_PROFILE": profile})
            assert str(getattr(getattr(config, section), name)) == value
