"""A plan on a GPU: contexts, buffers, streams, CUDA graphs. Nothing here decides; see `batches`.

For each profile there are several execution contexts, each with a stream and memory for its
largest sizes. The inputs of a part lie together in pinned memory and are copied at once; so are
the outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import torch

from gr_core.contracts import EngineOptions
from gr_core.errors import BundleError, GrError, PlanError
from gr_trt.ensemble import Graph
from gr_trt.tensorrt import buffers, plan_file
from gr_trt.tensorrt.buffers import Layout, layout
from gr_trt.tensorrt.kernels import KernelCache
from gr_trt.tensorrt.library import Library, current_target, load
from gr_trt.tensorrt.messages import make_log
from gr_trt.tensorrt.options import AUTO, TensorRTOptions
from gr_trt.tensorrt.plan_file import PlanFacts
from gr_trt.tensorrt.profiles import Profile
from gr_trt.tensorrt.slots import Slots, Step

logger = logging.getLogger(__name__)

Arrays = Mapping[str, npt.NDArray[Any]]

_MIB = 2**20


class Pending(Protocol):
    """Work that was started."""

    def result(self) -> Arrays:
        """Outputs by name, in the sizes that were run; waits for them. They are the caller's."""
        ...


class Runner(Protocol):
    """Runs one graph in sizes of its profiles. One thread at a time."""

    @property
    def profiles(self) -> Sequence[Profile]: ...

    def start(self, profile: int, sizes: Mapping[str, int], arrays: Arrays) -> Pending:
        """Begins to compute batched arrays of exactly these sizes."""
        ...

    def close(self) -> None: ...


OpenGraph = Callable[[Path, Graph, EngineOptions, TensorRTOptions], Runner]
"""Makes a graph of a folder ready to run."""


def open_plan(folder: Path, graph: Graph, options: EngineOptions, own: TensorRTOptions) -> Runner:
    """Checks a plan and loads it to the GPU.

    Raises `BundleError` for a plan that is damaged, or of another version or GPU, `PlanError`
    where there is no GPU or no library for it.
    """
    path = folder / graph.file
    content, facts = plan_file.read(path)
    library = _library(path, facts, own)
    capability, _ = current_target(options.device)
    plan_file.check(path, facts, library.name, library.version, capability)
    given = OpenPlan(library, path, content, facts, graph, options.device, capability, own)
    return PlanRunner(given)


def _library(path: Path, facts: PlanFacts, own: TensorRTOptions) -> Library:
    try:
        return load(facts.library if own.library == AUTO else own.library)
    except PlanError as error:
        built = f"was built by {facts.library} {facts.version}"
        raise BundleError(f"{path}: {built}; {error}") from None


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """What a runner is made of."""

    library: Library
    path: Path
    content: bytes
    facts: PlanFacts
    graph: Graph
    device: str
    capability: str
    options: TensorRTOptions


class PlanRunner:
    """Implements `Runner` with TensorRT."""

    def __init__(self, given: OpenPlan) -> None:
        self._log = make_log(given.library)
        self._profiles = given.facts.profiles
        self._started: list[_Run] = []
        # TensorRT for RTX records by itself, since it exchanges kernels for better ones meanwhile.
        record = given.options.cuda_graphs and not given.library.has_runtime_config
        count = given.options.contexts
        self._slots = [Slots(count, record) for _ in self._profiles]
        with torch.cuda.device(given.device):
            self._runtime = given.library.module.Runtime(self._log)
            self._engine = _deserialize(self._runtime, self._log, given)
            _check_profiles(self._engine, given)
            if given.facts.weight_streaming:
                _set_weight_budget(self._engine, given.options)
            _report(self._engine, given)
            self._kernels = KernelCache(self._engine, given)
            self._contexts = [
                [_Context(self._engine, self._kernels, i, given) for _ in range(count)]
                for i in range(len(self._profiles))
            ]

    @property
    def profiles(self) -> Sequence[Profile]:
        return self._profiles

    def start(self, profile: int, sizes: Mapping[str, int], arrays: Arrays) -> Pending:
        key = tuple(sorted(sizes.items()))
        slots = self._slots[profile]
        while (taken := slots.take(key)) is None:
            next(run for run in self._started if run.slots is slots).result()
        slot, step = taken
        context = self._contexts[profile][slot]
        run = _Run(context, slots, slot, self._started)
        try:
            context.start(step, sizes, arrays)
        except BaseException:
            slots.forget(slot)
            slots.release(slot)
            raise
        self._started.append(run)
        return run

    def close(self) -> None:
        if self._engine is None:
            return
        self._kernels.save()
        self._started = []
        # In this order: a context must not outlive its engine, nor what it was made with.
        self._contexts = []
        self._kernels.close()
        self._engine = None
        self._runtime = None


class _Run:
    """Implements `Pending`."""

    def __init__(self, context: _Context, slots: Slots, slot: int, started: list[_Run]) -> None:
        self._context = context
        self.slots = slots
        self._slot = slot
        self._started = started
        self._outputs: Arrays | None = None

    def result(self) -> Arrays:
        if self._outputs is None:
            try:
                self._outputs = self._context.finish()
            except BaseException:
                self.slots.forget(self._slot)
                raise
            finally:
                self._started.remove(self)
                self.slots.release(self._slot)
        return self._outputs


class _Context:
    """An execution context that stays with one profile, its stream and its memory."""

    def __init__(self, engine: Any, kernels: KernelCache, index: int, given: OpenPlan) -> None:
        graph, device, profile = given.graph, given.device, given.facts.profiles[index]
        self._graph = graph
        self._device = device
        self._context = kernels.new_context()
        if self._context is None:
            raise GrError(
                f"plan {graph.file}: no memory for another execution context; use fewer with "
                "--option contexts, or build it for smaller sizes"
            )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if not self._context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise GrError(f"plan {graph.file}: TensorRT refuses profile {profile}")
        self._stream.synchronize()
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        self._on_host = {name for name in names if engine.is_shape_inference_io(name)}
        # A graph may not need all that the model gives.
        self._inputs = [tensor for tensor in graph.inputs if tensor.name in names]
        largest = {axis: r.most for axis, r in profile.axes.items()}
        into, out = layout(self._inputs, largest).bytes, layout(graph.outputs, largest).bytes
        self._host_in = torch.empty(into, dtype=torch.uint8, pin_memory=True)
        self._host_out = torch.empty(out, dtype=torch.uint8, pin_memory=True)
        self._device_in = torch.empty(into, dtype=torch.uint8, device=device)
        self._device_out = torch.empty(out, dtype=torch.uint8, device=device)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._in = self._out = Layout({}, 0)
        self._recorded: torch.cuda.CUDAGraph | None = None

    def start(self, step: Step, sizes: Mapping[str, int], arrays: Arrays) -> None:
        self._in, self._out = layout(self._inputs, sizes), layout(self._graph.outputs, sizes)
        buffers.write(self._host_in, self._in, arrays)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if step is Step.RUN:
                self._recorded = None
                self._set()
                self._launch()
            elif step is Step.RECORD:
                recorded = torch.cuda.CUDAGraph()
                recorded.capture_begin(capture_error_mode="thread_local")
                try:
                    self._launch()
                finally:
                    recorded.capture_end()
                self._recorded = recorded
                recorded.replay()
            else:
                assert self._recorded is not None
                self._recorded.replay()
            self._done.record(self._stream)

    def finish(self) -> Arrays:
        self._done.synchronize()
        return buffers.read(self._host_out, self._out)

    def _set(self) -> None:
        """Shapes and addresses."""
        for name, place in self._in.places.items():
            block = self._host_in if name in self._on_host else self._device_in
            if not self._context.set_input_shape(name, place.shape):
                raise GrError(f"plan {self._graph.file}: input {name} refuses {place.shape}")
            self._context.set_tensor_address(name, block.data_ptr() + place.offset)
        for name, place in self._out.places.items():
            self._context.set_tensor_address(name, self._device_out.data_ptr() + place.offset)
        if missing := self._context.infer_shapes():
            raise GrError(f"plan {self._graph.file}: not specified: {', '.join(missing)}")
        for name, place in self._out.places.items():
            found = tuple(self._context.get_tensor_shape(name))
            if found != place.shape:
                raise GrError(
                    f"plan {self._graph.file}: output {name} is {found}, expected {place.shape}; "
                    "export the model again"
                )

    def _launch(self) -> None:
        used, made = self._in.bytes, self._out.bytes
        self._device_in[:used].copy_(self._host_in[:used], non_blocking=True)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise GrError(f"plan {self._graph.file}: TensorRT could not launch it; see the log")
        self._host_out[:made].copy_(self._device_out[:made], non_blocking=True)


def _deserialize(runtime: Any, log: Any, given: OpenPlan) -> Any:
    engine = runtime.deserialize_cuda_engine(given.content)
    if engine is None:
        raise BundleError(
            f"{given.path}: {given.library.label} cannot load it: {log.last_error()}; export the "
            "model again on this machine with --option target=current"
        )
    return engine


def _check_profiles(engine: Any, given: OpenPlan) -> None:
    """The plan must have been built for the sizes that our own file says."""
    if engine.num_optimization_profiles != len(given.facts.profiles):
        raise BundleError(
            f"{given.path}: has {engine.num_optimization_profiles} profiles, expected "
            f"{len(given.facts.profiles)}; export the model again"
        )


def _set_weight_budget(engine: Any, options: TensorRTOptions) -> None:
    """How much of the weights stays on the GPU; to be said before a context is made."""
    wanted = options.weight_budget_mib * _MIB
    budget = wanted or engine.get_weight_streaming_automatic_budget()
    engine.weight_streaming_budget_v2 = min(budget, engine.streamable_weights_size)


def _report(engine: Any, given: OpenPlan) -> None:
    """The engine inspector's report, if it was asked for."""
    if not given.options.report:
        return
    json_format = given.library.module.LayerInformationFormat.JSON
    text = engine.create_engine_inspector().get_engine_information(json_format)
    folder = Path(given.options.report)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{given.path.stem}.json"
    file.write_text(text)
    logger.info("%s: %d layers, see %s", given.path.name, engine.num_layers, file)
