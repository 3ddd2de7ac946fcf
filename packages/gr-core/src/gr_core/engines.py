"""An engine by itself, without a queue: loaded as a plan says. For comparing and measuring."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gr_core.artifacts import load_engine
from gr_core.contracts import (
    AsyncEngine,
    EncodedRequest,
    Engine,
    EngineOptions,
    InferenceResult,
    Model,
)
from gr_core.errors import PlanError
from gr_core.planner import Plan, plan
from gr_core.plugins.registry import Registry
from gr_core.types import Task


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A loaded engine and the plan that it was loaded by."""

    plan: Plan
    engine: Engine | AsyncEngine
    loop: asyncio.Runner
    """For engines that batch by themselves."""

    @property
    def label(self) -> str:
        return f"{self.plan.engine.name} ({self.plan.device}, {self.plan.dtype})"

    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        """Results of a batch; an engine that batches by itself gets its requests all at once."""
        engine = self.engine
        if not self.plan.engine.batches_itself:
            assert isinstance(engine, Engine)
            return engine.infer(batch)
        assert isinstance(engine, AsyncEngine)

        async def together() -> Sequence[InferenceResult]:
            return await asyncio.gather(*(engine.infer(request, None) for request in batch))

        return self.loop.run(together())


@contextmanager
def running(
    chosen: Plan, model: Model, *, threads: int = 0, extra: Mapping[str, Any] | None = None
) -> Iterator[RunningEngine]:
    """Loads and warms up a plan's engine for its task; closes it at the end."""
    engine: Engine | AsyncEngine = chosen.engine.resolve()()
    loop = asyncio.Runner()
    try:
        options = EngineOptions(chosen.device, chosen.dtype, threads, extra=extra or {})
        load_engine(engine, chosen, model, [chosen.task], options)
        engine.warm_up()
        yield RunningEngine(chosen, engine, loop)
    finally:
        engine.close()
        loop.close()


@dataclass(frozen=True, slots=True)
class Only:
    """Restricts what is compared or measured; empty means all."""

    engines: Sequence[str] = ()
    device: str = "auto"
    dtypes: Sequence[str] = ()


def feasible_plans(
    registry: Registry, architecture: str, task: Task, only: Only | None = None
) -> Sequence[Plan]:
    """A plan for every engine, device and precision that this machine can run, by name.

    An engine that ``only`` names and that cannot run at all raises `PlanError` or `PluginError`
    with its reason.
    """
    only = only or Only()
    for name in only.engines:
        registry.engines[name]  # raises for one that is not there
    plans = []
    for descriptor in registry.engines.declared():
        if only.engines and descriptor.name not in only.engines:
            continue
        reasons = []
        found = 0
        devices = descriptor.devices if only.device == "auto" else (only.device,)
        for on in devices:
            for dtype in descriptor.dtypes_on(on):
                if only.dtypes and dtype not in only.dtypes:
                    continue
                try:
                    plans.append(
                        plan(
                            registry,
                            architecture,
                            task,
                            strategy=descriptor.name,
                            device=on,
                            dtype=dtype,
                        )
                    )
                    found += 1
                except PlanError as error:
                    reasons.append(error)
        if descriptor.name in only.engines and not found and reasons:
            raise reasons[0]
    return plans
