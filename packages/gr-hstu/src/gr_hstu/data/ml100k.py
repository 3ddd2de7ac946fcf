"""MovieLens-100K in RecBole's atomic format (``ml-100k.inter``, ``.item``, ``.user``)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from gr_hstu.data.interactions import Interactions, Table, number

ATTRIBUTION = (
    "MovieLens 100K, GroupLens Research, University of Minnesota. F. M. Harper and J. A. Konstan: "
    "The MovieLens Datasets: History and Context. ACM TiiS 5(4), 2015."
)
LICENCE = "research use only; not redistributed here"


def read(folder: Path) -> Interactions:
    """All 100,000 ratings; signal ``rating`` (1 to 5)."""
    rows = _atomic(folder / "ml-100k.inter")
    user_N, user_ids = number([r["user_id"] for r in rows])
    titles = {r["item_id"]: r for r in _atomic(folder / "ml-100k.item")}
    people = {r["user_id"]: r for r in _atomic(folder / "ml-100k.user")}
    item_N, item_ids = number([r["item_id"] for r in rows])
    return Interactions.sort(
        Interactions(
            name="ml-100k",
            user_N=user_N,
            item_N=item_N,
            timestamp_ms_N=np.array([int(float(r["timestamp"])) * 1000 for r in rows], np.int64),
            signals={"rating": np.array([float(r["rating"]) for r in rows], np.float32)},
            users=Table(
                user_ids,
                features={
                    name: np.array([people.get(u, {}).get(name, "") for u in user_ids])
                    for name in ("age", "gender", "occupation")
                },
            ),
            items=Table(
                item_ids,
                titles=tuple(
                    f"{titles[i]['movie_title']} ({titles[i]['release_year']})"
                    if i in titles
                    else i
                    for i in item_ids
                ),
                features={
                    "class": np.array([titles.get(i, {}).get("class", "") for i in item_ids])
                },
            ),
            attribution=ATTRIBUTION,
            licence=LICENCE,
        )
    )


def _atomic(path: Path) -> list[dict[str, str]]:
    """Rows of an atomic file; ``name:type`` in the header becomes ``name``."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [name.split(":")[0] for name in next(reader)]
        return [dict(zip(names, row, strict=False)) for row in reader]
