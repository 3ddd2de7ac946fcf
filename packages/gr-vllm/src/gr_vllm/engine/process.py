"""One vLLM: its AsyncLLM on a thread and event loop of its own, watched, and started again.

vLLM's front end works on its event loop for each request. On a loop of its own it neither holds up
the platform's nor is bound to it, so that one engine may be used from one loop after another.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from gr_core.contracts import Health
from gr_core.errors import Unavailable

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WATCH_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Between attempts to start again; doubled each time."""
_DIED = "its vLLM died"


class VllmProcess:
    """Starts what ``make`` makes, an AsyncLLM, and runs coroutines that use it."""

    def __init__(self, name: str, make: Callable[[], Any], *, restart: bool) -> None:
        """Blocks until it runs; raises what ``make`` raises."""
        self._name = name
        self._make = make
        self._restart = restart
        self._llm: Any = None
        self._down = "starting"
        """Why it does not answer; empty if it does."""
        self._closing = threading.Lock()
        self._closed = False
        self._in_flight: set[asyncio.Task[Any]] = set()
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

    # ── Running and watching, on the loop ─────────────────────────────────────────────────────

    async def _start(self) -> None:
        self._runs(await self._made())
        self._watcher = self._loop.create_task(self._watch())

    def _runs(self, llm: Any) -> None:
        self._llm, self._down = llm, ""

    async def _made(self) -> Any:
        """A vLLM that answers. It is made on a thread, for requests are refused meanwhile."""
        making = self._loop.run_in_executor(None, self._make)
        try:
            llm = await asyncio.shield(making)
        except asyncio.CancelledError:
            # A start cannot be interrupted; what it makes has to be ended as well.
            with suppress(Exception):
                await _end(await making)
            raise
        # The front end asks this once; were vLLM to die meanwhile, nobody would answer.
        asked = self._loop.create_task(llm.get_supported_tasks())
        try:
            while not asked.done():
                if llm.errored:
                    raise Unavailable(f"{self._name}: {_DIED} as it started")
                await asyncio.wait([asked], timeout=_WATCH_S)
            await asked
        except BaseException:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await _end(llm)
            raise
        return llm

    async def _watch(self) -> None:
        """Replaces a vLLM that died, until the engine is closed."""
        while True:
            while not self._llm.errored:
                await asyncio.sleep(_WATCH_S)
            again = " and is being started again" if self._restart else "; option restart is false"
            self._down = f"{_DIED}{again}"
            logger.error("%s: %s", self._name, self._down)
            dead, self._llm = self._llm, None
            await self._give_up()
            await _end(dead)
            if not self._restart:
                return
            self._runs(await self._made_again())
            logger.warning("%s: vLLM runs again", self._name)

    async def _made_again(self) -> Any:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await self._made()
            except Exception:
                logger.exception("%s: vLLM did not start; again in %g s", self._name, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _give_up(self) -> None:
        """Fails the requests in flight, of which vLLM's front end may forget some."""
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    async def _attempt(self, work: Callable[[Any], Awaitable[_T]]) -> _T:
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self._llm
        if self._refusal or llm is None:
            raise self._unavailable()
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        try:
            return await work(llm)
        except asyncio.CancelledError:
            if self._refusal:  # not the caller's wish
                raise self._unavailable() from None
            raise
        except EngineDeadError:
            raise Unavailable(f"{self._name}: {_DIED}") from None
        finally:
            self._in_flight.discard(task)

    # ── For everybody ─────────────────────────────────────────────────────────────────────────

    @property
    def _refusal(self) -> str:
        return "closed" if self._closed else self._down

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"{self._name}: {self._refusal}")

    def submit(self, work: Callable[[Any], Awaitable[_T]]) -> concurrent.futures.Future[_T]:
        """Runs ``work(llm)`` on this vLLM's loop, from any thread.

        Cancelling the future cancels the work. Where vLLM is down, dies meanwhile, or is closed,
        it is `Unavailable`.
        """
        with self._closing:
            if self._closed:
                raise self._unavailable()
            return asyncio.run_coroutine_threadsafe(self._attempt(work), self._loop)

    def health(self) -> Health:
        llm = self._llm
        down = self._refusal or (_DIED if llm is None or llm.errored else "")
        return Health(not down, f"{self._name}: {down}" if down else "")

    def close(self) -> None:
        """Ends vLLM and its processes; requests in flight are `Unavailable`. May be called twice.

        A vLLM that is being started again is awaited first.
        """
        with self._closing:
            closed, self._closed = self._closed, True
        if not closed:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._give_up()
        llm, self._llm = self._llm, None
        if llm is not None:
            await _end(llm)
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
    try:
        await asyncio.to_thread(llm.shutdown)
    except Exception:
        logger.exception("vLLM did not shut down as it should")
