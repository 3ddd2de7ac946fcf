"""The exact search in C++ against torch's scores and top-k."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_core.errors import PlanError
from gr_kernels.native import find, instruction_sets

if find()[0] is None:
    pytest.skip(find()[1], allow_module_level=True)

from gr_kernels.retrieval.exact import ExactIndex

ISAS = [isa for isa in instruction_sets("float32") if isa in ("avx512", "avx2")]


def whole_numbers(rows: int, width: int, seed: int, most: int = 3) -> torch.Tensor:
    """Small ones, of which sums are exact and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (rows, width), generator=generator).float()


def expected(users_BD: torch.Tensor, table_ID: torch.Tensor, k: int) -> np.ndarray:
    """Rows by score, of equal ones the lower first."""
    scores_BI = (users_BD @ table_ID[1:].T).numpy()
    return np.argsort(-scores_BI, axis=1, kind="stable")[:, :k] + 1


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(st.data())
def test_the_best_come_in_order_and_ties_by_row(isa: str, data: st.DataObject):
    items = data.draw(st.one_of(st.integers(1, 130), st.integers(1000, 5000)))
    width = data.draw(st.integers(1, 70))
    users_BD = whole_numbers(data.draw(st.integers(0, 80)), width, data.draw(st.integers(0, 99)))
    table_ID = whole_numbers(items + 1, width, data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, min(items, 300)))
    index = ExactIndex(table_ID, data.draw(st.integers(1, 3)), isa)
    scores_BK, places_BK = index.search(users_BD, k)
    places = expected(users_BD, table_ID, k)
    np.testing.assert_array_equal(places_BK, places)
    all_scores = (users_BD @ table_ID.T).numpy()
    np.testing.assert_array_equal(scores_BK, np.take_along_axis(all_scores, places, axis=1))


@pytest.mark.parametrize("isa", ISAS)
def test_it_agrees_with_topk(isa: str):
    generator = torch.Generator().manual_seed(1)
    table_ID = torch.randn(20_000, 48, generator=generator)
    users_BD = torch.randn(33, 48, generator=generator)
    scores_BK, places_BK = ExactIndex(table_ID, 2, isa).search(users_BD, 100)
    scores, places = torch.topk(users_BD.double() @ table_ID[1:].double().T, 100)
    np.testing.assert_allclose(scores_BK, scores.numpy(), rtol=1e-5, atol=1e-5)
    assert (places_BK == places.numpy() + 1).mean() > 0.999


@pytest.mark.parametrize("isa", ISAS)
def test_mates_and_threads_change_no_bit(isa: str):
    generator = torch.Generator().manual_seed(2)
    table_ID = torch.randn(9_001, 33, generator=generator)
    users_BD = torch.randn(70, 33, generator=generator)
    scores_BK, places_BK = ExactIndex(table_ID, 1, isa).search(users_BD, 50)
    index = ExactIndex(table_ID, 3, isa)
    for of, rows in ((users_BD, slice(None)), (users_BD[7:20], slice(7, 20)), (users_BD[:1], [0])):
        scores, places = index.search(of, 50)
        np.testing.assert_array_equal(scores, scores_BK[rows])
        np.testing.assert_array_equal(places, places_BK[rows])


def test_row_zero_is_never_an_answer():
    table_ID = torch.ones(4, 2)
    table_ID[0] = 100
    _, places_BK = ExactIndex(table_ID).search(torch.ones(1, 2), 3)
    assert places_BK.tolist() == [[1, 2, 3]]


def test_scores_that_are_no_numbers_come_last():
    table_ID = torch.tensor([[0.0], [float("nan")], [-1.0], [2.0], [float("-inf")], [1.0]])
    for k in range(1, 6):
        scores_BK, places_BK = ExactIndex(table_ID).search(torch.ones(1, 1), k)
        assert places_BK[0].tolist() == [3, 5, 2, 1, 4][:k]
        assert not np.isnan(scores_BK).any()


def test_all_items_of_more_users_than_memory_for_them():
    """The users go through the table in several turns."""
    table_ID = torch.arange(0.0, 200_001.0)[:, None]
    users_BD = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
    _, places_BK = ExactIndex(table_ID, 2).search(users_BD, 200_000)
    for row, places in enumerate(places_BK):
        np.testing.assert_array_equal(places[:: -1 if row % 2 == 0 else 1], np.arange(1, 200_001))


def test_searches_at_the_same_time():
    table_ID = whole_numbers(3_000, 16, 3)
    index = ExactIndex(table_ID, 2)
    users = [whole_numbers(9, 16, seed) for seed in range(4)]
    wrong: list[int] = []

    def search(number: int) -> None:
        for _ in range(20):
            found = index.search(users[number], 10)[1]
            if not np.array_equal(found, expected(users[number], table_ID, 10)):
                wrong.append(number)

    threads = [threading.Thread(target=search, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_to_search():
    scores_BK, places_BK = ExactIndex(torch.zeros(1, 3)).search(torch.ones(2, 3), 0)
    assert scores_BK.shape == places_BK.shape == (2, 0)
    assert ExactIndex(torch.zeros(5, 3)).search(torch.ones(0, 3), 2)[1].shape == (0, 2)


@pytest.mark.parametrize(
    ("users", "k", "message"),
    [
        (torch.ones(2, 4), 1, r"users have the shape \(2, 4\); expected \(users, 3\)"),
        (torch.ones(3), 1, "users have the shape"),
        (torch.ones(2, 3), 5, "k is 5; expected 0 to 4"),
        (torch.ones(2, 3), -1, "k is -1"),
    ],
)
def test_what_does_not_fit_is_refused(users: torch.Tensor, k: int, message: str):
    with pytest.raises(ValueError, match=message):
        ExactIndex(torch.ones(5, 3)).search(users, k)


def test_tables_and_threads_that_cannot_be():
    with pytest.raises(ValueError, match="table is"):
        ExactIndex(torch.ones(5))
    with pytest.raises(ValueError, match="threads is 0"):
        ExactIndex(torch.ones(5, 2), 0)


@pytest.mark.skipif("avx512" in ISAS, reason="this processor has AVX-512")
def test_an_instruction_set_that_is_not_here():
    with pytest.raises(PlanError, match="avx512"):
        ExactIndex(torch.ones(5, 2), isa="avx512")
