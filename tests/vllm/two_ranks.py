"""A program that answers prompts on two ranks: arguments are a model directory and a work folder.

It reads ``prompts.pt`` and ``candidates.json`` there, and writes ``found.json``: of each prompt
the scores or rows, and the tokens that were cached, the second time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gr_vllm.checkpoint import Checkpoint
from gr_vllm.worker.kernels import PAGE_TOKENS


def main(folder: Path, work: Path) -> None:
    from vllm import LLM

    checkpoint = Checkpoint.read(folder)
    ranks = checkpoint.role == "ranking"
    own: dict[str, Any] = {"max_logprobs": -1, "logprobs_mode": "processed_logits"}
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=checkpoint.dtype,
        block_size=PAGE_TOKENS,
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        enable_chunked_prefill=checkpoint.causal,
        enable_prompt_embeds=checkpoint.tokens != "ids",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **({"runner": "pooling"} if ranks else own),
    )
    prompts = torch.load(work / "prompts.pt")
    candidates = json.loads((work / "candidates.json").read_text())
    for _ in range(2):
        found = rank(llm, prompts, candidates) if ranks else retrieve(llm, prompts)
    (work / "found.json").write_text(json.dumps(found))


def retrieve(llm: Any, prompts: Any) -> list[Any]:
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    of_first = [output.outputs[0].logprobs[0] for output in outputs]
    return [
        [[[item, entry.logprob] for item, entry in found.items()], output.num_cached_tokens]
        for found, output in zip(of_first, outputs, strict=True)
    ]


def rank(llm: Any, prompts: Any, candidates: list[int]) -> list[Any]:
    from vllm import PoolingParams

    from gr_vllm.worker.pooling import CANDIDATES, TASK

    parameters = [
        PoolingParams(task=TASK, skip_reading_prefix_cache=False, extra_kwargs={CANDIDATES: count})
        for count in candidates
    ]
    outputs = llm.encode(prompts, pooling_params=parameters, pooling_task=TASK, use_tqdm=False)
    return [[output.outputs.data.tolist(), output.num_cached_tokens] for output in outputs]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
