"""Renews the figures that README.md quotes from the files where they were written when measured.

    python scripts/quote_figures.py            renew them
    python scripts/quote_figures.py --check    change nothing; fail if one differs

A table below ``<!-- quoted from FILE#HEADING -->`` has the header, and some of the rows, of a table
in that section of the file. Its first columns, those of words, say which rows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
QUOTE = re.compile(r"(<!-- quoted from (\S+?)#(\S+) -->\n\n)((?:\|.*\n)+)")


def renewed(match: re.Match[str]) -> str:
    marker, file, anchor, table = match.groups()
    source = rows_by_words(section(ROOT / file, anchor))
    header, rule, *rows = table.splitlines()
    if gone := [row for row in (header, *rows) if words(row) not in source]:
        raise SystemExit(f"README.md quotes from {file}#{anchor} what is not there: {gone[0]}")
    found = [source[words(header)], rule, *(source[words(row)] for row in rows)]
    return marker + "".join(row + "\n" for row in found)


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
    text = README.read_text(encoding="utf-8")
    fresh = QUOTE.sub(renewed, text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("README.md quotes old figures: run python scripts/quote_figures.py")
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
