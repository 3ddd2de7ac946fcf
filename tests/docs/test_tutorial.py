"""docs/tutorial.md quotes the example plugin, whole files and all of its own, as they are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "gr-popularity"
QUOTES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def test_the_files_quoted_are_those_of_the_example():
    for name, quoted in QUOTES.items():
        assert quoted == (EXAMPLE / name).read_text(encoding="utf-8"), name


def test_nothing_that_the_plugin_needs_is_left_out():
    needed = {"pyproject.toml", "tests/test_conformance.py"}
    needed |= {f"src/gr_popularity/{file.name}" for file in SOURCES}
    assert needed <= QUOTES.keys()


SOURCES = [
    file for file in (EXAMPLE / "src" / "gr_popularity").glob("*.py") if file.name != "__init__.py"
]
