"""Plans against torch, on the GPU that they were built for, before they are given away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr_core.collate import collate
from gr_core.contracts import EncodedRequest, EngineOptions, Model, TorchModel
from gr_core.errors import FailedPrecondition, GrError
from gr_core.parity import TOLERANCE, score_error
from gr_core.samples import for_task, sample_requests
from gr_trt.ensemble import Ensemble, Role
from gr_trt.tensorrt.options import TensorRTOptions
from gr_trt.tensorrt.passes import SinglePass
from gr_trt.tensorrt.runner import OpenGraph

logger = logging.getLogger(__name__)

_SAMPLES = 8


def verify(
    folder: Path, ensemble: Ensemble, model: Model, device: str, open_graph: OpenGraph
) -> None:
    """Runs the plans of whole requests on samples of the model, alone and together.

    Raises `GrError` where an answer differs from torch's in float32 by more than the precision
    allows. Models that offer no torch module are not compared.
    """
    if not isinstance(model, TorchModel):
        return
    tolerance = TOLERANCE[ensemble.dtype]
    options = EngineOptions(device, ensemble.dtype)
    for graph in ensemble.graphs:
        if graph.role is not Role.SINGLE_PASS:
            continue
        (task,) = graph.tasks
        requests = [
            model.encode(for_task(request, task), task).request
            for request in sample_requests(model, _SAMPLES)
        ]
        one = SinglePass(open_graph(folder, graph, options, TensorRTOptions()), graph)
        try:
            for batch in ([requests[0]], requests):
                error = _error(one, model, batch)
                if not error <= tolerance:
                    raise GrError(
                        f"{graph.file}: its answers differ from torch by {error:.2g}, more than "
                        f"{tolerance:g} in {ensemble.dtype}; use another --precision, or the "
                        "engine onnxruntime"
                    )
                logger.info("%s: differs from torch by %.2g (%g)", graph.file, error, tolerance)
        except FailedPrecondition as error:
            logger.warning("%s: not compared with torch: %s", graph.file, error)
        finally:
            one.close()


@torch.inference_mode()
def _error(one: SinglePass, model: TorchModel, batch: Sequence[EncodedRequest]) -> float:
    """The largest difference of a request, as a part of its largest magnitude."""
    task = batch[0].task
    module = model.module(task)
    errors = []
    for request, answer in zip(batch, one.answers(batch), strict=True):
        arrays: Any = collate(model.inputs(task), [request])
        right = module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        wanted = right[0, : len(answer.output)].numpy() if right.dim() > 2 else right[0].numpy()
        errors.append(score_error(answer.output, wanted))
    return float(np.max(errors))  # what is not a number stays so
