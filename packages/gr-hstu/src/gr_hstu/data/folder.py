"""Any dataset as a folder of CSV files.

``interactions.csv`` (or ``.csv.gz``): columns ``user_id``, ``item_id``, ``timestamp_ms`` (Unix
milliseconds) and any number of further numeric columns, each of which becomes a signal (an empty
cell is an unknown value). A column named ``context.NAME`` is an integer fact about the request.

``items.csv`` and ``users.csv`` (optional, also ``.gz``): ``item_id`` or ``user_id``, for items
``title`` if there are any, and further columns, which become side features: numbers if every
filled cell is a number, else categories.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from gr_hstu.data.interactions import Interactions, Table, number


def read(folder: Path) -> Interactions:
    """Reads the folder; ValueError names the file, line and column that is wrong."""
    path, columns = _columns(
        folder, "interactions", required=("user_id", "item_id", "timestamp_ms")
    )
    if not columns["user_id"]:
        raise ValueError(f"{path}: no rows")
    user_N, user_ids = number(columns.pop("user_id"))
    item_N, item_ids = number(columns.pop("item_id"))
    timestamp_ms = columns.pop("timestamp_ms")
    context = {n: columns.pop(n) for n in list(columns) if n.startswith("context.")}
    return Interactions.sort(
        Interactions(
            name=folder.name,
            user_N=user_N,
            item_N=item_N,
            timestamp_ms_N=_integers(path, "timestamp_ms", timestamp_ms),
            signals={n: _floats(path, n, column) for n, column in columns.items()},
            context={n.removeprefix("context."): _integers(path, n, c) for n, c in context.items()},
            users=_table(folder, "users", "user_id", user_ids),
            items=_table(folder, "items", "item_id", item_ids),
        )
    )


def _columns(
    folder: Path, stem: str, required: tuple[str, ...]
) -> tuple[Path, dict[str, list[str]]]:
    paths = [p for p in (folder / f"{stem}.csv", folder / f"{stem}.csv.gz") if p.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder}: no {stem}.csv or {stem}.csv.gz")
    path = paths[0]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        missing = [name for name in required if name not in names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(names)}")
        rows = []
        for row in reader:
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} values for {len(names)} columns"
                )
            rows.append(row)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    return path, {name: list(column) for name, column in zip(names, columns, strict=True)}


def _integers(path: Path, name: str, values: list[str]) -> np.ndarray:
    for line, value in enumerate(values, start=2):
        if not value.strip().lstrip("-").isdigit():
            raise ValueError(f"{path}, line {line}: {name} must be an integer, not {value!r}")
    return np.array(values, dtype=np.int64)


def _floats(path: Path, name: str, values: list[str]) -> np.ndarray:
    out = np.full(len(values), np.nan, np.float32)
    for i, value in enumerate(values):
        if value:
            try:
                out[i] = float(value)
            except ValueError:
                message = f"{path}, line {i + 2}: {name} must be a number, not {value!r}"
                raise ValueError(message) from None
    return out


def _table(folder: Path, stem: str, key: str, ids: tuple[str, ...]) -> Table:
    try:
        path, columns = _columns(folder, stem, required=(key,))
    except FileNotFoundError:
        return Table(ids)
    row_of = {value: row for row, value in enumerate(columns.pop(key))}
    # One more row, empty, for entities that the file leaves out.
    order = np.array([row_of.get(i, -1) for i in ids])
    titles = columns.pop("title", None)
    features = {}
    for name, values in columns.items():
        try:
            column = _floats(path, name, [*values, ""])
        except ValueError:
            column = np.array([*values, ""])
        features[name] = column[order]
    return Table(
        ids,
        None
        if titles is None
        else tuple(titles[r] if r >= 0 else i for r, i in zip(order, ids, strict=True)),
        features,
    )
