from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

# The factories of the toy plugin are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

import serving_toy

from gr_core.pipeline import Pipeline
from gr_serve_grpc.client import AsyncClient
from gr_serve_grpc.server import GrpcServer

TOY_OPTIONS = {"max_queue", "histories_bytes"}
"""What `serve` passes on to the toys; the rest are settings of the server."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    serving_toy.write_models(folder)
    return folder


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> serving_toy.Control:
    """The toy engine's control, new for each test, its gate open."""
    control = serving_toy.Control()
    control.gate.set()
    monkeypatch.setattr(serving_toy, "CONTROL", control)
    return control


class Running:
    """A server on a free port of loopback."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.address = ""
        self.pipeline: Pipeline
        self.task: asyncio.Task[None]

    async def finished(self) -> None:
        """Stops it and waits for the end."""
        self.stop.set()
        await asyncio.wait_for(self.task, 20)


@pytest.fixture
def serve(models: Path, control: serving_toy.Control):
    """``async with serve(**settings) as running``: a real server of the toys."""

    @asynccontextmanager
    async def serving(*, observers=(), folder: Path = models, **settings):
        options = {name: settings.pop(name) for name in TOY_OPTIONS & settings.keys()}
        pipeline = serving_toy.make_pipeline(folder, observers=observers, **options)
        async with serving_toy.started(pipeline):
            running = Running()
            running.pipeline = pipeline
            server = GrpcServer(pipeline, {"port": 0, **settings}, observers)
            ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            running.task = asyncio.create_task(
                server.serve(running.stop, lambda addresses: ready.set_result(addresses[0]))
            )
            done, _ = await asyncio.wait({running.task, ready}, return_when="FIRST_COMPLETED")
            if running.task in done:
                running.task.result()
            running.address = await ready
            try:
                yield running
            finally:
                control.gate.set()
                await running.finished()

    return serving


@pytest.fixture
async def client(serve):
    """A client of a server with default settings."""
    async with serve() as running, AsyncClient(running.address) as client:
        await client.wait_until_ready()
        yield client
