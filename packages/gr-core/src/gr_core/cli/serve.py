"""``gr serve``: serves a pipeline until it is told to stop, then drains."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from gr_core.cli.options import Setup, configured, engine_options

if TYPE_CHECKING:
    from gr_core.contracts import Server
    from gr_core.observers import Observer
    from gr_core.pipeline import Pipeline

logger = logging.getLogger(__name__)


@click.command(name="serve")
@click.argument("protocol", default="grpc")
@configured
@engine_options
@click.option("--host", help="Address to listen on; default: loopback.")
@click.option("--port", type=int, help="Port to listen on; 0: any free one.")
@click.pass_context
def serve(
    ctx: click.Context,
    setup: Setup,
    protocol: str,
    strategy: str | None,
    device: str | None,
    dtype: str | None,
    host: str | None,
    port: int | None,
) -> int:
    """Serve recommendations over PROTOCOL, by default grpc.

    SIGINT or SIGTERM refuses new work and finishes what was accepted; a second one ends at once.
    """
    from gr_core import logs
    from gr_core.pipeline import Pipeline

    setup = setup.override_models(strategy=strategy, device=device, dtype=dtype)
    config = setup.config
    debug = bool(ctx.find_root().params.get("debug"))
    logs.setup("debug" if debug else config.logging.level, config.logging.format)
    registry = setup.registry
    factory = registry.servers[protocol].resolve()
    observers = [
        registry.observers[name].resolve()(settings) for name, settings in config.observers.items()
    ]
    settings: dict[str, Any] = dict(config.server.get(protocol, {}))
    settings |= {key: v for key, v in (("host", host), ("port", port)) if v is not None}
    pipeline = Pipeline.from_config(config, registry, observers)
    # Settings are checked before models are loaded.
    server = factory(pipeline, settings, observers)
    with asyncio.Runner(loop_factory=getattr(factory, "loop_factory", None)) as runner:
        runner.run(_serve(server, pipeline, observers))
    return 0


async def _serve(server: Server, pipeline: Pipeline, observers: Sequence[Observer]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal, stop, number)

    def ready(addresses: Sequence[str]) -> None:
        print(f"serving on {', '.join(addresses)}", flush=True)

    try:
        if await _until(pipeline.start(), stop):
            _settle()
            await server.serve(stop, ready)
    finally:
        await pipeline.close()


def _settle() -> None:
    """Takes what is loaded out of garbage collection.

    A full collection looks at everything that plugins and models brought, some 200,000 objects with
    torch, and stops all threads for a tenth of a second meanwhile. Models that are retired later
    are freed all the same: nothing in them refers to itself.
    """
    gc.collect()
    gc.freeze()


def _on_signal(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        print("stopping at once", file=sys.stderr, flush=True)
        os._exit(128 + number)
    logger.info("stopping: %s", signal.Signals(number).name)
    stop.set()


async def _until(work: Any, stop: asyncio.Event) -> bool:
    """Awaits work unless told to stop before; returns whether it was done."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            return False
        await task
        return True
    finally:
        stopped.cancel()
