"""Readers: the datasets at hand, a folder of one's own, and what every reader promises."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from gr_hstu.data import Interactions, load
from gr_hstu.training.settings import retrieval_settings, retrieval_split

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


def test_amazon() -> None:
    data = dataset("amazon-industrial-sid")
    check_promises(data)
    assert (len(data), len(data.users), len(data.items)) == (12_967 + 13_803, 2011 + 1987, 3686)
    assert int(data.signals["is_target"].sum()) == 4532 + 4533
    assert data.items.ids[236] == "236"
    assert [float(data.items.features[f"code_{i}"][0]) for i in (1, 2, 3)] == [236, 231, 226]
    assert set(data.users.features["part"]) == {"validation", "test"}
    split = retrieval_split(data, retrieval_settings(data))
    assert len(split.test) == 4533
    # Whoever is tested or validated is not trained on, and each case has the history of its line.
    for cases in (split.test, split.validation):
        assert not split.train_N[cases.row_C].any()
        assert (data.user_N[cases.start_C] == data.user_N[cases.row_C]).all()
        assert ((cases.end_C == cases.row_C) & (cases.end_C - cases.start_C <= 10)).all()
        assert (cases.end_C > cases.start_C).all()
    assert not split.refit_N[split.test.row_C].any()
    row = int(
        split.test.row_C[data.users.ids.index("test A474") == data.user_N[split.test.row_C] - 1][0]
    )
    assert data.items.title(int(data.item_N[row])).startswith("T-Rex 241309")


def amazon_folder(
    folder: Path, valid: str, codes: str = '{"7": ["<a_1>"], "9": ["<a_0>"]}'
) -> Path:
    head = "user_id,history_item_title,item_title,history_item_id,item_id\n"
    for name, text in (
        ("index.json.gz", codes),
        ("valid.csv.gz", head + valid),
        ("test.csv.gz", head + "u,\"['b']\",a,[9],7\n"),
    ):
        with gzip.open(folder / name, "wt") as file:
            file.write(text)
    return folder


def test_cases_of_a_user_are_one_sequence(tmp_path: Path) -> None:
    rows = "u,\"['a']\",b,[7],9\n" + "u,\"['a', 'b']\",b,\"[7, 9]\",9\n"
    data = load("amazon-industrial-sid", amazon_folder(tmp_path, rows))
    check_promises(data)
    assert data.users.ids == ("test u", "validation u")
    assert data.item_N.tolist() == [2, 1, 1, 2, 2]
    assert data.signals["is_target"].tolist() == [0, 1, 0, 1, 1]
    assert data.items.titles == ("a", "b")
    assert data.items.features["code_1"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rows", "codes", "message"),
    [
        ('u,[],b,[7],9\nu,[],b,"[9, 9]",9\n', '{"7": ["<a_1>"], "9": ["<a_0>"]}', "follow one"),
        ("u,[],b,7,9\n", '{"7": ["<a_1>"], "9": ["<a_0>"]}', "line 2: '7', expected a list"),
        ("u,[],b,[7],9\n", '{"7": ["<a_1>"], "9": ["x"]}', "item '9' has .* expected codes"),
        ("u,[],b,[7],9\n", '{"7": ["<a_1>"], "9": ["<a_1>", "<b_1>"]}', r"items of \[1, 2\]"),
        ("u,[],b,[7],8\n", '{"7": ["<a_1>"], "9": ["<a_0>"]}', "no codes of item '8'"),
    ],
)
def test_a_wrong_amazon_folder_is_explained(
    tmp_path: Path, rows: str, codes: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load("amazon-industrial-sid", amazon_folder(tmp_path, rows, codes))


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
