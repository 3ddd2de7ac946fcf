"""The ``config.pbtxt`` of every model of a repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gr_core.types import Task
from gr_trt.triton.layout import (
    ANSWER,
    ITEMS,
    REQUEST,
    SIZES,
    STATE,
    STEPS,
    TYPES,
    Names,
    Port,
)
from gr_trt.triton.options import ONNXRUNTIME, PYTHON, TENSORRT, RepositoryOptions
from gr_trt.triton.text_format import Word, text_format

FILES = {PYTHON: "model.py", ONNXRUNTIME: "model.onnx", TENSORRT: "model.plan"}
"""What a backend looks for in a version folder."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A request that a model computes before it is ready: files by input, of one row each."""

    name: str
    batch: int
    shapes: Mapping[str, tuple[int, ...]]
    """Without the batch. Inputs that have no file get zeros."""
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class Wiring:
    """The ports of the steps of one task."""

    task: Task
    inputs: Sequence[Port]
    """Of the engine, as the model or its graph names them."""
    features: Sequence[Port]
    """What the features step gives."""
    outputs: Sequence[Port]
    """What the engine gives."""


def ensemble_config(name: str, names: Names, version: int, batch: int, wiring: Wiring) -> str:
    """An ensemble that leads through one version of the steps."""
    features = {port.name: port.name for port in wiring.features}
    given = [port.name for port in wiring.inputs]
    given += [SIZES] if SIZES in features else []
    # Tensors of the engine are named apart: a graph may give what it is given.
    outputs = {port.name: f"engine_{port.name}" for port in wiring.outputs}
    steps = [
        ({REQUEST: REQUEST}, features),
        ({port: port for port in given}, outputs),
        ({STATE: STATE, ITEMS: ITEMS, **outputs}, {ANSWER: ANSWER}),
    ]
    return text_format(
        {
            "name": name,
            "platform": "ensemble",
            "max_batch_size": batch,
            "input": _tensors([Port(REQUEST, "text", (1,))]),
            "output": _tensors([Port(ANSWER, "text", (1,))]),
            "ensemble_scheduling": {
                "step": [
                    {
                        "model_name": names.step(step),
                        "model_version": version,
                        "input_map": _pairs(taken),
                        "output_map": _pairs(made),
                    }
                    for step, (taken, made) in zip(STEPS, steps, strict=True)
                ]
            },
        }
    )


def step_config(
    step: str,
    names: Names,
    wiring: Wiring,
    options: RepositoryOptions,
    device: str,
    profile: str,
    warm_up: Sequence[WarmUp],
) -> str:
    """The configuration of a step; all its versions share it.

    ``profile`` is the place of the plan's profile to be used, where there are several.
    """
    ports = {
        "features": ([Port(REQUEST, "text", (1,))], wiring.features),
        "engine": (_engine_inputs(wiring), wiring.outputs),
        "answer": (
            [Port(STATE, "text", (1,)), Port(ITEMS, "int64", (-1,)), *wiring.outputs],
            [Port(ANSWER, "text", (1,))],
        ),
    }
    inputs, outputs = ports[step]
    is_engine = step == "engine"
    backend = options.backend if is_engine else PYTHON
    config: dict[str, Any] = {
        "name": names.step(step),
        "backend": backend,
        "max_batch_size": options.triton_batch,
        "input": _tensors(inputs, ragged=backend == PYTHON, reshaped=backend != PYTHON),
        "output": _tensors(outputs, reshaped=backend != PYTHON),
        "version_policy": {"all": {}},
        "instance_group": [
            {
                "count": options.instances if is_engine else options.step_instances,
                "kind": Word(_kind(backend, device) if is_engine else "KIND_CPU"),
                **({"profile": profile} if is_engine and profile else {}),
            }
        ],
        "dynamic_batching": _batching(options, is_engine),
    }
    if warm_up:
        types = {port.name: port for port in inputs}
        config["model_warmup"] = [_warm_up(one, types) for one in warm_up]
    if backend == PYTHON and options.execution_env:
        config["parameters"] = [
            {"key": "EXECUTION_ENV_PATH", "value": {"string_value": options.execution_env}}
        ]
    return text_format(config)


def _engine_inputs(wiring: Wiring) -> Sequence[Port]:
    return [*wiring.inputs, *(port for port in wiring.features if port.name == SIZES)]


def _kind(backend: str, device: str) -> str:
    if backend == TENSORRT or device.startswith("cuda"):
        return "KIND_GPU"
    return "KIND_CPU"


def _batching(options: RepositoryOptions, is_engine: bool) -> dict[str, Any]:
    """Only the engine is worth waiting for others; the other steps batch what is there."""
    batching: dict[str, Any] = {
        "preferred_batch_size": list(options.preferred_batches) if is_engine else [],
        "max_queue_delay_microseconds": options.queue_delay_us if is_engine else 0,
    }
    policy: dict[str, Any] = {}
    if options.queue_timeout_ms:
        policy = {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": 1000 * options.queue_timeout_ms,
            "allow_timeout_override": True,
        }
    if options.queue_size:
        policy["max_queue_size"] = options.queue_size
    return {**batching, "default_queue_policy": policy} if policy else batching


def _tensors(
    ports: Sequence[Port], *, ragged: bool = False, reshaped: bool = False
) -> list[dict[str, Any]]:
    found = []
    for port in ports:
        tensor: dict[str, Any] = {
            "name": port.name,
            "data_type": Word(TYPES[port.dtype]),
            "dims": list(port.dims),
        }
        if reshaped and port.scalar:
            tensor["reshape"] = {}
        if ragged and -1 in port.dims:
            tensor["allow_ragged_batch"] = True
        found.append(tensor)
    return found


def _pairs(names: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in names.items()]


def _warm_up(warm_up: WarmUp, ports: Mapping[str, Port]) -> dict[str, Any]:
    return {
        "name": warm_up.name,
        "batch_size": warm_up.batch,
        "inputs": [
            {
                "key": name,
                "value": {
                    "data_type": Word(TYPES[ports[name].dtype]),
                    "dims": list(shape),
                    **({"input_data_file": name} if name in warm_up.files else {"zero_data": True}),
                },
            }
            for name, shape in warm_up.shapes.items()
        ],
    }
