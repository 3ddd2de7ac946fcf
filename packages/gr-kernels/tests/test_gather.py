"""The op `embedding_gather`: its reference, and Triton's numbers and compilation.

See `.triton_kernels` for where the latter run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_core.tokens import TokenTables
from gr_kernels.ops.embedding_gather import Combine
from gr_kernels.ops.embedding_gather.reference import TorchEmbeddingGather
from gr_kernels.ops.embedding_gather.triton import (
    TritonEmbeddingGather,
    configurations,
)

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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return device_for(request.param, monkeypatch)


def random_tables(
    rows: list[int], widths: list[int], dtype: torch.dtype = torch.float32, apart: int = 0
) -> list[torch.Tensor]:
    """Tables whose rows are so much further apart than they are wide, NaN between them."""
    tables = []
    for seed, (count, width) in enumerate(zip(rows, widths, strict=True)):
        table = torch.full((count, width + apart), float("nan"))
        generator = torch.Generator().manual_seed(seed)
        table[:, :width] = torch.randn(count, width, generator=generator)
        tables.append(table.to(dtype)[:, :width])
    return tables


def random_ids(tokens: int, rows: list[int], seed: int = 0) -> torch.Tensor:
    """Every one within its table but for some, which lie at and beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(-1, count + 1, (tokens,), generator=generator) for count in rows]
    ids = torch.stack(columns, dim=1)
    if tokens:
        ids[-1, 0] = 2**40
        ids[0, -1] = -(2**40)
    return ids


def by_hand(
    tables: list[torch.Tensor],
    ids: torch.Tensor,
    places: torch.Tensor | None = None,
    places_T: torch.Tensor | None = None,
    combine: Combine = "sum",
) -> torch.Tensor:
    """Token after token."""
    if not len(ids):
        widths = [table.shape[1] for table in tables]
        return torch.zeros(0, widths[0] if combine == "sum" else sum(widths))
    answers = []
    for t, row in enumerate(ids.tolist()):
        parts = [
            table[i] if 0 <= i < len(table) else table.new_zeros(table.shape[1])
            for table, i in zip(tables, row, strict=True)
        ]
        if places is not None and places_T is not None and 0 <= places_T[t] < len(places):
            parts.append(places[places_T[t]])
        if combine == "concat":
            answers.append(torch.cat(parts))
        else:
            answers.append(sum((part.float() for part in parts), torch.zeros(tables[0].shape[1])))
    return torch.stack(answers)


def poisoned(tokens: int, width: int, dtype: torch.dtype, apart: int) -> torch.Tensor:
    return torch.full((tokens, width + apart), float("nan"), dtype=dtype)[:, :width]


class TestReference:
    def test_rows_are_summed_with_their_places(self):
        tables = (torch.eye(3), 10 * torch.eye(3))
        made = TokenTables(tables, torch.full((2, 3), 0.5))
        gather = TorchEmbeddingGather(made.tables, made.places)
        ids = torch.tensor([[0, 0], [1, 2], [2, 3], [-1, 1]], dtype=torch.int32)
        assert gather.width == 3
        assert gather(ids, torch.tensor([0, 1, 0, 2])).tolist() == [
            [11.5, 0.5, 0.5],
            [0.5, 1.5, 10.5],
            [0.5, 0.5, 1.5],
            [0, 10, 0],
        ]

    def test_rows_side_by_side(self):
        tables = [torch.tensor([[1, 2.0]]), torch.tensor([[3.0], [4.0]])]
        gather = TorchEmbeddingGather([table.bfloat16() for table in tables], combine="concat")
        found = gather(torch.tensor([[0, 1], [1, 0]]))
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [[1, 2, 4], [0, 0, 3]]

    def test_parameters_are_tables(self):
        table = torch.nn.Parameter(torch.ones(2, 3))
        for combine in ("sum", "concat"):
            gather = TorchEmbeddingGather([table], combine=combine)
            assert gather(torch.tensor([[1]])).tolist() == [[1, 1, 1]]

    @pytest.mark.parametrize("combine", ["sum", "concat"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_what_is_done_by_hand(self, dtype: torch.dtype, combine: Combine):
        rows, widths = [7, 1, 0, 30], [9, 9, 9, 9]
        tables = random_tables(rows, widths, dtype, apart=3)
        ids = random_ids(23, rows)
        right = by_hand(tables, ids, combine=combine)
        out = poisoned(23, right.shape[1], right.dtype, 2)
        assert TorchEmbeddingGather(tables, combine=combine)(ids, out_TD=out) is out
        assert torch.equal(out, right)


MAKERS = [
    TorchEmbeddingGather,
    pytest.param(TritonEmbeddingGather, marks=needs_triton, id="TritonEmbeddingGather"),
]
TABLE = torch.zeros(3, 4)
PLACES = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("tables", "keywords", "message"),
    [
        ([], {}, "tables are none"),
        ([TABLE], {"combine": "mean"}, "combine is 'mean'; expected 'sum' or 'concat'"),
        ([TABLE], {"combine": "concat", "places": TABLE}, "expected places to be None"),
        ([TABLE[0]], {}, r"table 0 is \(4,\); expected \(rows, width\)"),
        ([TABLE.double()], {}, "table 0 is torch.float64; expected float32, bfloat16 or float16"),
        ([TABLE, TABLE.half()], {}, "table 1 is torch.float16 on cpu; expected torch.float32"),
        ([TABLE, TABLE[:, :2]], {}, "table 1 is 2 wide; expected 4"),
        ([TABLE], {"places": TABLE[:, :2]}, "places is 2 wide; expected 4"),
        ([torch.zeros(3, 8)[:, ::2]], {}, "table 0 has columns that are 2 apart; expected 1"),
    ],
)
def test_tables_that_do_not_fit(
    make: Callable[..., Any], tables: list[torch.Tensor], keywords: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        make(tables, **keywords)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("has_places", "ids", "keywords", "message"),
    [
        (False, torch.zeros(1, 3).int(), {}, r"ids are \(1, 3\); expected \(tokens, 2\)"),
        (False, torch.zeros(1, 2), {}, "ids are torch.float32; expected int32 or int64"),
        (True, torch.zeros(1, 2).int(), {}, "places are None"),
        (False, torch.zeros(1, 2).int(), {"places_T": PLACES}, "expected None"),
        (True, torch.zeros(2, 2).int(), {"places_T": PLACES}, r"\(1,\); expected \(2,\)"),
        (False, torch.zeros(1, 2).int(), {"out_TD": torch.zeros(1, 3)}, r"expected .* \(1, 4\)"),
        (False, torch.zeros(1, 2).int(), {"out_TD": TABLE[:1].half()}, "expected torch.float32"),
        (False, torch.zeros(1, 2).int(), {"out_TD": torch.zeros(1, 8)[:, ::2]}, "2 apart"),
        (False, torch.zeros(1, 2, device="meta").int(), {}, "ids is on meta; expected cpu"),
    ],
)
def test_calls_that_do_not_fit(
    make: Callable[..., Any],
    has_places: bool,
    ids: torch.Tensor,
    keywords: dict[str, Any],
    message: str,
):
    gather = make([TABLE, TABLE], TABLE if has_places else None)
    with pytest.raises(ValueError, match=message):
        gather(ids, **keywords)


@needs_triton
class TestTriton:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "width", "apart"),
        [(1, 1, 0), (5, 8, 8), (37, 50, 0), (9, 1000, 3), (3, 8192, 0), (64, 64, 0)],
    )
    def test_sums(self, device: str, tokens: int, width: int, apart: int, dtype: torch.dtype):
        """To the last bit: the rows are added in one order."""
        rows = [50, 1, 7]
        tables = [t.to(device) for t in random_tables(rows, [width] * 3, dtype, apart)]
        ids = random_ids(tokens, rows).to(device)
        out = poisoned(tokens, width, torch.float32, apart).to(device)
        found = TritonEmbeddingGather(tables)(ids, out_TD=out)
        assert found is out
        assert torch.equal(found, TorchEmbeddingGather(tables)(ids))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("widths", [[1], [8, 64, 520], [3, 70, 1]])
    def test_side_by_side(self, device: str, widths: list[int], dtype: torch.dtype):
        rows = [50, 1, 7][: len(widths)]
        tables = [t.to(device) for t in random_tables(rows, widths, dtype)]
        ids = random_ids(21, rows).to(device)
        out = poisoned(21, sum(widths), dtype, 0).to(device)
        TritonEmbeddingGather(tables, combine="concat")(ids, out_TD=out)
        assert torch.equal(out, TorchEmbeddingGather(tables, combine="concat")(ids))

    @settings(
        max_examples=30,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_number_of_tables(self, device: str, data: st.DataObject):
        rows = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=20))
        width = data.draw(st.sampled_from([1, 3, 16, 40]))
        tokens = data.draw(st.integers(0, 40))
        tables = random_tables(rows, [width] * len(rows))
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        ids = random_ids(tokens, rows, data.draw(st.integers(0, 9)))
        if dtype == torch.int32:
            ids = ids.clamp(-(2**31), 2**31 - 1).int()
        if data.draw(st.booleans()):
            ids = ids.T.contiguous().T
        places = places_T = None
        if data.draw(st.booleans()):
            places = random_tables([9], [width])[0]
            places_T = torch.arange(-1, 2 * tokens - 1, dtype=dtype)[::2]
        on_device = (None if x is None else x.to(device) for x in (places, ids, places_T))
        found = TritonEmbeddingGather([t.to(device) for t in tables], next(on_device))(*on_device)
        right = by_hand(tables, ids, places, places_T)
        assert torch.equal(found.cpu(), right)

    def test_a_table_that_changes(self, device: str):
        table = torch.zeros(4, 16, device=device)
        gather = TritonEmbeddingGather([table])
        table += 1
        assert gather(torch.tensor([[2]], device=device)).tolist() == [[1.0] * 16]

    @pytest.mark.slow
    @not_interpreted
    @pytest.mark.timeout(600)
    def test_on_the_interpreter(self):
        run_on_the_interpreter(__file__)

    @not_interpreted
    @pytest.mark.parametrize("capability", SHARED_BYTES)
    @pytest.mark.parametrize(
        ("dtype", "width", "tables", "combine", "loads"),
        [
            (torch.float32, 512, 3, "sum", ".v4"),
            (torch.bfloat16, 64, 2, "concat", ".v4"),
            pytest.param(torch.float32, 50, 11, "sum", ".v2", marks=pytest.mark.slow),
            pytest.param(torch.float16, 8192, 40, "sum", ".v4", marks=pytest.mark.slow),
        ],
    )
    def test_it_compiles(
        self,
        capability: int,
        dtype: torch.dtype,
        width: int,
        tables: int,
        combine: Combine,
        loads: str,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """With loads as wide as the tables allow, which 16 bytes are."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        all_tables = [torch.zeros(9, width, dtype=dtype) for _ in range(tables)]
        places = all_tables[0] if combine == "sum" else None
        gather = TritonEmbeddingGather(all_tables, places, combine=combine)
        recorded = gather._kernels = Recorded(gather._kernels)  # type: ignore[assignment]
        ids = torch.zeros(100, tables, dtype=torch.int32)
        gather(ids, ids[:, 0] if combine == "sum" else None)
        (launches,) = recorded.launches.values()
        assert len(launches.given) == 1
        assert f"ld.global{loads}" in launches.compile(capability).asm["ptx"]


@pytest.mark.parametrize("tokens", [1, 8, 4096])
@pytest.mark.parametrize("width", [1, 50, 512, 8192])
def test_launches_to_try(tokens: int, width: int):
    launches = configurations("float32", {"tokens": tokens, "width": width})
    for launch in launches:
        assert launch["M"] * launch["C"] <= 4096
        assert launch["M"] & (launch["M"] - 1) == launch["C"] & (launch["C"] - 1) == 0
