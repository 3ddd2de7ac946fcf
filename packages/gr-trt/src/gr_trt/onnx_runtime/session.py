"""A graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gr_core.errors import BundleError, PlanError
from gr_trt.ensemble import Graph

Array = npt.NDArray[Any]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY = {"float32": np.float32, "float16": np.float16}
NUMPY_DTYPES: Mapping[str, Any] = {"int32": np.int32, "int64": np.int64, **_NUMPY}


@dataclass(frozen=True, slots=True)
class Runtime:
    """How sessions are to run."""

    providers: Sequence[Any]
    threads: int

    @staticmethod
    def on(device: str, provider: str, threads: int) -> Runtime:
        """Raises `PlanError` for a provider that this build of ONNX Runtime does not have."""
        import onnxruntime as ort

        kind, _, number = device.partition(":")
        name = _PROVIDERS[kind] if provider == "auto" else provider
        if name not in (have := ort.get_available_providers()):
            raise PlanError(
                f"engine onnxruntime: option provider is {name!r}; onnxruntime {ort.__version__} "
                f"has {', '.join(have)}"
            )
        chosen: list[Any] = [(name, {"device_id": int(number)}) if number else name]
        if name != _PROVIDERS["cpu"]:
            chosen.append(_PROVIDERS["cpu"])  # of operators that it does not have
        return Runtime(chosen, threads)


class Session:
    """Runs one graph; inputs and outputs are bound, so that nothing is copied on the CPU."""

    def __init__(self, folder: Path, graph: Graph, runtime: Runtime) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = runtime.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait in a loop would take the cores from the server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Lengths differ from batch to batch: a plan of memory for each would only grow.
        options.enable_mem_pattern = False
        file = folder / graph.file
        try:
            self._session = ort.InferenceSession(
                str(file), options, providers=list(runtime.providers)
            )
        except Exception as error:  # ONNX Runtime raises classes of its own, without a base
            raise BundleError(
                f"{file}: ONNX Runtime {ort.__version__} cannot load it: "
                f"{_first_line(error)}; export the model again"
            ) from error
        self._graph = graph
        self._check(file)

    def _check(self, file: Path) -> None:
        """The file has to be the graph that the ensemble describes."""
        taken = {value.name for value in self._session.get_inputs()}
        given = {value.name for value in self._session.get_outputs()}
        wanted = {tensor.name for tensor in self._graph.inputs}
        offered = {tensor.name for tensor in self._graph.outputs}
        if taken != wanted or not offered <= given:
            raise BundleError(
                f"{file}: takes {', '.join(sorted(taken))} and gives {', '.join(sorted(given))}, "
                "which is not what ensemble.json says; export the model again"
            )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for batched arrays of the declared types."""
        binding = self._session.io_binding()
        for tensor in self._graph.inputs:
            array = feeds[tensor.name]
            binding.bind_cpu_input(tensor.name, np.ascontiguousarray(array))
        for tensor in self._graph.outputs:
            binding.bind_output(tensor.name)
        self._session.run_with_iobinding(binding)
        outputs = binding.copy_outputs_to_cpu()
        return {t.name: output for t, output in zip(self._graph.outputs, outputs, strict=True)}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
