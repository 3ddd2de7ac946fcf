"""The catalogue: external item ids, their indices in the model, and titles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gr_core.errors import BundleError
from gr_core.types import IntArray, ItemId, ItemIds, item_id_array

_DENSE_FACTOR = 16
"""Integer ids up to this multiple of the catalogue's size are looked up in one array access."""


class Catalogue:
    """All items of a model. Index 0 is padding and unknown; items have the indices 1..size.

    Ids are all integers or all strings. Looked-up ids may be of the other kind: ``"42"`` finds the
    integer 42 and the other way round, because clients in the field mix them.
    """

    def __init__(self, ids: Sequence[ItemId] | ItemIds, titles: Sequence[str] = ()) -> None:
        rows = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        self.ids: ItemIds = item_id_array(rows)
        self.titles = tuple(titles)
        if self.titles and len(self.titles) != len(self.ids):
            raise BundleError(
                f"catalogue: {len(self.titles)} titles for {len(self.ids)} items, expected one each"
            )
        self._integer = self.ids.dtype == np.int64
        self._by_id: dict[str, int] = {}
        self._dense: IntArray | None = None
        self._sorted: IntArray = np.empty(0, np.int64)
        self._order: IntArray = np.empty(0, np.int64)
        if self._integer:
            self._index_integers()
        else:
            self._by_id = {str(item): i for i, item in enumerate(self.ids, start=1)}
            if len(self._by_id) != len(self.ids):
                raise BundleError("catalogue: an item id occurs twice; ids must be unique")

    def _index_integers(self) -> None:
        order = np.argsort(self.ids, kind="stable")
        self._sorted, self._order = self.ids[order], order.astype(np.int64) + 1
        if len(self.ids) > 1 and bool(np.any(np.diff(self._sorted) == 0)):
            raise BundleError("catalogue: an item id occurs twice; ids must be unique")
        if len(self.ids) and self._sorted[0] >= 0:
            top = int(self._sorted[-1])
            if top < _DENSE_FACTOR * len(self.ids) + 1024:
                # Its last place is that of all ids which are not in it, and stays 0.
                self._dense = np.zeros(top + 2, np.int64)
                self._dense[self.ids] = np.arange(1, len(self.ids) + 1)

    def __len__(self) -> int:
        return len(self.ids)

    def indices_of(self, ids: ItemIds) -> IntArray:
        """Indices of external ids, shape (n,) int64; 0 where an id is unknown."""
        if len(ids) == 0 or len(self.ids) == 0:
            return np.zeros(len(ids), np.int64)
        if not self._integer:
            get = self._by_id.get
            return np.array([get(str(i), 0) for i in ids.tolist()], np.int64)
        if not np.can_cast(ids.dtype, np.int64):
            spelled = [_integer(i) for i in ids.tolist()]
            found = self.indices_of(np.array([i or 0 for i in spelled], np.int64))
            return np.where([i is not None for i in spelled], found, 0)
        if self._dense is not None:
            # As unsigned integers, negative ids are larger than all others.
            unsigned = ids.astype(np.int64, copy=False).view(np.uint64)
            place = np.minimum(unsigned, len(self._dense) - 1).view(np.int64)
            indices: IntArray = self._dense[place]
            return indices
        place = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[place] == ids, self._order[place], 0)

    def ids_of(self, indices: IntArray) -> ItemIds:
        """External ids of indices in 1..size, shape (n,)."""
        ids: ItemIds = self.ids[indices - 1]
        return ids

    def title(self, index: int) -> str:
        return self.titles[index - 1] if self.titles else ""

    def rows(self) -> Iterator[dict[str, Any]]:
        for i, item in enumerate(self.ids.tolist()):
            yield {"id": item, "title": self.titles[i]} if self.titles else {"id": item}

    def write(self, path: Path) -> None:
        """One JSON object a line, in the order of the indices."""
        with path.open("w", encoding="utf-8") as file:
            for row in self.rows():
                file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")

    @staticmethod
    def read(path: Path) -> Catalogue:
        """Raises `BundleError`, naming the line."""
        ids: list[ItemId] = []
        titles: list[str] = []
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    item, title = _row(path, number, line)
                    ids.append(item)
                    titles.append(title)
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: {error}") from error
        return Catalogue(ids, titles if any(titles) else ())


def _row(path: Path, number: int, line: str) -> tuple[ItemId, str]:
    """Id and title of a line."""
    try:
        row = json.loads(line)
        item = row["id"]
        if type(item) not in (int, str):
            raise ValueError(f"id {item!r} is neither an integer nor a string")
        return item, str(row.get("title") or "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path}, line {number}: expected an object with an id: {error}"
        ) from error


def _integer(item: Any) -> int | None:
    """An id as the 64-bit integer that it spells, in its one canonical spelling."""
    text = str(item)
    try:
        value = int(text)
    except ValueError:
        return None
    return value if str(value) == text and -(2**63) <= value < 2**63 else None
