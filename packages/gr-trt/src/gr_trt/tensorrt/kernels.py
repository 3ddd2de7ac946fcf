"""Kernels that TensorRT for RTX compiles on the GPU that it runs on, kept for the next start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_core.artifacts import cache_folder
from gr_core.errors import GrError
from gr_trt.tensorrt.files import write_atomically

if TYPE_CHECKING:
    from gr_trt.tensorrt.runner import OpenPlan

logger = logging.getLogger(__name__)

_MAX_BYTES = 512 * 2**20


class KernelCache:
    """The runtime cache of one plan; of TensorRT, which compiles nothing at run time, none."""

    def __init__(self, engine: Any, given: OpenPlan) -> None:
        self._engine = engine
        self._given = given
        self._cache: Any = None
        if not given.library.has_runtime_config:
            return
        name = "-".join(
            (given.library.name, given.library.version, given.capability, given.facts.sha256[:16])
        )
        self._path: Path = cache_folder() / "tensorrt" / "kernels" / f"{name}.cache"
        self._cache = engine.create_runtime_config().create_runtime_cache()
        there = self._path.is_file() and self._path.stat().st_size <= _MAX_BYTES
        if there and not self._cache.deserialize(self._path.read_bytes()):
            logger.info("%s is damaged; its kernels are compiled again", self._path)
            self._cache.reset()

    def new_context(self) -> Any:
        """An execution context with memory for the profile that it is set to, or None."""
        trt = self._given.library.module
        memory = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._cache is None:
            return self._engine.create_execution_context(memory)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(memory)
        config.set_runtime_cache(self._cache)
        config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._given.options.cuda_graphs
            else trt.CudaGraphStrategy.DISABLED
        )
        return self._engine.create_execution_context(config)

    def save(self) -> None:
        """Keeps what was compiled. A cache that cannot be written to is no reason to fail."""
        if self._cache is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, memoryview(self._cache.serialize()).cast("B"))
        except (GrError, OSError) as error:
            logger.warning("compiled kernels are not kept: %s", error)

    def close(self) -> None:
        """Only once there are no contexts any more: they use the cache without holding it."""
        self._cache = None
        self._engine = None
