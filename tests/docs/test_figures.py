"""The figures of pages are those that were written when they were measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_quoted_figures_are_those_of_their_sources():
    command = [sys.executable, "scripts/quote_figures.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_every_table_of_figures_is_quoted(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    measured = re.split(r"^## ", text.split("## Measured\n")[1], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", measured, re.MULTILINE)
    assert len(tables) == len(re.findall("<!-- quoted (?:whole )?from ", measured)) > 0
