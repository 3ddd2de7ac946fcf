"""The figures of the README are those that were written when they were measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quoted_figures_are_those_of_their_sources():
    command = [sys.executable, "scripts/quote_figures.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_table_of_figures_is_quoted():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = re.split(r"^## ", readme.split("## Measured\n")[1], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", measured, re.MULTILINE)
    assert len(tables) == measured.count("<!-- quoted from ") > 0
