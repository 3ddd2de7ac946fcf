"""One vLLM: its AsyncLLM on a thread and event loop of its own, watched, and started again.

vLLM's front end works on its event loop for each request. On a loop of its own it neither holds up
the platform's nor is bound to it, so that one engine may be used from one loop after another.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from gr_core.contracts import Health
from gr_core.errors import Unavailable

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WATCH_S = 0.25
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Between attempts to start again; doubled each time."""


class VllmProcess:
    """Starts what ``make`` makes, an AsyncLLM, and runs coroutines that use it."""

    def __init__(self, name: str, make: Callable[[], Any], *, restart: bool) -> None:
        """Blocks until it runs; raises what ``make`` raises."""
        self._name = name
        self._make = make
        self._restart = restart
        self._llm: Any = None
        self._down = ""
        self._closing = False
        self._watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="gr-vllm", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        # Processes started from here inherit it: Ctrl-C is for the server, which drains first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _start(self) -> None:
        self._llm = self._make()
        self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Replaces a vLLM that died, until the engine is closed."""
        while True:
            while not self._llm.errored:
                await asyncio.sleep(_WATCH_S)
            self._down = "its vLLM died"
            await _end(self._llm)
            if not self._restart:
                logger.error("%s: vLLM died; option restart is false", self._name)
                return
            self._down = "its vLLM died and is being started again"
            logger.error("%s: vLLM died; starting it again", self._name)
            self._llm = await self._start_again()
            self._down = ""
            logger.warning("%s: vLLM runs again", self._name)

    async def _start_again(self) -> Any:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                # On a thread, for requests have to be refused meanwhile.
                return await asyncio.to_thread(self._make)
            except Exception:
                logger.exception("%s: vLLM did not start; again in %g s", self._name, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    @property
    def llm(self) -> Any:
        """The AsyncLLM that runs now. Raises `Unavailable` if none does."""
        if self._down or self._llm is None:
            raise Unavailable(f"{self._name}: {self._down or 'closed'}")
        return self._llm

    def submit(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Runs on this vLLM's loop, from any thread; cancelling the future cancels the work."""
        if self._closing:
            work.close()
            raise Unavailable(f"{self._name}: closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def health(self) -> Health:
        if self._closing:
            return Health(False, f"{self._name} is closed")
        llm = self._llm
        if not self._down and llm is not None and llm.errored:
            return Health(False, f"{self._name}: its vLLM died")
        return Health(not self._down, f"{self._name}: {self._down}" if self._down else "")

    def close(self) -> None:
        """Ends vLLM and its processes. May be called twice."""
        if self._closing:
            return
        self._closing = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            # An attempt to start cannot be interrupted; what it makes is ended as well.
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._llm is not None:
            await _end(self._llm)
            self._llm = None
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()


async def _end(llm: Any) -> None:
    """Ends an AsyncLLM and its processes."""
    if llm.output_handler is not None:
        # Before its source dries up, which it would take for a failure.
        llm.output_handler.cancel()
        await asyncio.gather(llm.output_handler, return_exceptions=True)
    with suppress(Exception):
        await asyncio.to_thread(llm.shutdown)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that vLLM and its processes read as they start; what a user has set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
