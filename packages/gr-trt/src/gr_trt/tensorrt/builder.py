"""Builds a plan from a network: profiles, targets, limits, progress, and a way to stop it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gr_core.errors import PlanError
from gr_trt.ensemble import Graph
from gr_trt.tensorrt import timing
from gr_trt.tensorrt.library import Library
from gr_trt.tensorrt.messages import make_monitor
from gr_trt.tensorrt.network import Network
from gr_trt.tensorrt.options import CURRENT, BuildOptions
from gr_trt.tensorrt.profiles import K, Profile, Range, is_k, shape

logger = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Built:
    """A plan in memory and what is known of it."""

    plan: memoryview
    seconds: float
    activation_bytes: int
    """GPU memory that every execution context sets aside."""
    weight_bytes: int
    network: Mapping[str, Any]
    layers: tuple[str, ...]
    """Kind and name of what is launched, for all profiles, where the library tells."""


def build(
    network: Network,
    graph: Graph,
    profiles: Sequence[Profile],
    targets: Sequence[str],
    options: BuildOptions,
) -> Built:
    """Raises `PlanError` where TensorRT finds no way, KeyboardInterrupt when it was interrupted."""
    library = network.library
    config = network.builder.create_builder_config()
    _set_options(library, config, options)
    _set_targets(library, config, targets)
    for profile in profiles:
        _add_profile(network, config, graph, profile)
    monitor = make_monitor(library, graph.name)
    config.progress_monitor = monitor
    label = ", ".join(targets)
    logger.info("%s: %s builds for %s", graph.name, library.label, label)
    began = time.monotonic()
    with timing.cache(library, config, targets):
        plan = _interruptible(network, config, monitor)
    seconds = time.monotonic() - began
    if plan is None:
        raise PlanError(f"graph {graph.name!r}: {_why(network, profiles, options)}")
    data = memoryview(plan).cast("B")
    logger.info("%s: built in %.2f s, %.1f MiB", graph.name, seconds, data.nbytes / _MIB)
    facts = network.log.facts
    return Built(
        data,
        seconds,
        facts.get("activation_bytes", 0),
        facts.get("weight_bytes", 0),
        network.summary(),
        network.log.layers,
    )


def _set_options(library: Library, config: Any, options: BuildOptions) -> None:
    trt = library.module
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for flag, wanted in (
        ("TF32", options.tf32),
        ("SPARSE_WEIGHTS", options.sparse_weights),
        ("WEIGHT_STREAMING", options.weight_streaming),
        ("REFIT", options.refit),
    ):
        value = getattr(trt.BuilderFlag, flag, None)
        if value is None:
            if wanted:
                raise PlanError(f"{library.label} does not have {flag}; leave its option out")
        elif wanted:
            config.set_flag(value)
        else:
            config.clear_flag(value)


def _set_targets(library: Library, config: Any, targets: Sequence[str]) -> None:
    """TensorRT builds for the current device of CUDA, without being told."""
    if not library.targets:
        return
    capabilities = library.module.ComputeCapability
    names = [CURRENT.upper()] if list(targets) == [CURRENT] else [t.upper() for t in targets]
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(getattr(capabilities, name), index):
            raise PlanError(f"target: {library.label} refuses {name.lower()}")


def _add_profile(network: Network, config: Any, graph: Graph, profile: Profile) -> None:
    made = network.builder.create_optimization_profile()
    for tensor in graph.inputs:
        if tensor.name not in network.inputs:
            continue
        if is_k(tensor):
            r = profile.axes[K]
            if tensor.name in network.shape_inputs:
                made.set_shape_input(tensor.name, [r.least], [r.typical], [r.most])
            continue
        made.set_shape(tensor.name, *(_shape(tensor, profile, end) for end in _ENDS))
    if config.add_optimization_profile(made) < 0:
        raise PlanError(
            f"graph {graph.name!r}: TensorRT refuses profile {profile}: {network.log.last_error()}"
        )


_ENDS = ("least", "typical", "most")


def _shape(tensor: Any, profile: Profile, end: str) -> tuple[int, ...]:
    def size(r: Range) -> int:
        value: int = getattr(r, end)
        return value

    return shape(tensor, {axis: size(r) for axis, r in profile.axes.items()})


def _interruptible(network: Network, config: Any, monitor: Any) -> Any:
    """Builds in a thread of its own, so that this one hears of Ctrl-C while TensorRT works."""
    plans: list[Any] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            plans.append(network.builder.build_serialized_network(network.definition, config))
        except BaseException as error:  # is raised again where it can be handled
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="tensorrt-build").start()
    try:
        # An interrupted Thread.join() takes a thread that still works for one that has ended.
        while not done.wait(0.1):
            pass
    except BaseException:
        logger.warning("interrupted; TensorRT stops at its next step")
        monitor.stop()
        done.wait()
        raise
    if failures:
        raise failures[0]
    return plans[0]


def _why(network: Network, profiles: Sequence[Profile], options: BuildOptions) -> str:
    said = network.log.last_error()
    sizes = "; ".join(map(str, profiles))
    if "workspace" in said or "memory" in said.lower():
        return (
            f"it cannot be built within workspace_mib={options.workspace_mib} for the profiles "
            f"{sizes}; allow more, or lower batches, max_history or max_candidates. "
            f"{network.library.label} said: {said}"
        )
    return f"{network.library.label} cannot build it for the profiles {sizes}: {said}"
