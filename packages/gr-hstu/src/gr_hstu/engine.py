"""The engine ``torch``: a model's own module, eager, on padded batches; the float32 reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gr_core.collate import collate
from gr_core.contracts import (
    Artifact,
    EncodedRequest,
    EngineOptions,
    Health,
    InferenceResult,
    Model,
    TorchModel,
)
from gr_core.errors import PlanError, Unavailable
from gr_core.generation import CodeTrie, GenerativeModel
from gr_core.samples import for_task, sample_requests
from gr_core.types import Task
from gr_hstu.beams import BeamLoop
from gr_hstu.models import MTGR, HSTURanking, score_in_chunks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCORES_IN_FLIGHT = 16 * 2**20
"""Scores of retrieval held at once; a larger catalogue is multiplied block by block."""
_CANDIDATES_AT_ONCE = 1024
"""More candidates than this are scored in micro-batches against one pass over the history."""


class TorchEngine:
    """Runs any `gr_core.contracts.TorchModel`. Options of its own: none."""

    def __init__(self) -> None:
        self._model: TorchModel | None = None
        self._modules: dict[Task, nn.Module] = {}
        self._table: Tensor | None = None
        self._beams: BeamLoop | None = None
        self._device = torch.device("cpu")

    def load(
        self, artifact: Artifact, model: Model, tasks: Sequence[Task], options: EngineOptions
    ) -> None:
        if not isinstance(model, TorchModel):
            raise PlanError(f"engine torch: {type(model).__name__} offers no torch module")
        if options.extra:
            raise PlanError(f"engine torch has no option {', '.join(map(repr, options.extra))}")
        if options.threads:
            torch.set_num_threads(options.threads)
        self._device = torch.device(options.device)
        dtype = _DTYPES[options.dtype]
        copies: dict[int, Any] = {}  # what the modules of two tasks share is copied once
        for task in tasks:
            module: nn.Module = model.module(task)
            if dtype != torch.float32 or self._device.type != "cpu":
                module = copy.deepcopy(module, copies).to(self._device, dtype)
            self._modules[task] = module.eval()
        if Task.RETRIEVE in tasks:
            self._table = model.item_table().to(self._device)
        if Task.GENERATE in tasks:
            if not isinstance(model, GenerativeModel):
                raise PlanError(f"engine torch: {type(model).__name__} generates no semantic ids")
            self._beams = BeamLoop(
                self._modules[Task.GENERATE],
                CodeTrie(model.item_tokens(), model.levels),
                model.levels,
                model.beam_width,
                self._device,
            )
        self._model = model

    def warm_up(self) -> None:
        """Runs each task with histories from none to long, as the model itself encodes them."""
        assert self._model is not None
        for request in sample_requests(self._model, 3):
            for task in self._modules:
                self.infer([self._model.encode(for_task(request, task), task).request])

    @torch.inference_mode()
    def infer(self, batch: Sequence[EncodedRequest]) -> Sequence[InferenceResult]:
        if self._model is None:
            raise Unavailable("engine torch is closed")
        task = batch[0].task
        arrays = collate(self._model.inputs(task), batch)
        inputs = {
            name: torch.from_numpy(array).to(self._device, non_blocking=True)
            for name, array in arrays.items()
        }
        module = self._modules[task]
        if task is Task.RETRIEVE:
            return self._retrieve(module(**inputs).float(), [request.k for request in batch])
        if task is Task.GENERATE:
            assert self._beams is not None
            return self._beams(inputs, [request.k for request in batch])
        candidates = inputs["candidate_items"].shape[1]
        if candidates > _CANDIDATES_AT_ONCE and isinstance(module, HSTURanking | MTGR):
            outputs = _rank_in_chunks(module, inputs, _CANDIDATES_AT_ONCE)
        else:
            outputs = module(**inputs)
        scores = outputs.float().cpu().numpy()
        return [
            InferenceResult(scores[row, : len(request.arrays["candidate_items"])])
            for row, request in enumerate(batch)
        ]

    def _retrieve(self, users_BD: Tensor, ks: Sequence[int]) -> Sequence[InferenceResult]:
        assert self._table is not None
        items = self._table.shape[0] - 1
        k = min(max(ks), items)
        block = max(k, _SCORES_IN_FLIGHT // len(ks))
        best: tuple[Tensor, Tensor] | None = None
        for start in range(1, items + 1, block):
            part = self._table[start : start + block]
            scores, places = torch.topk(users_BD @ part.T, min(k, part.shape[0]))
            places = places + start
            if best is not None:
                scores = torch.cat([best[0], scores], dim=1)
                places = torch.cat([best[1], places], dim=1)
                scores, order = torch.topk(scores, min(k, scores.shape[1]))
                places = places.gather(1, order)
            best = scores, places
        assert best is not None
        scores_BK, indices_BK = (tensor.cpu().numpy() for tensor in best)
        return [
            InferenceResult(scores_BK[row, :k], indices_BK[row, :k]) for row, k in enumerate(ks)
        ]

    def health(self) -> Health:
        if self._model is None:
            return Health(False, "engine torch is not loaded")
        return Health(True)

    def close(self) -> None:
        self._model = None
        self._modules = {}
        self._table = None
        self._beams = None


def _rank_in_chunks(module: HSTURanking | MTGR, inputs: Mapping[str, Tensor], chunk: int) -> Tensor:
    """Logits (B, C, heads) as of one pass: the history once, then ``chunk`` candidates a time."""
    past = {name: value for name, value in inputs.items() if not name.startswith("candidate_")}
    if isinstance(module, MTGR):
        del past["request_time"]
    return score_in_chunks(
        module,
        module.prefill(**past),
        inputs["request_time"],
        inputs["candidate_items"],
        inputs["candidate_features"],
        inputs["candidate_counts"],
        inputs["context_features"],
        chunk=chunk,
    )
