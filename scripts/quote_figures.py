"""Renews the figures that pages quote from the files where they were written when measured.

    python scripts/quote_figures.py            renew them
    python scripts/quote_figures.py --check    change nothing; fail if one differs

A table below ``<!-- quoted from FILE#HEADING -->`` has the header, and some of the rows, of a table
in that section of the file. Its first columns, those of words, say which rows. A table below
``<!-- quoted whole from FILE#HEADING -->`` is the first table of that section.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/onnx.md",
    "docs/performance.md",
    "docs/quantization.md",
    "docs/vllm.md",
)
TABLE = r"(?:\|.*\n)+"
QUOTE = re.compile(rf"(<!-- quoted (whole )?from (\S+?)#(\S+) -->\n\n)({TABLE})")


def renewed(match: re.Match[str]) -> str:
    marker, whole, file, anchor, table = match.groups()
    text = section(ROOT / file, anchor)
    if whole:
        found = re.search(TABLE, text)
        if found is None:
            raise SystemExit(f"{file}#{anchor} has no table")
        return marker + found[0]
    source = rows_by_words(text)
    header, rule, *rows = table.splitlines()
    if gone := [row for row in (header, *rows) if words(row) not in source]:
        raise SystemExit(f"{file}#{anchor} has not what is quoted from it: {gone[0]}")
    lines = [source[words(header)], rule, *(source[words(row)] for row in rows)]
    return marker + "".join(line + "\n" for line in lines)


def section(file: Path, anchor: str) -> str:
    """The text below the heading that links name ``anchor``."""
    parts = re.split(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == anchor:
            return text
    raise SystemExit(f"{file}: no heading #{anchor}")


def rows_by_words(text: str) -> dict[tuple[str, ...], str]:
    return {words(row): row for row in re.findall(r"^\|.*$", text, re.MULTILINE)}


def words(row: str) -> tuple[str, ...]:
    """The cells before the first figure; all cells of a header."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    figures = [i for i, cell in enumerate(cells) if re.fullmatch(r"[+-]?[\d.,]+", cell)]
    return tuple(cells[: figures[0]] if figures else cells)


def main() -> int:
    status = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fresh = QUOTE.sub(renewed, text)
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(fresh, encoding="utf-8")
        elif fresh != text:
            print(f"{page} quotes old figures: run python scripts/quote_figures.py")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
