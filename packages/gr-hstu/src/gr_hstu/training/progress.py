"""How training tells of itself: a bar on a terminal, one plain line an epoch otherwise."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Told of the course of one training run."""

    def start_epoch(self, epoch: int, steps: int) -> None: ...

    def step(self, loss: float) -> None: ...

    def end_epoch(self, line: str) -> None: ...


class Silent:
    """Says nothing."""

    def start_epoch(self, epoch: int, steps: int) -> None: ...

    def step(self, loss: float) -> None: ...

    def end_epoch(self, line: str) -> None: ...


class ConsoleReporter:
    """Writes to a rich console; a context manager, so that the bar is always taken away."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start_epoch(self, epoch: int, steps: int) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(f"epoch {epoch}", total=steps, loss=float("nan"))

    def step(self, loss: float) -> None:
        self._bar.update(self._task, advance=1, loss=loss)

    def end_epoch(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
