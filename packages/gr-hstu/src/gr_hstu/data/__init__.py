"""Readers of datasets: ``load(name or folder)`` gives :class:`Interactions`."""

from __future__ import annotations

from pathlib import Path

from gr_hstu.data import amazon, folder, kuairand, ml100k
from gr_hstu.data.interactions import Interactions, Table

__all__ = ["DATASETS", "Interactions", "Table", "load"]

DATASETS = {
    "ml-100k": ml100k.read,
    "kuairand-pure": kuairand.read,
    "amazon-industrial-sid": amazon.read,
}
_MARKERS = {
    "ml-100k": "*.inter",
    "kuairand-pure": "events_*.csv.gz",
    "amazon-industrial-sid": amazon.MARKER,
}
"""A file that a dataset's folder has."""
SEARCHED = (Path("data"), Path("../shared/data"))


def load(data: str, data_dir: Path | None = None) -> Interactions:
    """Reads a known dataset by name, or any folder in the format of :mod:`gr_hstu.data.folder`.

    A known dataset is looked for as ``data_dir`` itself or ``data_dir/NAME``; without
    ``data_dir`` in ``./data`` and ``../shared/data``.

    Raises:
        FileNotFoundError: nothing is there; the message lists where it was looked for.
        ValueError: a file is not in the format.
    """
    if data not in DATASETS:
        path = Path(data)
        if not path.is_dir():
            raise FileNotFoundError(
                f"--data {data}: neither a folder nor a known dataset ({', '.join(DATASETS)})"
            )
        return folder.read(path)
    roots = SEARCHED if data_dir is None else (data_dir,)
    candidates = [
        p for root in roots for p in ((root, root / data) if data_dir else (root / data,))
    ]
    for path in candidates:
        if any(path.glob(_MARKERS[data])):
            return DATASETS[data](path)
    raise FileNotFoundError(
        f"{data}: not found in {', '.join(map(str, candidates))}; give its folder as --data-dir"
    )
