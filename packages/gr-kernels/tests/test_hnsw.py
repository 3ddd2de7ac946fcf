"""The approximate index against exact search."""

from __future__ import annotations

import sys

import pytest
import torch

from gr_core.errors import PlanError
from gr_kernels.retrieval import make_index


def clustered(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(20, (rows,), generator=generator)
    return centres[chosen] + torch.randn(rows, 16, generator=generator)


def test_it_finds_nearly_all_of_the_best_in_order():
    pytest.importorskip("faiss", reason="faiss is not installed")
    table, users = clustered(2001, 1), clustered(50, 2)
    exact = make_index(table, "exact", 1).search(users, 10)
    scores, places = make_index(table, "hnsw", 1).search(users, 10)
    same = [len(set(a) & set(b)) for a, b in zip(places, exact[1], strict=True)]
    assert sum(same) >= 0.95 * 500
    assert places.min() >= 1
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    right = (users[:, None] * table[torch.from_numpy(places)]).sum(-1)
    torch.testing.assert_close(torch.from_numpy(scores), right)


def test_it_always_gives_as_many_as_asked():
    pytest.importorskip("faiss", reason="faiss is not installed")
    table, users = clustered(301, 1), clustered(3, 2)
    _, places = make_index(table, "hnsw", 1).search(users, 300)
    assert [sorted(row) for row in places.tolist()] == [list(range(1, 301))] * 3


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PlanError, match=r"pip install gr-kernels\[faiss\], or set it to 'exact'"):
        make_index(clustered(10, 0), "hnsw", 1)
