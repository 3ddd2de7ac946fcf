"""Readers: the datasets at hand, a folder of one's own, and what every reader promises."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from gr_hstu.data import Interactions, load

SHARED = Path(__file__).parents[4] / "shared" / "data"


def dataset(name: str) -> Interactions:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    return load(name, SHARED)


def check_promises(data: Interactions) -> None:
    """Sorted by user, time and row; indices within the tables; columns of one length."""
    key = np.lexsort((np.arange(len(data)), data.timestamp_ms_N, data.user_N))
    assert (key == np.arange(len(data))).all()
    assert data.user_N.min() >= 1
    assert data.user_N.max() <= len(data.users)
    assert data.item_N.min() >= 1
    assert data.item_N.max() <= len(data.items)
    for column in (*data.signals.values(), *data.context.values()):
        assert len(column) == len(data)
    same_user = data.user_N[data.start_N] == data.user_N
    assert same_user.all()
    assert (data.start_N <= np.arange(len(data))).all()
    before = data.strictly_before_N
    assert (before >= data.start_N).all()
    assert (before <= np.arange(len(data))).all()


def test_movielens() -> None:
    data = dataset("ml-100k")
    check_promises(data)
    assert (len(data), len(data.users), len(data.items)) == (100_000, 943, 1682)
    assert data.items.title(data.items.ids.index("1") + 1) == "Toy Story (1995)"
    assert np.nanmean(data.signals["rating"]) == pytest.approx(3.52986)


def test_kuairand() -> None:
    data = dataset("kuairand-pure")
    check_promises(data)
    assert data.timed_N is not None
    assert int(data.timed_N.sum()) == 228_329 - 5_460  # exact duplicates dropped
    # Earlier behaviours come first and never carry a time after the user's first timed event.
    user_changes = np.diff(data.user_N) != 0
    assert not (data.timed_N[:-1] & ~data.timed_N[1:] & ~user_changes).any()
    assert data.signals["is_clicked"][data.timed_N].mean() == pytest.approx(0.449, abs=1e-3)
    assert np.isnan(data.signals["is_clicked"][~data.timed_N]).all()
    assert data.items.title(1) == "video 0 · 87 s · tag 39"
    assert "CC BY-SA 4.0" in data.licence
    assert "KuaiRand" in data.attribution


def write_folder(folder: Path, interactions: str, **tables: str) -> Path:
    with gzip.open(folder / "interactions.csv.gz", "wt") as file:
        file.write(interactions)
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def test_a_folder_is_read(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        "user_id,item_id,timestamp_ms,is_liked,context.tab\n"
        "anna,10,2000,1,0\nbert,9,1500,,3\nanna,9,1000,0,1\nanna,10,2000,,2\n",
        items="item_id,title,seconds,kind\n9,Nine,12.5,a\n10,Ten,,b\n",
        users="user_id,city\nbert,Graz\n",
    )
    data = load(str(tmp_path))
    check_promises(data)
    assert data.items.ids == ("9", "10")  # by value, not as text
    assert data.users.ids == ("anna", "bert")
    assert data.item_N.tolist() == [1, 2, 2, 1]
    assert data.context["tab"].tolist() == [1, 0, 2, 3]  # equal times keep the order of the file
    np.testing.assert_array_equal(data.signals["is_liked"], [0, 1, np.nan, np.nan])
    assert data.items.title(2) == "Ten"
    np.testing.assert_array_equal(data.items.features["seconds"], np.float32([12.5, np.nan]))
    assert data.users.features["city"].tolist() == ["", "Graz"]
    assert data.strictly_before_N.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id,item_id\na,b\n", "no column timestamp_ms"),
        ("user_id,item_id,timestamp_ms\na,b,noon\n", "line 2: timestamp_ms must be an integer"),
        ("user_id,item_id,timestamp_ms\na,b\n", "line 2: 2 values for 3 columns"),
        ("user_id,item_id,timestamp_ms,x\na,b,1,high\n", "line 2: x must be a number"),
        ("user_id,item_id,timestamp_ms\n", "no rows"),
    ],
)
def test_a_wrong_folder_is_explained(tmp_path: Path, text: str, message: str) -> None:
    write_folder(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_unknown_data_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a known dataset"):
        load("movielens-1b")
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        load("ml-100k", tmp_path)
