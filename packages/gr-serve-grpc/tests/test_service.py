from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import serving_toy

from gr_core import Behaviour, Candidates, History, RecommendRequest, Task
from gr_core.errors import InvalidRequest, NotFound
from gr_serve_grpc.client import AsyncClient, CallError, Client

NOW = 1_700_000_000_000


async def test_retrieves_what_was_not_seen(client: AsyncClient):
    answer = await client.recommend(
        history=[Behaviour(1, NOW), Behaviour(3, NOW + 1, {"is_liked": 1.0}), Behaviour(999, NOW)],
        k=3,
        request_id="mine",
    )
    assert [item.item_id for item in answer.items] == [2, 4, 5]
    assert [item.score for item in answer.items] == [-2, -4, -5]
    assert answer.items[0].title == "Title of 2"
    assert answer.request_id == "mine"
    assert answer.unknown_items == 1
    (stage,) = answer.stages
    assert (stage.task, stage.model, stage.version, stage.engine, stage.batch_size) == (
        Task.RETRIEVE, "numbers", "1", "toy", 1,
    )  # fmt: skip
    assert stage.tokens == 3
    assert 0 < answer.total_s < 5


async def test_ranks_candidates_by_every_head(client: AsyncClient):
    answer = await client.recommend(candidates=[7, 1234, 9], head_weights={"down": 1.0})
    assert [item.item_id for item in answer.items] == [7, 9]
    assert answer.items[0].head_scores == {"up": 7, "down": -7}
    assert list(answer.unscored_item_ids) == [1234]
    assert answer.stages[0].tokens_reused == 1


async def test_generates(serve, tmp_path: Path):
    serving_toy.write_models(tmp_path, tasks=(Task.GENERATE, Task.RANK))
    async with serve(folder=tmp_path) as running, AsyncClient(running.address) as client:
        (numbers, _) = await client.list_models()
        assert numbers.stages == {Task.RANK: "numbers", Task.GENERATE: "numbers"}
        assert numbers.versions[0].engines == {Task.RANK: "toy", Task.GENERATE: "toy"}
        for task in (None, Task.GENERATE):
            answer = await client.recommend(history=[Behaviour(1, NOW)], k=3, task=task)
            assert [item.item_id for item in answer.items] == [2, 3, 4]
            assert [stage.task for stage in answer.stages] == [Task.GENERATE]


async def test_a_model_that_does_not_generate_says_so(client: AsyncClient):
    with pytest.raises(InvalidRequest, match="numbers has no model that generates"):
        await client.recommend(task=Task.GENERATE)


async def test_text_ids(client: AsyncClient):
    answer = await client.recommend(
        model="texts",
        history=[Behaviour("item-1", NOW)],
        exclude_item_ids=["item-2", "item-5"],
        k=3,
    )
    assert [item.item_id for item in answer.items] == ["item-3", "item-4", "item-6"]
    answer = await client.recommend(model="texts", candidates=["item-9", "unheard-of"])
    assert [item.item_id for item in answer.items] == ["item-9"]
    assert list(answer.unscored_item_ids) == ["unheard-of"]


async def test_the_synchronous_client_gets_the_same(serve):
    def ask(address: str):
        with Client(address) as client:
            client.wait_until_ready()
            streamed = list(
                client.recommend_stream(RecommendRequest(History(), k=k) for k in (1, 2, 3))
            )
            return (
                client.recommend(candidates=[3, 5], k=1),
                client.list_models(),
                client.get_model("texts"),
                client.drop_user("nobody"),
                sorted(len(a.result().items) for a in streamed),
            )

    async with serve() as running:
        answer, models, texts, dropped, sizes = await asyncio.to_thread(ask, running.address)
    assert [item.item_id for item in answer.items] == [5]
    assert [model.name for model in models] == ["numbers", "texts"]
    assert texts == models[1]
    assert dropped == 0
    assert sizes == [1, 2, 3]


async def test_models_are_described(client: AsyncClient):
    numbers, texts = await client.list_models()
    assert (numbers.name, numbers.default, texts.default) == ("numbers", True, False)
    assert numbers.stages == {Task.RETRIEVE: "numbers", Task.RANK: "numbers"}
    (version,) = numbers.versions
    assert (version.model, version.version, version.active) == ("numbers", "1", True)
    assert version.heads == ["up", "down"]
    assert version.catalogue_size == 50
    assert version.engines == {Task.RETRIEVE: "toy", Task.RANK: "toy"}
    assert "toy" in version.plan[Task.RANK]
    assert version.notes == ["a toy"]
    assert (await client.get_model()).name == "numbers"
    with pytest.raises(NotFound, match="'films' is not served; there are: numbers, texts"):
        await client.get_model("films")


async def test_an_unknown_model_is_not_found(client: AsyncClient):
    with pytest.raises(NotFound, match="films"):
        await client.recommend(model="films")
    with pytest.raises(NotFound, match="version: '7' of numbers"):
        await client.recommend(version="7")


async def test_dropping_nobody_is_invalid(client: AsyncClient):
    with pytest.raises(InvalidRequest, match="user_id"):
        await client.drop_user("")


async def test_ids_are_made_for_requests_without_one(client: AsyncClient):
    answers = await asyncio.gather(*(client.recommend() for _ in range(20)))
    assert len({answer.request_id for answer in answers}) == 20
    assert all(answer.request_id for answer in answers)


async def test_an_internal_error_keeps_its_text(client: AsyncClient, caplog):
    with pytest.raises(CallError, match="INTERNAL") as caught:
        await client.recommend(user_id="poison", request_id="r-17")
    assert "secret" not in str(caught.value)
    assert "r-17" in str(caught.value)
    assert caught.value.request_id == "r-17"
    (record,) = [r for r in caplog.records if r.name == "gr_serve_grpc.calls"]
    assert record.request_id == "r-17"
    assert "secret" in str(record.exc_info[1])
    assert "poison" not in record.getMessage()
    assert (await client.recommend()).items


async def test_columns_and_signals_arrive_as_they_were_sent(client: AsyncClient):
    n = 513
    history = History(
        np.arange(n) % 60 + 1,
        np.arange(n, dtype=np.int64) + NOW,
        {"watch_percentage": np.where(np.arange(n) % 3, 0.5, np.nan).astype(np.float32)},
    )
    answer = await client.recommend(history=history, candidates=Candidates(np.array([4, 2])))
    assert answer.stages[0].tokens == n
    assert answer.unknown_items == np.count_nonzero(history.item_ids > 50)
