"""The code of the README and the docs runs, page by page from top to bottom, as a reader would.

In ``console`` blocks the lines after ``$`` are run; what follows a command, if anything, is what it
must print, where ``...`` stands for anything. A command that ends with ``&`` runs until the end of
the page and must then stop cleanly. ``python`` blocks are run by one interpreter a page. Commands
that install, clone or need a tool that is not a package of Python are not run.
"""

from __future__ import annotations

import doctest
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
NOT_RUN = ("pip ", "python3.11 -m venv", "nox", "git ", "grpcurl", "pytest")
PORT = "50051"
QUOTED = ("docs/tutorial.md", "docs/hooks.md")
"""Pages whose Python is quoted from files, which other tests compare."""
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    kind: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield Block(kind, body)


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Commands with what they must print."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        yield command.partition("  #")[0].strip(), expected.strip()


class Reader:
    """Runs the blocks of a page, in a folder where the repository's examples are."""

    def __init__(self, folder: Path, env: Mapping[str, str], port: int) -> None:
        self._folder = folder
        self._env = {**env, "GR_SERVER__GRPC__PORT": str(port)}
        self._port = str(port)
        self._background: list[subprocess.Popen[str]] = []
        self._python = ""
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / "scripts").symlink_to(ROOT / "scripts")
        (folder / "interactions.csv").write_text(to_csv(WATCHED, ["user_id", "item_id", "title"]))
        (folder / "videos").mkdir()
        columns = ["user_id", "item_id", "timestamp_ms", "watch_percentage"]
        (folder / "videos" / "interactions.csv").write_text(to_csv(WATCHED, columns))

    def read(self, block: Block) -> None:
        if block.kind == "console":
            for command, expected in commands(block):
                if not command.startswith(NOT_RUN):
                    self._run(command, expected)
        elif block.kind == "python":
            # Blocks build on each other; all before this one are run again, which is quick.
            self._python += block.text
            self._check([sys.executable, "-c", self._python.replace(PORT, self._port)], "")

    def _run(self, command: str, expected: str) -> None:
        if command.endswith("&"):
            arguments = shlex.split(command.removesuffix("&"))
            process = subprocess.Popen(
                arguments, cwd=self._folder, env=self._env, stdout=subprocess.PIPE, text=True
            )
            self._background.append(process)
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving on"), command
        else:
            if command.startswith("gr call"):
                command += f" --target 127.0.0.1:{PORT}"
            self._check(["bash", "-c", command.replace(PORT, self._port)], expected)

    def _check(self, command: list[str], expected: str) -> None:
        result = subprocess.run(
            command, cwd=self._folder, env=self._env, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"
        printed = result.stdout.replace(self._port, PORT)
        matches = doctest.OutputChecker().check_output(expected, printed, OPTIONS)
        assert not expected or matches, f"{command[-1]}\nexpected:\n{expected}\ngot:\n{printed}"

    def close(self) -> None:
        for process in self._background:
            process.send_signal(signal.SIGTERM)
        for process in self._background:
            assert process.wait(timeout=60) == 0


WATCHED = [
    {
        "user_id": user,
        "item_id": item,
        "timestamp_ms": 1_700_000_000_000 + 60_000 * step,
        "watch_percentage": (user + item) % 5 / 4,
        "title": f"Video {item}",
    }
    for user in range(40)
    for step, item in enumerate((user * 7 + step * (1 + user % 3)) % 30 for step in range(12))
]
"""What pages call interactions.csv: 40 users who watched 12 of 30 videos each."""


def to_csv(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    return "".join(
        ",".join(map(str, row)) + "\n" for row in [columns, *map(itemgetter(*columns), rows)]
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(
    page: str, with_popularity: Mapping[str, str], tmp_path: Path, free_port: int
):
    found = [b for b in blocks(page) if not (page in QUOTED and b.kind == "python")]
    if not any(block.kind in ("console", "python") for block in found):
        pytest.skip("no code on this page")
    reader = Reader(tmp_path, with_popularity, free_port)
    try:
        for block in found:
            reader.read(block)
    finally:
        reader.close()
