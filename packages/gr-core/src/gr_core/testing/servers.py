"""What every server must do, with a real pipeline over a tiny model behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest

from gr_core.batcher import BatchingOptions
from gr_core.contracts import Server
from gr_core.deployment import Environment, ModelSpec
from gr_core.errors import ConfigurationError
from gr_core.pipeline import Pipeline
from gr_core.plugins.registry import Registry
from gr_core.repository import ModelRepository
from gr_core.testing.suite import Suite
from gr_core.testing.tiny import tiny_registry, write_tiny_bundle
from gr_core.types import Candidates, History, ItemId, RecommendRequest

_PATIENCE_S = 30.0


class Client(Protocol):
    """How the suite talks to a server."""

    async def recommend(self, address: str, request: RecommendRequest) -> Sequence[ItemId]:
        """The recommended items, best first; raises any exception for an answer that is none."""
        ...


@dataclass(frozen=True, slots=True)
class _Serving:
    address: str
    pipeline: Pipeline
    stop: asyncio.Event
    done: asyncio.Task[None]


class ServerSuite(Suite):
    """Subclass it with ``protocol`` and a fixture ``client``, see `Client`."""

    protocol: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {"port": 0}
    """Settings with which it binds to any free port of the loopback interface."""

    @pytest.fixture
    def client(self) -> Client:
        raise NotImplementedError("give a fixture `client`: see gr_core.testing.Client")

    def _run(self, registry: Registry, case: Coroutine[Any, Any, None]) -> None:
        factory = registry.servers[self.protocol].resolve()
        with asyncio.Runner(loop_factory=getattr(factory, "loop_factory", None)) as runner:
            runner.run(_within(case))

    @asynccontextmanager
    async def _serving(
        self, registry: Registry, folder: Path, delay_s: float = 0.0
    ) -> AsyncIterator[_Serving]:
        write_tiny_bundle(folder)
        pipeline = Pipeline(
            ModelRepository(folder),
            [ModelSpec("tiny", options={"delay_s": delay_s})],
            [],
            Environment(tiny_registry(), BatchingOptions(max_batch_size=4)),
            poll_seconds=0,
        )
        await pipeline.start()
        server: Server = registry.servers[self.protocol].resolve()(pipeline, self.settings, [])
        stop, bound = asyncio.Event(), asyncio.get_running_loop().create_future()
        done = asyncio.create_task(server.serve(stop, bound.set_result))
        try:
            await asyncio.wait({done, bound}, return_when=asyncio.FIRST_COMPLETED)
            if not bound.done():
                await done
            (address,) = bound.result()
            yield _Serving(address, pipeline, stop, done)
            stop.set()
            await done
        finally:
            done.cancel()
            await asyncio.gather(done, return_exceptions=True)
            await pipeline.close()

    def test_it_answers_what_the_pipeline_answers(
        self, registry: Registry, client: Client, tmp_path: Path
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                for request in (
                    _request([1001, 1002], k=5),
                    _request([], k=3),
                    _request([1003, 1004, 9], candidates=[1010, 1011, 1012]),
                ):
                    answer = await serving.pipeline.recommend(request)
                    right = [item.item_id for item in answer.items]
                    assert list(await client.recommend(serving.address, request)) == right

        self._run(registry, case())

    def test_a_history_handle_stands_for_its_history(
        self, registry: Registry, client: Client, tmp_path: Path
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                whole = _request([1001, 1002, 1003, 1004], k=5, user_id="ada")
                old, new = (
                    History(whole.history.item_ids[rows], whole.history.timestamps_ms[rows])
                    for rows in (slice(2), slice(2, None))
                )
                first = await serving.pipeline.recommend(replace(whole, history=old))
                assert first.history_handle
                short = replace(whole, history=new, history_handle=first.history_handle)
                right = await serving.pipeline.recommend(whole)
                answer = await client.recommend(serving.address, short)
                assert list(answer) == [item.item_id for item in right.items]
                for unknown in (
                    replace(short, user_id="bob"),
                    replace(short, history_handle=first.history_handle[::-1]),
                ):
                    with pytest.raises(Exception, match="history_handle"):
                        await client.recommend(serving.address, unknown)

        self._run(registry, case())

    def test_it_answers_many_at_once(
        self, registry: Registry, client: Client, tmp_path: Path
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                requests = [_request([1000 + i, 1001 + i], k=3) for i in range(40)]
                answers = await asyncio.gather(
                    *(client.recommend(serving.address, request) for request in requests)
                )
                for request, items in zip(requests, answers, strict=True):
                    right = await serving.pipeline.recommend(request)
                    assert list(items) == [item.item_id for item in right.items]

        self._run(registry, case())

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"k": 0}, r"\bk\b"),
            ({"k": 10**9}, r"\bk\b"),
            ({"model": "no-such-model"}, "no-such-model"),
            ({"candidates": [1001, 1001]}, "candidates"),
        ],
    )
    def test_a_wrong_request_is_refused_by_name_and_the_server_lives(
        self,
        registry: Registry,
        client: Client,
        tmp_path: Path,
        fields: dict[str, Any],
        named: str,
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                with pytest.raises(Exception, match=named):
                    await client.recommend(serving.address, _request([1001], **fields))
                assert await client.recommend(serving.address, _request([1001]))

        self._run(registry, case())

    def test_it_survives_clients_that_vanish_and_bytes_that_mean_nothing(
        self, registry: Registry, client: Client, tmp_path: Path
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path, delay_s=0.05) as serving:
                host, _, port = serving.address.rpartition(":")
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.write(np.random.default_rng(0).bytes(4096))
                await writer.drain()
                writer.close()
                gone = [
                    asyncio.ensure_future(client.recommend(serving.address, _request([1001])))
                    for _ in range(8)
                ]
                await asyncio.sleep(0.02)
                for task in gone:
                    task.cancel()
                await asyncio.gather(*gone, return_exceptions=True)
                assert await client.recommend(serving.address, _request([1001]))

        self._run(registry, case())

    def test_stopping_finishes_what_was_accepted(
        self, registry: Registry, client: Client, tmp_path: Path
    ) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path, delay_s=0.2) as serving:
                await client.recommend(serving.address, _request([1001]))
                accepted = [
                    asyncio.ensure_future(client.recommend(serving.address, _request([1001 + i])))
                    for i in range(8)
                ]
                while not sum(serving.pipeline.queue_depths().values()):
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                serving.stop.set()
                for answer in await asyncio.gather(*accepted):
                    assert answer
                await serving.done
                with pytest.raises(Exception, match=r".+"):
                    await client.recommend(serving.address, _request([1001]))

        self._run(registry, case())

    def test_it_stops_at_once_when_idle(self, registry: Registry, tmp_path: Path) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                started = time.monotonic()
                serving.stop.set()
                await serving.done
                assert time.monotonic() - started < 5

        self._run(registry, case())

    def test_the_port_is_free_afterwards(self, registry: Registry, tmp_path: Path) -> None:
        async def case() -> None:
            async with self._serving(registry, tmp_path) as serving:
                host, _, port = serving.address.rpartition(":")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(host.strip("[]"), int(port))

        self._run(registry, case())

    def test_unknown_settings_are_refused(self, registry: Registry, tmp_path: Path) -> None:
        factory: Callable[..., Server] = registry.servers[self.protocol].resolve()
        write_tiny_bundle(tmp_path)
        environment = Environment(tiny_registry())
        pipeline = Pipeline(ModelRepository(tmp_path), [ModelSpec("tiny")], [], environment)
        with pytest.raises(ConfigurationError, match="no_such_setting"):
            factory(pipeline, {**self.settings, "no_such_setting": 1}, [])


async def _within(case: Coroutine[Any, Any, None]) -> None:
    await asyncio.wait_for(case, _PATIENCE_S)


def _request(
    history: Sequence[int], candidates: Sequence[int] | None = None, **fields: Any
) -> RecommendRequest:
    times = 1_700_000_000_000 + 60_000 * np.arange(len(history), dtype=np.int64)
    ids = np.array(history, np.int64)
    chosen = None if candidates is None else Candidates(np.array(candidates, np.int64))
    return RecommendRequest(History(ids, times), candidates=chosen, **fields)
