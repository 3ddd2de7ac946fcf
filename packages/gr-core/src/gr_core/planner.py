"""The planner: a search, over plain data, for the best chain model → exporters → engine.

For one architecture and one task it lists every way from a format of the model, through exporters,
to an engine on a device, says of each whether it is feasible, and takes the best. What was asked
for explicitly is honoured or is an error; what was left to the planner falls back, and the plan
says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gr_core.devices import Machine, machine
from gr_core.errors import ConfigurationError, PlanError
from gr_core.plugins.descriptors import EngineDescriptor, ExporterDescriptor, ModelDescriptor
from gr_core.plugins.registry import Registry
from gr_core.types import Task

AUTO = "auto"
STRATEGIES: Mapping[str, str] = {"baseline": "torch"}
"""Words for engines; every other strategy but ``auto`` is the name of an engine."""
PROFILE = "profile.json"
"""In the cache folder: what was measured on this machine, see `load_profile`."""
MAX_EXPORTS = 4
"""Exporters in one chain, at most."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One way of running a task that was considered."""

    format: str
    """Format of the model's artifact that the chain starts from."""
    exporters: tuple[ExporterDescriptor, ...]
    engine: EngineDescriptor
    device: str
    dtype: str
    problems: tuple[str, ...] = ()
    """Why it is not feasible."""
    chosen: bool = False
    verdict: str = ""
    """Why it won or lost, for people."""

    @property
    def feasible(self) -> bool:
        return not self.problems

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the exporters and of the engine."""
        return (*(e.name for e in self.exporters), self.engine.name)

    def __str__(self) -> str:
        return f"{' → '.join(self.steps)} ({self.device}, {self.dtype})"


@dataclass(frozen=True, slots=True)
class Plan:
    """The chain chosen for a task, and every chain considered with why it won or lost."""

    task: Task
    strategy: str
    model: ModelDescriptor
    format: str
    exporters: tuple[ExporterDescriptor, ...]
    engine: EngineDescriptor
    device: str
    dtype: str
    reason: str
    considered: tuple[Chain, ...]

    def summary(self) -> str:
        """One line, e.g. ``hstu → torch (cpu, float32): highest priority of 1 feasible chain``."""
        steps = " → ".join((self.model.name, *(e.name for e in self.exporters), self.engine.name))
        return f"{steps} ({self.device}, {self.dtype}): {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task.value,
            "strategy": self.strategy,
            "model": self.model.name,
            "format": self.format,
            "exporters": [e.name for e in self.exporters],
            "engine": self.engine.name,
            "device": self.device,
            "dtype": self.dtype,
            "reason": self.reason,
            "considered": [
                {
                    "chain": list(c.steps),
                    "device": c.device,
                    "dtype": c.dtype,
                    "feasible": c.feasible,
                    "chosen": c.chosen,
                    "verdict": c.verdict,
                }
                for c in self.considered
            ],
        }


def plan(
    registry: Registry,
    architecture: str,
    task: Task,
    *,
    strategy: str = AUTO,
    device: str = AUTO,
    dtype: str = AUTO,
    profile: Mapping[str, float] | None = None,
    failed: Mapping[str, str] | None = None,
    on: Machine | None = None,
) -> Plan:
    """The best feasible chain for a task of an architecture.

    Among feasible chains, those whose engine was measured on this machine come first, the quickest
    first (``profile``: engine → seconds); then the engine's priority decides, then an accelerator
    comes before the CPU, then fewer exports, then the name. ``failed`` rules out engines, with
    reasons; ``on`` is the machine planned for, by default this one. Raises `PlanError` that lists
    the alternatives if there is no feasible chain or if ``strategy``, ``device`` or ``dtype``
    cannot be had.
    """
    model = _model(registry, architecture, task)
    search = _Search(
        registry=registry,
        model=model,
        task=task,
        engine=STRATEGIES.get(strategy, strategy),
        device=device,
        dtype=dtype,
        failed=failed or {},
        on=on or machine(),
    )
    profile = profile or {}
    chains = sorted(search.chains(), key=lambda chain: _rank(chain, profile))
    feasible = [chain for chain in chains if chain.feasible]
    asked = _asked(strategy, device, dtype)
    if not feasible:
        raise PlanError(_impossible(search, asked, chains))
    best = feasible[0]
    reason = _reason(best, feasible, chains, asked, profile)
    considered = tuple(
        replace(chain, chosen=True, verdict=reason)
        if chain is best
        else replace(chain, verdict=_why_lost(chain, best, profile))
        for chain in chains
    )
    return Plan(
        task=task,
        strategy=strategy,
        model=model,
        format=best.format,
        exporters=best.exporters,
        engine=best.engine,
        device=best.device,
        dtype=best.dtype,
        reason=reason,
        considered=considered,
    )


# ── Search ────────────────────────────────────────────────────────────────────────────────────


def _model(registry: Registry, architecture: str, task: Task) -> ModelDescriptor:
    usable, why = registry.models.usable(architecture)
    if not usable:
        raise PlanError(
            f"architecture {architecture!r} cannot be used: {why}. "
            + registry.models.alternatives(architecture)
        )
    model = registry.models[architecture]
    if task not in model.tasks:
        raise PlanError(
            f"architecture {architecture!r} cannot {task.value}; "
            f"it can {', '.join(t.value for t in model.tasks)}"
        )
    return model


def _paths(
    exporters: Sequence[ExporterDescriptor], format_: str, path: tuple[ExporterDescriptor, ...] = ()
) -> Iterator[tuple[tuple[ExporterDescriptor, ...], str]]:
    """All ways through the exporters from a format that visit no format twice."""
    yield path, format_
    if len(path) == MAX_EXPORTS:
        return
    seen = {format_, *(step.source for step in path)}
    for exporter in exporters:
        if exporter.source == format_ and exporter.target not in seen:
            yield from _paths(exporters, exporter.target, (*path, exporter))


def export_path(
    registry: Registry, architecture: str, target: str
) -> tuple[str, tuple[ExporterDescriptor, ...]]:
    """The shortest way from a format of an architecture to another format: its start and steps.

    At least one of the architecture's tasks survives all steps.
    Raises `PlanError` that says which exporters there are and why they cannot be used.
    """
    model = registry.models[architecture]
    ways = [
        (start, path)
        for start in model.formats
        for path, end in _paths(registry.exporters.values(), start)
        if path
        and end == target
        and all(not s.architectures or architecture in s.architectures for s in path)
        and set(model.tasks).intersection(*(s.tasks for s in path))
    ]
    if ways:
        return min(ways, key=lambda way: (len(way[1]), [step.name for step in way[1]], way[0]))
    declared = [f"{e.name} ({e.source} → {e.target})" for e in registry.exporters.declared()]
    unusable = [f"{name}: {why}" for name, why in registry.exporters.unusable().items()]
    raise PlanError(
        f"no exporter makes {target} of {architecture} ({', '.join(model.formats)}) for "
        f"{' or '.join(model.tasks)}. "
        f"Exporters: {', '.join(declared) or 'none installed'}. "
        + "; ".join(unusable)
        + registry.exporters.hint("")
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """What is planned for; finds all chains and says of each why it is not feasible."""

    registry: Registry
    model: ModelDescriptor
    task: Task
    engine: str
    device: str
    dtype: str
    failed: Mapping[str, str]
    on: Machine

    def chains(self) -> Iterator[Chain]:
        """Every chain over formats, feasible or not: one for each device of an engine."""
        exporters = self.registry.exporters.declared()
        for start in self.model.formats:
            for path, end in _paths(exporters, start):
                for engine in self.registry.engines.declared():
                    if end not in engine.formats:
                        continue
                    for kind in engine.devices:
                        dtype = engine.dtypes_on(kind)[0] if self.dtype == AUTO else self.dtype
                        asked = self.device.split(":")[0] == kind
                        chain = Chain(start, path, engine, self.device if asked else kind, dtype)
                        yield replace(chain, problems=tuple(self._problems(chain)))

    def _problems(self, chain: Chain) -> Iterator[str]:
        """Why a chain is not feasible. Probes are asked only where nothing else speaks against."""
        if cheap := list(self._mismatches(chain)):
            yield from cheap
            return
        for exporter in chain.exporters:
            usable, why = self.registry.exporters.usable(exporter.name)
            if not usable:
                yield f"exporter {exporter.name}: {why}"
        usable, why = self.on.available(chain.device)
        if usable:
            usable, why = self.registry.engines.usable(chain.engine.name)
        if usable:
            usable, why = self.registry.device_usable(chain.engine, chain.device)
        if not usable:
            yield why

    def _mismatches(self, chain: Chain) -> Iterator[str]:
        engine, wanted = chain.engine, self.engine
        if wanted not in (AUTO, engine.name):
            yield f"{wanted} was asked for"
        if self.device not in (AUTO, chain.device):
            yield f"device {self.device} was asked for"
        if engine.name in self.failed:
            yield self.failed[engine.name]
        dtypes = engine.dtypes_on(chain.device)
        if chain.dtype not in dtypes:
            yield f"it cannot compute in {chain.dtype}, only in {', '.join(dtypes)}"
        steps: tuple[ExporterDescriptor | EngineDescriptor, ...] = (*chain.exporters, engine)
        for step in steps:
            if self.task not in step.tasks:
                yield f"{step.name} does not support the task {self.task.value}"
            if step.architectures and self.model.name not in step.architectures:
                yield f"{step.name} does not support {self.model.name}"
        for exporter in chain.exporters:
            if not exporter.automatic and wanted == AUTO:
                yield f"exporter {exporter.name} runs only when its engine is asked for"


def _rank(chain: Chain, profile: Mapping[str, float]) -> tuple[Any, ...]:
    """Smaller is better. Total, so that the order of registration never matters."""
    return (
        profile.get(chain.engine.name, float("inf")),
        -chain.engine.priority,
        chain.device == "cpu",
        len(chain.exporters),
        chain.steps,
        chain.device,
        chain.format,
    )


# ── Reasons ───────────────────────────────────────────────────────────────────────────────────


def _asked(strategy: str, device: str, dtype: str) -> str:
    """What was asked for explicitly, e.g. ``strategy=tensorrt, device=cuda``."""
    given = {"strategy": strategy, "device": device, "dtype": dtype}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value != AUTO)


def _reason(
    best: Chain,
    feasible: Sequence[Chain],
    chains: Sequence[Chain],
    asked: str,
    profile: Mapping[str, float],
) -> str:
    if best.engine.name in profile:
        why = f"quickest of {_count(feasible)}, {_ms(profile[best.engine.name])} on this machine"
    else:
        why = f"highest priority of {_count(feasible)}"
    if asked:
        why = f"asked for ({asked}), {why}"
    possible = {chain.engine.name for chain in feasible}
    for chain in chains:
        engine = chain.engine
        if asked or engine.priority <= best.engine.priority or engine.name in possible:
            continue
        possible.add(engine.name)  # one reason for each engine that would have come first
        why += f"; not {engine.name}: {', '.join(chain.problems)}"
    return why


def _why_lost(chain: Chain, best: Chain, profile: Mapping[str, float]) -> str:
    if not chain.feasible:
        return "not feasible: " + "; ".join(chain.problems)
    mine, theirs = profile.get(chain.engine.name), profile.get(best.engine.name)
    if chain.engine.name != best.engine.name and theirs is not None:
        measured = "not measured on this machine" if mine is None else _ms(mine)
        return f"{measured}; {best.engine.name} takes {_ms(theirs)}"
    if chain.engine.priority < best.engine.priority:
        return f"priority {chain.engine.priority} is lower than {best.engine.priority}"
    if chain.device != best.device:
        return f"{best.device} is preferred to {chain.device}"
    if len(chain.exporters) > len(best.exporters):
        return f"{len(chain.exporters)} exports instead of {len(best.exporters)}"
    return "as good; the name decides"


def _impossible(search: _Search, asked: str, chains: Sequence[Chain]) -> str:
    registry, model, task, wanted = search.registry, search.model, search.task, search.engine
    with_ = f" with {asked}" if asked else ""
    lines = [f"{model.name} cannot {task.value}{with_} on this machine."]
    near = [c for c in chains if wanted in (AUTO, c.engine.name)]
    lines += [f"  {chain}: {'; '.join(chain.problems)}" for chain in near]
    if not near and wanted != AUTO:
        _, why = registry.engines.usable(wanted)
        lines.append(f"  {wanted}: {why or 'no exporter makes a format that it runs'}")
    if asked:
        usable: list[str] = []
        with suppress(PlanError):
            free = plan(registry, model.name, task, failed=search.failed, on=search.on)
            usable = [str(c) for c in free.considered if c.feasible]
        lines.append(f"Possible instead: {'; '.join(usable) or 'nothing'}.")
    lines.append(registry.engines.hint("" if wanted == AUTO else wanted))
    return "\n".join(filter(None, lines))


def _count(feasible: Sequence[Chain]) -> str:
    return f"{len(feasible)} feasible chain{'s' if len(feasible) > 1 else ''}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# ── The measured profile of a machine ─────────────────────────────────────────────────────────


def load_profile(path: Path) -> Mapping[str, Mapping[str, float]]:
    """Seconds by ``architecture/task`` and engine, as `save_profile` wrote them."""
    try:
        data = json.loads(path.read_text())
        return {
            str(key): {str(engine): float(seconds) for engine, seconds in engines.items()}
            for key, engines in data["seconds"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is not a measured profile: {error!r}; delete it"
        ) from None


def save_profile(path: Path, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Adds measurements to a profile, replacing those of the same engines."""
    merged = {key: dict(engines) for key, engines in load_profile(path).items()}
    for key, engines in seconds.items():
        merged.setdefault(key, {}).update(engines)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"seconds": merged}, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
