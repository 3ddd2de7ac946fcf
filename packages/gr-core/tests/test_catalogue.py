"""The catalogue against a dict, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core.errors import BundleError
from gr_core.repository import Catalogue
from gr_core.types import item_id_array

LOWEST, HIGHEST = -(2**63), 2**63 - 1
int_ids = st.one_of(
    st.integers(0, 60), st.integers(-60, 60), st.sampled_from([LOWEST, LOWEST + 1, HIGHEST, 2**53])
)
str_ids = st.one_of(
    st.text(max_size=4), st.integers(-60, 60).map(str), st.sampled_from(["01", "+1", " 1", "1.0"])
)
far_ids = st.integers(LOWEST, HIGHEST)
any_id = st.one_of(int_ids, str_ids, far_ids)


def naive(ids: list, asked: list) -> list[int]:
    """Indices by text, which is what makes 42 and "42" the same."""
    index = {str(item): i for i, item in enumerate(ids, start=1)}
    return [index.get(str(item), 0) for item in asked]


@given(st.lists(int_ids, unique=True, max_size=30), st.lists(any_id, max_size=30))
def test_integer_catalogues_look_up_like_a_dict(ids: list[int], asked: list) -> None:
    catalogue = Catalogue(ids)
    assert catalogue.indices_of(item_id_array(asked)).tolist() == naive(ids, asked)
    assert catalogue.indices_of(np.array([str(a) for a in asked], object)).tolist() == naive(
        ids, asked
    )
    assert catalogue.indices_of(catalogue.ids).tolist() == list(range(1, len(ids) + 1))


@given(st.lists(far_ids, unique=True, max_size=30), st.lists(far_ids, max_size=30))
def test_sparse_integers_look_up_like_a_dict(ids: list[int], asked: list[int]) -> None:
    asked = asked + ids[:5] + [i - 1 for i in ids[:5] if i > LOWEST]
    assert Catalogue(ids).indices_of(np.array(asked, np.int64)).tolist() == naive(ids, asked)


@given(st.lists(str_ids, unique=True, max_size=30), st.lists(any_id, max_size=30))
def test_string_catalogues_look_up_like_a_dict(ids: list[str], asked: list) -> None:
    catalogue = Catalogue(ids)
    assert catalogue.indices_of(item_id_array(asked)).tolist() == naive(ids, asked)
    asked_for = np.array([str(a) for a in asked]) if asked else np.empty(0, "U1")
    exact = [str(a).rstrip("\0") for a in asked]  # numpy strips it from its own strings
    assert catalogue.indices_of(asked_for).tolist() == naive(ids, exact)


def test_mixed_ids_are_strings() -> None:
    catalogue = Catalogue([1, "a"])
    assert catalogue.ids.tolist() == ["1", "a"]
    assert catalogue.indices_of(np.array([1, 2])).tolist() == [1, 0]


def test_ids_of_other_integer_types_are_found() -> None:
    catalogue = Catalogue([5, 7])
    assert catalogue.indices_of(np.array([7, 5, 6], np.int32)).tolist() == [2, 1, 0]
    assert catalogue.indices_of(np.array([7, 5, 6], np.uint8)).tolist() == [2, 1, 0]
    assert catalogue.indices_of(np.array([7, 5, 2**63 + 5], np.uint64)).tolist() == [2, 1, 0]


def test_indices_and_ids_are_inverse() -> None:
    catalogue = Catalogue([30, 10, 20], ["c", "a", "b"])
    indices = catalogue.indices_of(np.array([10, 30]))
    assert catalogue.ids_of(indices).tolist() == [10, 30]
    assert [catalogue.title(i) for i in indices.tolist()] == ["a", "c"]
    assert len(catalogue) == 3
    assert Catalogue([1]).title(1) == ""


@pytest.mark.parametrize("ids", [[1, 1], [2**40, 3, 2**40], ["a", "a"], [1, "1"]])
def test_an_id_that_occurs_twice_is_refused(ids: list) -> None:
    with pytest.raises(BundleError, match="occurs twice"):
        Catalogue(ids)


def test_titles_must_match() -> None:
    with pytest.raises(BundleError, match="2 titles for 1 items"):
        Catalogue([1], ["a", "b"])


# ── The file ──────────────────────────────────────────────────────────────────────────────────


@given(
    st.one_of(
        st.lists(far_ids, unique=True, max_size=10), st.lists(str_ids, unique=True, max_size=10)
    ),
    st.data(),
)
def test_the_file_says_the_same(tmp_path_factory, ids: list, data: st.DataObject) -> None:
    titles = data.draw(st.lists(st.text(max_size=8), min_size=len(ids), max_size=len(ids)))
    before = Catalogue(ids, titles if data.draw(st.booleans()) else ())
    file = tmp_path_factory.mktemp("catalogue") / "catalogue.jsonl"
    before.write(file)
    after = Catalogue.read(file)
    assert after.ids.tolist() == before.ids.tolist()
    assert after.ids.dtype == before.ids.dtype
    assert [after.title(i + 1) for i in range(len(ids))] == [
        before.title(i + 1) for i in range(len(ids))
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "[]",
        "null",
        "{}",
        '{"title": "x"}',
        '{"id": 1.5}',
        '{"id": true}',
        '{"id": null}',
        "",
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "catalogue.jsonl"
    file.write_text(f'{{"id": 1}}\n{line}\n')
    with pytest.raises(BundleError, match=r"catalogue\.jsonl, line 2: expected an object"):
        Catalogue.read(file)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.jsonl"
    with pytest.raises(BundleError, match=r"catalogue\.jsonl"):
        Catalogue.read(file)
    file.write_bytes(b'{"id": 1}\n\xff\xfe\n')
    with pytest.raises(BundleError, match=r"catalogue\.jsonl"):
        Catalogue.read(file)


def test_ids_beyond_64_bits_are_strings(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.jsonl"
    Catalogue([1, 2**63]).write(file)
    catalogue = Catalogue.read(file)
    assert catalogue.indices_of(item_id_array([2**63, 1, 2**64])).tolist() == [2, 1, 0]
    assert Catalogue([1, 2]).indices_of(item_id_array([2**63, 2])).tolist() == [0, 2]
