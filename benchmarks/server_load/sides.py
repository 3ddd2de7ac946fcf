"""The servers that are compared, each run as a process: ``python sides.py SIDE PATH``.

``bare``      a grpc.aio server on uvloop that parses the request and fills an answer of ten items
``server``    the server of gr-serve-grpc before a pipeline that answers at once
``platform``  the same before the real pipeline with a model that costs next to nothing, whose
              repository is PATH
``model``     the same with the models of the configuration PATH

Prints the address when it is ready and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from gr_core.config import Config
from gr_core.contracts import Health
from gr_core.deployment import Environment, ModelSpec
from gr_core.observers import Observers
from gr_core.pipeline import Pipeline
from gr_core.plugins.host import PluginHost
from gr_core.repository import ModelRepository
from gr_core.types import RankedItem, Recommendation, RecommendRequest, StageReport, Task
from gr_core.validation import Limits
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2 as pb
from gr_serve_grpc._gen.gr.v1 import recommender_service_pb2_grpc as pb_grpc
from gr_serve_grpc._gen.gr.v1 import types_pb2 as types_pb
from gr_serve_grpc.metrics import PrometheusObserver
from gr_serve_grpc.server import GrpcServer
from gr_serve_grpc.settings import PrometheusSettings

TITLES = [f"Video {i}" for i in range(10)]


class BareServicer(pb_grpc.RecommenderServiceServicer):
    async def Recommend(self, request, context):
        return pb.RecommendResponse(
            request_id=request.request_id,
            items=[
                pb.RankedItem(item_id=types_pb.ItemId(integer=i), score=-i, title=title)
                for i, title in enumerate(TITLES)
            ],
            stages=[pb.StageReport(task=types_pb.TASK_RETRIEVE, model="trivial", version="1")],
        )


class InstantPipeline:
    """Answers at once, with the surface of a pipeline."""

    limits = Limits()

    async def recommend(self, request: RecommendRequest) -> Recommendation:
        items = [RankedItem(i, -i, {}, title) for i, title in enumerate(TITLES)]
        stage = StageReport(Task.RETRIEVE, "trivial", "1", "none", 0, 0, 1, 1, 0)
        return Recommendation(request.request_id, items, (stage,), 0.0, 0.0)

    def health(self) -> Health:
        return Health(True)

    def queue_depths(self) -> dict[str, int]:
        return {}

    def cache_statistics(self) -> dict[str, object]:
        return {}


async def serve_bare(stop: asyncio.Event, ready: Callable[[Sequence[str]], None]) -> None:
    server = grpc.aio.server()
    pb_grpc.add_RecommenderServiceServicer_to_server(BareServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready([f"127.0.0.1:{port}"])
    await stop.wait()
    await server.stop(1)


async def serve(side: str, path: Path, stop: asyncio.Event, ready) -> None:
    observer = PrometheusObserver(PrometheusSettings())
    pipeline: Pipeline | InstantPipeline = InstantPipeline()
    if side == "platform":
        import trivial_plugin

        environment = Environment(trivial_plugin.REGISTRY, observers=Observers([observer]))
        repository = ModelRepository(path)
        pipeline = Pipeline(repository, [ModelSpec("trivial")], [], environment, poll_seconds=0)
    elif side == "model":
        config = Config.load(path, environ={})
        pipeline = Pipeline.from_config(config, PluginHost.discover().registry, [observer])
    if isinstance(pipeline, Pipeline):
        await pipeline.start()
    await GrpcServer(pipeline, {"port": 0}, [observer]).serve(stop, ready)  # type: ignore[arg-type]
    if isinstance(pipeline, Pipeline):
        await pipeline.close()


async def main(side: str, path: Path) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), stop.set)

    def ready(addresses: Sequence[str]) -> None:
        print(addresses[0], flush=True)

    await (serve_bare(stop, ready) if side == "bare" else serve(side, path, stop, ready))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=GrpcServer.loop_factory) as runner:
        runner.run(main(sys.argv[1], Path(sys.argv[2])))
