"""The op `item_topk` and the indexes on it: the reference, and Triton's numbers and compilation.

See `.triton_kernels` for where the latter run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_core.errors import PlanError
from gr_core.testing.kernels import FLOOR, SLACK
from gr_kernels.ops.item_topk import reference
from gr_kernels.ops.item_topk import triton as in_triton
from gr_kernels.retrieval import ItemIndex, make_index
from gr_kernels.retrieval.blocked import BlockedIndex
from gr_kernels.retrieval.cuda import CudaIndex

from .triton_kernels import (
    DEVICES,
    SHARED_BYTES,
    Recorded,
    device_for,
    needs_triton,
    not_interpreted,
    run_on_the_interpreter,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is never written to is large: a key that wins."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*of: Any, **keywords: Any) -> torch.Tensor:
        made: torch.Tensor = new_empty(*of, **keywords)
        return made.fill_(torch.iinfo(made.dtype).max) if made.dtype == torch.int64 else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return device_for(request.param, monkeypatch)


def whole_numbers(
    rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32, apart: int = 0
) -> torch.Tensor:
    """Small ones, of which sums are exact and often equal. Between and behind rows there is NaN."""
    generator = torch.Generator().manual_seed(seed)
    everything = torch.full((rows + 1, width + apart), NAN, dtype=dtype)
    everything[:rows, :width] = torch.randint(-3, 4, (rows, width), generator=generator).to(dtype)
    return everything[:rows, :width]


def expected(
    users_BD: torch.Tensor, table_ID: torch.Tensor, k: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All scores, sorted: of equal ones the lower row first, NaN as -inf."""
    scores_BI = (users_BD.double() @ table_ID[1:].double().T).cpu().numpy()
    scores_BI[np.isnan(scores_BI)] = -np.inf
    places_BK = np.argsort(-scores_BI, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_BI, places_BK, axis=1), places_BK + 1


def assert_best(
    found: tuple[torch.Tensor, torch.Tensor],
    users_BD: torch.Tensor,
    table_ID: torch.Tensor,
    k: int,
) -> None:
    scores, rows = expected(users_BD, table_ID, k)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    np.testing.assert_array_equal(found[1].cpu().numpy(), rows)
    np.testing.assert_array_equal(found[0].cpu().numpy(), scores)


SPECIAL = torch.tensor([[9.0], [0.0], [NAN], [-1.0], [-0.0], [2.0], [-INF], [1.0], [INF], [NAN]])


class TestReference:
    @settings(max_examples=50)
    @given(st.data())
    def test_the_best_come_in_order_and_ties_by_row(self, data: st.DataObject):
        items, width = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 40))
        users_BD = whole_numbers(data.draw(st.integers(0, 20)), width, 1)
        table_ID = whole_numbers(items + 1, width, data.draw(st.integers(0, 99)))
        k = data.draw(st.integers(0, items))
        with pytest.MonkeyPatch.context() as patch:  # several blocks
            patch.setattr(reference, "_SCORES_IN_FLIGHT", data.draw(st.integers(1, 2000)))
            found = reference.item_topk(users_BD, table_ID, k)
        assert_best(found, users_BD, table_ID, k)

    @pytest.mark.parametrize("user", [1.0, -1.0])
    def test_scores_that_are_no_numbers(self, user: float):
        users_BD = torch.tensor([[user]])
        for k in range(10):
            found = reference.item_topk(users_BD, SPECIAL, k)
            assert_best(found, users_BD, SPECIAL, k)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sums_are_in_float32(self, dtype: torch.dtype):
        users_BD, table_ID = torch.ones(1, 5000, dtype=dtype), torch.ones(2, 5000, dtype=dtype)
        table_ID[1, 1] = 2
        assert reference.item_topk(users_BD, table_ID, 1)[0].item() == 5001


@pytest.mark.parametrize(
    "topk", [reference.item_topk, pytest.param(in_triton.item_topk, marks=needs_triton)]
)
@pytest.mark.parametrize(
    ("users", "table", "k", "message"),
    [
        (torch.ones(2, 4), torch.ones(5, 3), 1, r"shape \(2, 4\); expected \(users, 3\)"),
        (torch.ones(3), torch.ones(5, 3), 1, "users have the shape"),
        (torch.ones(2, 3), torch.ones(5, 3), 5, "k is 5; expected 0 to 4"),
        (torch.ones(2, 3), torch.ones(5, 3), -1, "k is -1"),
        (torch.ones(2, 3), torch.ones(5), 1, "table is"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, r"table is \(0, 3\)"),
        (torch.ones(2, 3).double(), torch.ones(5, 3).double(), 1, "table is torch.float64"),
        (torch.ones(2, 3).half(), torch.ones(5, 3), 1, "users are torch.float16 on cpu; expected"),
        (torch.ones(2, 3), torch.ones(5, 6)[:, ::2], 1, "table has columns that are 2 apart"),
        (torch.ones(2, 6)[:, ::2], torch.ones(5, 3), 1, "users has columns that are 2 apart"),
    ],
)
def test_what_does_not_fit_is_refused(
    topk: Any, users: torch.Tensor, table: torch.Tensor, k: int, message: str
):
    with pytest.raises(ValueError, match=message):
        topk(users, table, k)


@needs_triton
class TestTriton:
    @pytest.mark.parametrize("group", [None, 32, 128])
    @pytest.mark.parametrize(
        ("users", "items", "width", "k"),
        [(1, 1, 1, 1), (1, 33, 7, 33), (37, 1001, 20, 1), (3, 257, 130, 10), (0, 5, 3, 2)],
    )
    def test_the_best_come_in_order_and_ties_by_row(
        self,
        device: str,
        users: int,
        items: int,
        width: int,
        k: int,
        group: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ):
        if group is not None:
            monkeypatch.setattr(in_triton, "group_of", lambda *sizes: group)
        for dtype in DTYPES:
            users_BD = whole_numbers(users, width, 1, dtype, apart=3).to(device)
            table_ID = whole_numbers(items + 1, width, 2, dtype, apart=3).to(device)
            found = in_triton.item_topk(users_BD, table_ID, k)
            assert_best(found, users_BD, table_ID, k)

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_sizes(self, device: str, data: st.DataObject):
        items, width = data.draw(st.integers(1, 400)), data.draw(st.sampled_from([1, 16, 33, 70]))
        users_BD = whole_numbers(data.draw(st.integers(1, 20)), width, 1).to(device)
        table_ID = whole_numbers(items + 1, width, data.draw(st.integers(0, 99))).to(device)
        k = data.draw(st.integers(0, min(items, 12)))
        group = data.draw(st.sampled_from([1, 32, 64, 128]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_triton, "group_of", lambda *sizes: group)
            patch.setattr(in_triton, "_KEY_BYTES", data.draw(st.sampled_from([1, 2**13, 2**20])))
            found = in_triton.item_topk(users_BD, table_ID, k)
        assert_best(found, users_BD, table_ID, k)

    @pytest.mark.parametrize("group", [1, 32])
    @pytest.mark.parametrize("user", [1.0, -1.0])
    def test_scores_that_are_no_numbers(
        self, device: str, user: float, group: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(in_triton, "group_of", lambda *sizes: group)
        users_BD = torch.tensor([[user]], device=device)
        table_ID = torch.cat([SPECIAL, SPECIAL[1:].repeat(6, 1)]).to(device)
        for k in (1, 2, 9, 20, 63):
            found = in_triton.item_topk(users_BD, table_ID, k)
            assert_best(found, users_BD, table_ID, k)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scores_are_as_good_as_float32(self, device: str, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(3)
        users_BD = torch.randn(19, 100, generator=generator).to(device, dtype)
        table_ID = torch.randn(1001, 100, generator=generator).to(device, dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_triton, "group_of", lambda *sizes: 64)
            scores_BK, rows_BK = in_triton.item_topk(users_BD, table_ID, 7)
        right_BI = users_BD.double() @ table_ID.double().T
        plain_BI = users_BD.float() @ table_ID.float().T
        allowed = SLACK * (plain_BI - right_BI).norm() / right_BI.norm() + FLOOR
        right_BK = right_BI.gather(1, rows_BK)
        assert (scores_BK - right_BK).norm() <= allowed * right_BK.norm()
        best_BK = right_BI[:, 1:].topk(7).values
        assert (right_BK - best_BK).norm() <= allowed * best_BK.norm()

    def test_more_items_than_are_chosen_from_at_once(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ):
        """Groups come about by themselves."""
        monkeypatch.setattr(in_triton, "_ALL_KEYS", 2000)
        users_BD = whole_numbers(3, 9, 1).to(device)
        table_ID = whole_numbers(1500, 9, 2).to(device)
        assert in_triton.group_of(3, 1499, 2) == 32
        assert_best(in_triton.item_topk(users_BD, table_ID, 2), users_BD, table_ID, 2)

    @pytest.mark.slow
    @not_interpreted
    @pytest.mark.timeout(600)
    def test_on_the_interpreter(self):
        run_on_the_interpreter(__file__)

    @not_interpreted
    @pytest.mark.parametrize("capability", SHARED_BYTES)
    @pytest.mark.parametrize(
        ("users", "width", "group", "dtype"),
        [
            (16, 64, 128, torch.float32),
            (300, 50, 1, torch.bfloat16),
            pytest.param(300, 512, 128, torch.float32, marks=pytest.mark.slow),
            pytest.param(1, 100, 32, torch.float32, marks=pytest.mark.slow),
            pytest.param(300, 512, 128, torch.float16, marks=pytest.mark.slow),
        ],
    )
    def test_it_compiles(
        self,
        capability: int,
        users: int,
        width: int,
        group: int,
        dtype: torch.dtype,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """On the tensor cores, and never in plain TF32."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        recorded = record(users, width, group, dtype)
        assert set(recorded.launches) == ({"scan"} if group == 1 else {"scan", "score_groups"})
        texts = {n: launch.compile(capability).asm for n, launch in recorded.launches.items()}
        assert any(name in texts["scan"]["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma"))
        assert "inputPrecision = tf32x3" in texts["scan"]["ttir"]

    @not_interpreted
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("users", "dtype"), [(16, torch.float32), (300, torch.float32), (300, torch.bfloat16)]
    )
    def test_all_launches_to_try_fit(
        self,
        users: int,
        dtype: torch.dtype,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        sizes = {"group": 128, "users": min(users, 256), "width": 512}
        launches = in_triton.configurations(str(dtype).removeprefix("torch."), sizes)
        assert len(launches) >= 4
        for launch in launches:
            monkeypatch.setattr(in_triton, "configuration", lambda *of, launch=launch: launch)
            record(users, 512, 128, dtype).launches["scan"].compile(80)


def record(users: int, width: int, group: int, dtype: torch.dtype) -> Recorded:
    from gr_kernels.ops.item_topk import triton_kernels

    recorded = Recorded(triton_kernels)
    users_BD, table_ID = (torch.zeros(n, width, dtype=dtype) for n in (users, 1001))
    in_triton.best_keys(recorded, users_BD, table_ID, 10, group)
    return recorded


@given(st.integers(1, 2000), st.integers(1, 2**31 - 2), st.integers(1, 2000))
def test_few_keys_are_chosen_from(users: int, items: int, k: int):
    """Twice the least number that groups of those sizes can have, unless it is few anyway."""
    group = in_triton.group_of(users, items, k)
    keys = items if group == 1 else -(-items // group) + k * group
    least = min(items // size + k * size for size in (32, 64, 128))
    assert keys <= 2 * least + 1 or users * keys <= 2**20


@pytest.fixture(params=[BlockedIndex, CudaIndex, pytest.param("triton", marks=needs_triton)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An index on the CPU; with Triton, on its interpreter."""
    if request.param is BlockedIndex:
        return BlockedIndex
    if request.param is CudaIndex:
        return lambda table: CudaIndex(table, "cpu", topk=reference.item_topk)
    device_for("cpu", monkeypatch)
    return lambda table: CudaIndex(table, "cpu", topk=in_triton.item_topk)


class TestIndexes:
    def test_they_find_the_best(self, make: Any):
        table_ID, users_BD = whole_numbers(300, 9, 1, apart=2), whole_numbers(5, 9, 2, apart=1)
        index: ItemIndex = make(table_ID)
        scores_BK, rows_BK = index.search(users_BD, 20)
        assert isinstance(scores_BK, np.ndarray)
        assert isinstance(rows_BK, np.ndarray)
        assert_best(
            (torch.from_numpy(scores_BK), torch.from_numpy(rows_BK)), users_BD, table_ID, 20
        )

    def test_row_zero_is_never_an_answer(self, make: Any):
        table_ID = torch.ones(4, 2)
        table_ID[0] = 100
        assert make(table_ID).search(torch.ones(1, 2), 3)[1].tolist() == [[1, 2, 3]]

    def test_nothing_to_search(self, make: Any):
        scores_BK, rows_BK = make(torch.zeros(1, 3)).search(torch.ones(2, 3), 0)
        assert scores_BK.shape == rows_BK.shape == (2, 0)
        assert make(torch.zeros(5, 3)).search(torch.ones(0, 3), 2)[1].shape == (0, 2)

    def test_users_of_other_dtypes(self, make: Any):
        users_BD = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
        rows_BK = make(torch.tensor([[0.0], [1.0], [2.0]])).search(users_BD, 1)[1]
        assert rows_BK.tolist() == [[2], [1]]

    @pytest.mark.parametrize(
        ("users", "k", "message"),
        [
            (torch.ones(2, 4), 1, r"users have the shape \(2, 4\); expected \(users, 3\)"),
            (torch.ones(3), 1, "users have the shape"),
            (torch.ones(2, 3), 5, "k is 5; expected 0 to 4"),
            (torch.ones(2, 3), -1, "k is -1"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, make: Any, users: torch.Tensor, k: int, message: str
    ):
        with pytest.raises(ValueError, match=message):
            make(torch.ones(5, 3)).search(users, k)

    def test_tables_that_cannot_be(self, make: Any):
        with pytest.raises(ValueError, match="table is"):
            make(torch.ones(5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_index_in_half_precision(dtype: str):
    """Users and items are rounded, and their scores are not."""
    index = CudaIndex(torch.full((3, 3), 1.001), "cpu", dtype, topk=reference.item_topk)
    scores_BK, rows_BK = index.search(torch.full((1, 3), 1.0), 2)
    rounded = torch.tensor(1.001).to(getattr(torch, dtype)).item()
    assert scores_BK[0].tolist() == pytest.approx([3 * rounded] * 2, rel=1e-7)
    assert rows_BK.tolist() == [[1, 2]]


def test_a_dtype_that_an_index_has_not():
    with pytest.raises(ValueError, match="dtype is 'float64'; expected one of float32"):
        CudaIndex(torch.ones(3, 3), "cpu", "float64", topk=reference.item_topk)


def test_the_approximate_index_is_for_the_cpu():
    with pytest.raises(PlanError, match="which is for the CPU; on cuda:0 set it to 'exact'"):
        make_index(torch.ones(3, 3), "hnsw", 1, device="cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("items", [1_000, 300_000])
def test_the_index_of_a_gpu(items: int):
    """As `make_index` chooses it, with users on the host and on the device, and in a CUDA graph."""
    table_ID, users_BD = whole_numbers(items + 1, 24, 1), whole_numbers(50, 24, 2)
    index = make_index(table_ID, "exact", 1, device="cuda")
    assert isinstance(index, CudaIndex)
    for users in (users_BD, users_BD.cuda()):
        scores_BK, rows_BK = index.search(users, 100)
        found = torch.from_numpy(scores_BK), torch.from_numpy(rows_BK)
        assert_best(found, users_BD, table_ID, 100)
    on_device = users_BD.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = index.best(on_device, 100)
    on_device.neg_()
    graph.replay()
    assert_best(answer, -users_BD, table_ID, 100)
