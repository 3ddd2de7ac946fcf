"""vLLM in this process, on small models with random weights, beside the float32 reference.

Its processes are left out (`VLLM_ENABLE_V1_MULTIPROCESSING`), everything else is the real thing:
scheduler, blocks, prefix cache, samplers, pooling runner.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr_core import History, RecommendRequest, Task
from gr_core.collate import collate
from gr_core.contracts import Artifact, EncodedRequest, ExportOptions, InferenceResult
from gr_core.parity import retrieval_error, score_error
from gr_core.types import FloatArray, IntArray
from gr_hstu import testing
from gr_hstu.config import HSTUConfig, MTGRConfig
from gr_hstu.features import FeatureSchema
from gr_hstu.model import HSTUModel
from gr_hstu.semantic_ids import SemanticIdModel

Model = HSTUModel | SemanticIdModel
BLOCK = 32
LONGEST = 150
"""Behaviours of the longest history: several blocks."""


# ── Models ────────────────────────────────────────────────────────────────────────────────────


def write_model(folder: Path, kind: str, name: str = "", seed: int = 0, **changes: Any) -> Model:
    """A model of a kind of `gr_hstu.testing`, of longer histories; ``changes`` of its config."""
    if kind == testing.SID:
        return _write_generative(folder, **changes)
    config = dataclasses.replace(testing.CONFIGS[kind], max_seq_len=LONGEST + 10, **changes)
    module = testing.random_module(config, seed)
    facts: dict[str, Any] = {
        "name": name or kind,
        "config": config.to_dict(),
        "features": _schema(config).to_dict(),
        "state": module.state_dict(),
    }
    return testing.load(testing.write(folder, kind, **facts))


def _schema(config: HSTUConfig | MTGRConfig) -> FeatureSchema:
    research = isinstance(config, HSTUConfig) and config.variant == "research"
    schema = testing.SCHEMA if research else testing.FULL_SCHEMA
    signals = schema.signals if config.signal_cardinalities else ()
    return dataclasses.replace(schema, max_history=LONGEST, truncate_step=10, signals=signals)


def _write_generative(folder: Path, **changes: Any) -> SemanticIdModel:
    config = dataclasses.replace(testing.SID_CONFIG, max_behaviours=LONGEST // 3, **changes)
    schema = dataclasses.replace(testing.SID_SCHEMA, max_history=LONGEST // 3)
    state = testing.random_module(config).state_dict()
    facts = {"config": config.to_dict(), "features": schema.to_dict(), "state": state}
    return testing.load_sid(testing.write(folder, testing.SID, **facts))


def task_of(model: Model) -> Task:
    """What vLLM does for the model."""
    found: Task = next(
        task for task in (Task.GENERATE, Task.RETRIEVE, Task.RANK) if task in model.tasks
    )
    return found


def encoded(
    model: Model, seed: int, length: int, *, first: int | None = None, k: int = 50, **fields: Any
) -> EncodedRequest:
    """A request of `gr_hstu.testing`; of its history, only the ``first`` behaviours."""
    request = testing.a_request(seed, length, **fields)
    if first is not None:
        request = dataclasses.replace(request, history=_first(request.history, first))
    return testing.encode(model, task_of(model), request, k)


def _first(history: History, count: int) -> History:
    signals = {name: values[:count] for name, values in history.signals.items()}
    return History(history.item_ids[:count], history.timestamps_ms[:count], signals)


def reference(model: Model, requests: Sequence[EncodedRequest]) -> list[InferenceResult]:
    """By the engine ``torch``, one request at a time; of retrieval, all items."""
    engine = testing.engine_of(model)
    everything = len(model.catalogue)
    alone = [dataclasses.replace(request, k=everything) for request in requests]
    return [engine.infer([request])[0] for request in alone]


def log_probs(model: SemanticIdModel, request: EncodedRequest, tokens: list[int]) -> torch.Tensor:
    """Of all tokens of the level after ``tokens``, computed from scratch."""
    arrays = collate(model.inputs(request.task), [request])
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found: torch.Tensor = model.module(request.task)(
        **inputs, prefixes=torch.tensor([tokens], dtype=torch.int64)
    )
    return found[0]


# ── vLLM ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answer:
    result: InferenceResult
    cached: int
    """Tokens whose K and V were found."""


class InProcess:
    """vLLM's LLM on an exported model."""

    def __init__(self, folder: Path, model: Model, **options: Any) -> None:
        from vllm import LLM

        from gr_vllm.checkpoint import Checkpoint
        from gr_vllm.prompts import Prompts

        self.model = model
        self.checkpoint = Checkpoint.read(folder)
        self.prompts = Prompts(self.checkpoint, model)
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": self.checkpoint.dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 512,
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 64 << 20,
            "enable_prefix_caching": True,
            "enable_chunked_prefill": self.checkpoint.causal,
            "enable_prompt_embeds": self.checkpoint.tokens != "ids",
            "disable_log_stats": False,
            "seed": 0,
        }
        if self.checkpoint.role == "ranking":
            arguments["runner"] = "pooling"
        else:
            arguments |= {"max_logprobs": -1, "logprobs_mode": "processed_logits"}
        # vLLM collects garbage several times as it starts and ends; what there is now stays.
        gc.freeze()
        self.llm = LLM(**(arguments | options))

    def prompt(self, request: EncodedRequest) -> Any:
        prompt = dict(self.prompts.prompt(request, self.model.sequence(request)))
        prompt.pop("type")  # which only the front end that we go round asks for
        return prompt

    def infer(self, requests: Sequence[EncodedRequest]) -> list[Answer]:
        """All in one call, so that the scheduler batches them."""
        if self.checkpoint.role == "ranking":
            return self._rank(requests)
        return self._retrieve(requests)

    def _retrieve(self, requests: Sequence[EncodedRequest]) -> list[Answer]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [self.prompt(request) for request in requests],
            [
                SamplingParams(max_tokens=1, temperature=0, logprobs=r.k, detokenize=False)
                for r in requests
            ],
            use_tqdm=False,
        )
        answers = []
        for request, output in zip(requests, outputs, strict=True):
            of_first = output.outputs[0].logprobs[0]
            scores = {item: entry.logprob for item, entry in of_first.items()}
            best = sorted(scores, key=lambda item: (-scores[item], item))[: request.k]
            result = InferenceResult(
                np.array([scores[item] for item in best], np.float32), np.array(best, np.int64)
            )
            answers.append(Answer(result, output.num_cached_tokens))
        return answers

    def _rank(self, requests: Sequence[EncodedRequest]) -> list[Answer]:
        answers = []
        for request, (rows, cached) in zip(requests, self.rows(requests), strict=True):
            (scores,) = self.model.outputs(Task.RANK, [request], rows.float())
            answers.append(Answer(InferenceResult(scores.numpy()), cached))
        return answers

    def rows(self, requests: Sequence[EncodedRequest]) -> list[tuple[torch.Tensor, int]]:
        """Of the candidates of each request, (C, D), and the tokens that were cached."""
        from vllm import PoolingParams

        from gr_vllm.worker.pooling import CANDIDATES, TASK

        parameters = [
            PoolingParams(
                task=TASK,
                skip_reading_prefix_cache=False,
                extra_kwargs={CANDIDATES: self.model.sequence(request).candidates},
            )
            for request in requests
        ]
        outputs = self.llm.encode(
            [self.prompt(request) for request in requests],
            pooling_params=parameters,
            pooling_task=TASK,
            use_tqdm=False,
        )
        return [(output.outputs.data, output.num_cached_tokens) for output in outputs]

    def count(self, name: str) -> int:
        """A counter of vLLM, e.g. ``num_preemptions``, since the process began."""
        found = [m for m in self.llm.get_metrics() if m.name == f"vllm:{name}"]
        return sum(int(metric.value) for metric in found)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.freeze()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def export(
    model: Model, folder: Path, dtype: str = "float32", quantization: str = "", device: str = "cpu"
) -> Path:
    """A model directory in a new folder within ``folder``."""
    from gr_vllm.export.exporter import VllmExporter

    out = folder / f"{model.bundle.name}-{dtype}{quantization}"
    out.mkdir()
    extra = {"quantization": quantization} if quantization else {}
    options = ExportOptions(device, dtype, extra)
    VllmExporter().export(Artifact("torch", model.bundle.path), model, out, options)
    return out


# ── Comparing ─────────────────────────────────────────────────────────────────────────────────


def worst_error(
    requests: Sequence[EncodedRequest], answers: Sequence[Answer], right: Sequence[InferenceResult]
) -> float:
    """The largest of `gr_core.parity`'s errors; a wrong or missing item counts, and so does NaN."""
    worst = 0.0
    for request, answer, expected in zip(requests, answers, right, strict=True):
        found = answer.result
        if not np.isfinite(found.scores).all():
            return float("inf")
        if found.indices is None:
            error = score_error(found.scores, expected.scores)
        else:
            error = _retrieval_error(found.indices, found.scores, expected, request.k)
        worst = max(worst, error)
    return worst


def _retrieval_error(
    indices: IntArray, scores: FloatArray, expected: InferenceResult, k: int
) -> float:
    assert expected.indices is not None
    return retrieval_error(indices, scores, expected.indices, expected.scores, k)[0]


def with_behaviour(request: RecommendRequest, place: int, **changes: Any) -> RecommendRequest:
    """The same request, but for one thing about one behaviour: ``item``, ``time_ms``, a signal."""
    history = request.history
    items, times = history.item_ids.copy(), history.timestamps_ms.copy()
    signals = {name: values.copy() for name, values in history.signals.items()}
    for name, value in changes.items():
        column = {"item": items, "time_ms": times}.get(name)
        (signals[name] if column is None else column)[place] = value
    return dataclasses.replace(request, history=History(items, times, signals))
