"""The training loop: one for every model and objective.

Reproducible by construction: the order of an epoch depends on (seed, epoch) and every random
number of a step on (seed, epoch, step). A run that is stopped and resumed anywhere therefore
computes exactly what an undisturbed one computes, and no generator's state needs to be saved.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gr_hstu.training import checkpoint
from gr_hstu.training.progress import Reporter, Silent


class Objective(Protocol):
    """What is learned from which data. ``M`` stands for the model that it knows how to call."""

    def epoch(self, draw: np.random.Generator) -> Sequence[Any]:
        """Plans of the epoch's batches, cheap to make and in the order given by ``draw``."""
        ...

    def loss(self, model: Any, plan: Any) -> Tensor:
        """Mean loss of one batch, a scalar with gradient."""
        ...

    def validate(self, model: Any) -> float:
        """The metric by which the best epoch is chosen; larger is better."""
        ...


@dataclass(frozen=True)
class Options:
    """How long and how fast. ``patience``: epochs without improvement before stopping."""

    seed: int = 0
    max_epochs: int = 50
    patience: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    linear_decay: bool = False
    """Whether the learning rate falls to 0 over ``max_epochs``."""
    max_grad_norm: float = 0.0
    average_decay: float = 0.0
    """Of a running average of the weights, from the initial ones on, which is validated and kept in
    their place; 0: none."""
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected more than 0")


@dataclass
class Progress:
    """Where a run stands; saved in its checkpoint as JSON."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_metric: float = float("-inf")
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user between two steps; the checkpoint is complete."""


def fit(
    model: nn.Module,
    objective: Objective,
    options: Options,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    identity: Mapping[str, Any] | None = None,
    stop_after_steps: int | None = None,
) -> Progress:
    """Trains ``model`` in place and leaves it with the weights of the best epoch, in eval mode.

    With ``folder``, the state is saved there, and a later call with the same options and
    ``identity`` (plain JSON: data, settings) goes on from it. The first interrupt (SIGINT) stops
    cleanly after the current step; ``stop_after_steps`` does the same on its own.

    Raises:
        Interrupted: stopped early; call again with the same folder to go on.
        ValueError: the folder's checkpoint is of a run with other options or another model.
    """
    reporter = reporter or Silent()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    run = _Run(model, optimizer, options, Progress(), _copy(model), folder, identity or {})
    run.average = _copy(model) if options.average_decay else {}
    if folder is not None and (folder / checkpoint.NAME).is_file():
        run.restore(device)
    progress = run.progress
    steps_left = stop_after_steps
    with _deferred_interrupt() as interrupted, torch.random.fork_rng():
        saved_at = time.monotonic()
        while not progress.finished:
            began = time.monotonic()
            plans = objective.epoch(np.random.default_rng([options.seed, progress.epoch]))
            reporter.start_epoch(progress.epoch, len(plans))
            model.train()
            while progress.step < len(plans):
                if interrupted() or steps_left == 0:
                    run.save()
                    raise Interrupted(f"stopped in epoch {progress.epoch}, step {progress.step}")
                loss = _step(model, objective, optimizer, options, progress, plans)
                progress.loss_sum += loss
                progress.step += 1
                run.follow()
                steps_left = None if steps_left is None else steps_left - 1
                reporter.step(loss)
                if time.monotonic() - saved_at > options.checkpoint_seconds:
                    run.save()
                    saved_at = time.monotonic()
            metric = run.validate(objective)
            line = run.end_epoch(metric, len(plans), time.monotonic() - began)
            reporter.end_epoch(line)
            run.save()
    model.load_state_dict(run.best)
    model.eval()
    return progress


def _step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    options: Options,
    progress: Progress,
    plans: Sequence[Any],
) -> float:
    seeds = np.random.SeedSequence([options.seed, progress.epoch, progress.step])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    done = progress.epoch * len(plans) + progress.step
    rate = options.learning_rate * min(1.0, (done + 1) / max(options.warmup_steps, 1))
    if options.linear_decay:
        rate *= 1 - done / (options.max_epochs * len(plans))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = objective.loss(model, plans[progress.step])
    loss.backward()  # type: ignore[no-untyped-call]
    if options.max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    optimizer.step()
    value = loss.item()
    if not np.isfinite(value):
        raise FloatingPointError(
            f"loss is {value} in epoch {progress.epoch}, step {progress.step}; "
            "try a smaller --set learning_rate=…"
        )
    return value


@dataclass
class _Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    options: Options
    progress: Progress
    best: dict[str, Tensor]
    folder: Path | None
    identity: Mapping[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)

    def follow(self) -> None:
        """Moves the average towards the weights."""
        for name, tensor in self.model.state_dict().items():
            if name in self.average and tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - self.options.average_decay)

    def validate(self, objective: Objective) -> float:
        """The metric of the weights that would be kept, which are left in ``candidate``."""
        self.candidate = _copy(self.model) if not self.average else dict(self.average)
        training = _copy(self.model)
        self.model.load_state_dict(self.candidate)
        self.model.eval()
        with torch.no_grad():
            metric = float(objective.validate(self.model))
        self.model.load_state_dict(training)
        return metric

    def end_epoch(self, metric: float, steps: int, seconds: float) -> str:
        p = self.progress
        loss = p.loss_sum / max(steps, 1)
        p.history.append({"epoch": p.epoch, "loss": loss, "metric": metric})
        if metric > p.best_metric:
            p.best_metric, p.best_epoch = metric, p.epoch
            self.best = {name: tensor.clone() for name, tensor in self.candidate.items()}
        line = (
            f"epoch {p.epoch}: loss {loss:.4f}, validation {metric:.4f} "
            f"(best {p.best_metric:.4f} in epoch {p.best_epoch}), {seconds:.1f} s"
        )
        p.epoch, p.step, p.loss_sum = p.epoch + 1, 0, 0.0
        p.finished = (
            p.epoch >= self.options.max_epochs
            or p.epoch - 1 - p.best_epoch >= self.options.patience
        )
        return line

    def _identity(self) -> Any:
        """What makes two runs the same: all options but how often to save, as JSON values."""
        options = asdict(self.options)
        del options["checkpoint_seconds"]
        return json.loads(json.dumps({"options": options, **self.identity}))

    def save(self) -> None:
        if self.folder is None:
            return
        tensors = {
            **checkpoint.with_prefix("model", self.model.state_dict()),
            **checkpoint.with_prefix("best", self.best),
            **checkpoint.with_prefix("average", self.average),
            **checkpoint.optimizer_tensors(self.optimizer),
        }
        state = {"progress": asdict(self.progress), "run": self._identity()}
        checkpoint.save(self.folder / checkpoint.NAME, tensors, state)

    def restore(self, device: torch.device) -> None:
        assert self.folder is not None
        path = self.folder / checkpoint.NAME
        tensors, state = checkpoint.load(path, device)
        if changed := _differences(state["run"], self._identity()):
            raise ValueError(
                f"{path} belongs to another run: {', '.join(changed)}; "
                "use another folder, or delete the file to begin anew"
            )
        try:
            self.model.load_state_dict(checkpoint.without_prefix("model", tensors))
        except RuntimeError as error:
            raise ValueError(f"{path} belongs to another model: {error}") from None
        self.best = checkpoint.without_prefix("best", tensors)
        self.average = checkpoint.without_prefix("average", tensors)
        checkpoint.restore_optimizer(self.optimizer, tensors)
        self.progress = Progress(**state["progress"])


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Paths of the values in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*before, *now})
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {before!r} and is {now!r}"]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def _deferred_interrupt() -> Iterator[Any]:
    """Keeps the first SIGINT until it is asked for; a second one raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
