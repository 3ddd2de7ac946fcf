"""Amazon reviews of products with semantic ids: histories and what came next, without times.

``index.json.gz`` maps an item to its codes (``["<a_236>", "<b_231>", "<c_226>"]``);
``valid.csv.gz`` and ``test.csv.gz`` have a case a line: the last 10 items of a user and the next
one. The cases of a user follow one another, so they are read as one sequence of items.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr_hstu.data.interactions import Interactions, Table, number

MARKER = "index.json.gz"
VALIDATION, TEST = "validation", "test"
_PARTS = {VALIDATION: "valid.csv.gz", TEST: "test.csv.gz"}
HISTORY = 10
"""Items of a case's history, at most."""
TARGET = "is_target"
"""Signal of what is to be found."""
_FIRST_MS = 1_500_000_000_000
_MINUTE_MS = 60_000
_CODE = re.compile(r"<[a-z]_(\d+)>")

ATTRIBUTION = (
    "Amazon product reviews, Industrial and Scientific, with semantic ids of three codes: items, "
    "and the order in which users met them."
)
LICENCE = "the folder's; not redistributed here"


def read(folder: Path) -> Interactions:
    """Sequences of all cases; a user of both parts is two users.

    Signal ``is_target``: 1 for the items to be found. Users have the feature ``part``, items
    ``code_1`` and so on. There are no times: events lie a minute apart, in order. Raises ValueError
    that names the file and the line.
    """
    codes = _codes(folder / MARKER)
    users: list[str] = []
    items: list[str] = []
    targets: list[bool] = []
    parts: list[str] = []
    titles: dict[str, str] = {}
    for part, name in _PARTS.items():
        for user, sequence in _sequences(folder / name, titles):
            users += [f"{part} {user}"] * len(sequence.items)
            items += sequence.items
            targets += [i >= sequence.given for i in range(len(sequence.items))]
            parts.append(part)
    if unknown := sorted(set(items) - codes.keys()):
        raise ValueError(f"{folder / MARKER}: no codes of item {unknown[0]!r}")
    user_N, user_ids = number(users)
    # All that have codes, so that an item that nobody met can be generated too.
    index = {item: i for i, item in enumerate(sorted(codes, key=int), start=1)}
    code_IL = np.array([codes[item] for item in index], np.float32)
    return Interactions.sort(
        Interactions(
            name="amazon-industrial-sid",
            user_N=user_N,
            item_N=np.array([index[item] for item in items], np.int64),
            timestamp_ms_N=_FIRST_MS + _MINUTE_MS * np.arange(len(items), dtype=np.int64),
            signals={TARGET: np.array(targets, np.float32)},
            users=Table(
                user_ids, features={"part": np.array([user.split()[0] for user in user_ids])}
            ),
            items=Table(
                tuple(index),
                titles=tuple(titles.get(item, item) for item in index),
                features={
                    f"code_{level + 1}": code_IL[:, level] for level in range(len(code_IL.T))
                },
            ),
            attribution=ATTRIBUTION,
            licence=LICENCE,
        )
    )


@dataclass(slots=True)
class _Sequence:
    items: list[str]
    given: int
    """The first items, which are the history of the first case."""


def _codes(path: Path) -> dict[str, list[int]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        data = json.load(file)
    codes = {}
    for item, texts in data.items():
        found = [_CODE.fullmatch(text) for text in texts]
        if not found or not all(found) or not item.isdigit():
            raise ValueError(f"{path}: item {item!r} has {texts!r}, expected codes like <a_236>")
        codes[item] = [int(match[1]) for match in found if match]
    if len(levels := {len(c) for c in codes.values()}) != 1:
        raise ValueError(f"{path}: items of {sorted(levels)} codes, expected the same for all")
    return codes


def _sequences(path: Path, titles: dict[str, str]) -> Iterator[tuple[str, _Sequence]]:
    """A sequence of each user; fills in titles."""
    cases: dict[str, list[tuple[list[str], str]]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            history = [str(item) for item in _list(row["history_item_id"], where)]
            target = row["item_id"]
            cases.setdefault(row["user_id"], []).append((history, target))
            names = map(str, _list(row["history_item_title"], where))
            titles.update(zip(history, names, strict=False))
            titles[target] = row["item_title"]
    for user, own in cases.items():
        own.sort(key=lambda case: len(case[0]))
        sequence = _Sequence([*own[0][0], own[0][1]], len(own[0][0]))
        for history, target in own[1:]:
            if sequence.items[-HISTORY:] != history:
                raise ValueError(f"{path}: the cases of user {user!r} do not follow one another")
            sequence.items.append(target)
        yield user, sequence


def _list(text: str | None, where: str) -> Sequence[object]:
    try:
        value = ast.literal_eval(text or "")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{where}: {text!r:.60}, expected a list")
    return value
