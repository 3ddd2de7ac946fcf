"""Makes a new plugin package that passes the conformance kit, to be changed from there.

    python scripts/new_plugin.py NAME [--into FOLDER]

The package gr-NAME starts as a copy of examples/gr-popularity under its own names: a model, an
engine, a command, and their tests. docs/tutorial.md explains each file.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "examples" / "gr-popularity"
FILES = ("pyproject.toml", "LICENSE", "src/**/*.py", "tests/**/*.py")

README = """\
# gr-{name}

A plugin of gr-core.

    pip install -e .
    gr plugins list
    pytest

It starts as a popularity recommender. `plugin.py` says what it registers: drop what you do not
need, and put your own behind the rest. The tests subclass the conformance kit, `gr_core.testing`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="lower case, e.g. trending or my-engine")
    parser.add_argument(
        "--into", type=Path, default=Path(), help="folder to make gr-NAME in; default: this one"
    )
    arguments = parser.parse_args()
    name = arguments.name.removeprefix("gr-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        parser.error(f"NAME: {arguments.name!r}, expected words of a-z and 0-9 joined by '-'")
    out = arguments.into / f"gr-{name}"
    if out.exists():
        parser.error(f"{out} exists; choose another NAME or folder")
    make(name, out)
    print(f"{out}: try `pip install -e {out}` and `pytest {out}`")


def make(name: str, out: Path) -> None:
    """Writes the package ``gr-<name>`` to ``out``."""
    renamed = {
        "gr_popularity": f"gr_{name.replace('-', '_')}",
        "test_popularity": f"test_{name.replace('-', '_')}",
        "Popularity": "".join(word.capitalize() for word in name.split("-")),
        "popularity": name,
    }
    old = re.compile("|".join(renamed))
    for source in sorted(path for pattern in FILES for path in TEMPLATE.glob(pattern)):
        target = out / old.sub(lambda m: renamed[m[0]], str(source.relative_to(TEMPLATE)))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        target.write_text(old.sub(lambda m: renamed[m[0]], text), encoding="utf-8")
    (out / "README.md").write_text(README.format(name=name), encoding="utf-8")


if __name__ == "__main__":
    main()
