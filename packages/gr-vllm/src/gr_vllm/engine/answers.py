"""What is asked of vLLM for a request, and what its outputs mean: by the role of the checkpoint.

Shapes: C candidates, D model width, V answers, K items.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest, InferenceResult
from gr_core.generation import BeamSearch, CodeTrie, GenerativeModel, search_width
from gr_core.stack import StackModel
from gr_core.tokens import TokenModel
from gr_core.types import IntArray, Task
from gr_vllm.prompts import Prompt, Prompts

_numbers = itertools.count()


class Answers(Protocol):
    """Answers the requests of one checkpoint with an AsyncLLM."""

    async def answer(self, llm: Any, request: EncodedRequest) -> InferenceResult:
        """Raises `ValueError` for arrays that no request of this model has."""
        ...


@dataclass(frozen=True, slots=True)
class _Scores:
    """Of one sampled position: tokens, best first, and what the model gives them."""

    tokens: list[int]
    values: list[float]
    reused: int


async def _last(outputs: AsyncGenerator[Any, None]) -> Any:
    """The only output of a request, since final ones alone are asked for.

    Raises `ValueError` for what vLLM refuses before it computes.
    """
    from vllm.exceptions import VLLMClientError

    found = None
    try:
        async for output in outputs:
            found = output
    except VLLMClientError as error:
        raise ValueError(f"vLLM refuses it: {error}") from None
    assert found is not None
    return found


async def _sample(
    llm: Any, prompt: Prompt, count: int, allowed: list[int] | None = None
) -> _Scores:
    """The ``count`` best next tokens, of those that are allowed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=count,
        flat_logprobs=True,
        allowed_token_ids=allowed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    output = await _last(llm.generate(prompt, params, f"gr-{next(_numbers)}"))
    found = output.outputs[0].logprobs
    # The sampled token comes first, and once more in its place.
    return _Scores(found.token_ids[1:], found.logprobs[1:], output.num_cached_tokens or 0)


class Retrieval:
    """The top-k of one step. Given items are scored as the only ones allowed."""

    def __init__(self, model: TokenModel, prompts: Prompts) -> None:
        self._model = model
        self._prompts = prompts
        self._table = model.item_table()
        self._items = len(self._table) - 1

    async def answer(self, llm: Any, request: EncodedRequest) -> InferenceResult:
        sequence = self._model.sequence(request)
        wanted = None if request.task is Task.RETRIEVE else self._wanted(request)
        if not sequence.history:
            return await asyncio.to_thread(self._for_nobody, request)
        prompt = self._prompts.prompt(request, sequence)
        if wanted is None:
            best = await _sample(llm, prompt, min(request.k, self._items))
            return InferenceResult(
                np.array(best.values, np.float32), np.array(best.tokens, np.int64), best.reused
            )
        allowed = np.unique(wanted)
        scored = await _sample(llm, prompt, len(allowed), allowed.tolist())
        order = np.argsort(scored.tokens)
        by_id = np.array(scored.values, np.float32)[order]
        return InferenceResult(by_id[np.searchsorted(allowed, wanted), None], None, scored.reused)

    def _wanted(self, request: EncodedRequest) -> IntArray:
        """The items to score (C,)."""
        wanted = self._model.answer_ids(request)
        (wrong,) = ((wanted < 1) | (wanted > self._items)).nonzero()
        if len(wrong):
            raise ValueError(
                f"candidate {wrong[0]} is item {wanted[wrong[0]]}, expected 1 to {self._items}"
            )
        return wanted

    @torch.inference_mode()
    def _for_nobody(self, request: EncodedRequest) -> InferenceResult:
        """Without a history there is nothing that vLLM could compute."""
        (given,) = self._model.outputs(request.task, [request], _no_row(self._model, request.task))
        if request.task is not Task.RETRIEVE:
            return InferenceResult(given.reshape(len(given), -1).numpy())
        scores = self._table @ given
        scores[0] = float("-inf")
        values, places = torch.topk(scores, min(request.k, self._items))
        return InferenceResult(values.numpy(), places.numpy())


class Ranking:
    """The rows of the candidates, of which the model makes the heads' scores."""

    def __init__(self, model: StackModel, prompts: Prompts, max_candidates: int) -> None:
        self._model = model
        self._prompts = prompts
        self._max_candidates = max_candidates

    async def answer(self, llm: Any, request: EncodedRequest) -> InferenceResult:
        prompt, history, candidates = await asyncio.to_thread(self._prompt, request)
        step = self._max_candidates
        cuts = [slice(i, min(i + step, candidates)) for i in range(0, candidates, step)]
        # The first alone, so that the others find its history.
        parts = [await self._rows(llm, prompt, history, cuts[0])]
        parts += await asyncio.gather(*(self._rows(llm, prompt, history, cut) for cut in cuts[1:]))
        rows_CD = torch.cat([rows for rows, _ in parts])
        scores = await asyncio.to_thread(self._scores, request, rows_CD)
        return InferenceResult(scores, None, parts[0][1])

    def _prompt(self, request: EncodedRequest) -> tuple[Prompt, int, int]:
        sequence = self._model.sequence(request)
        return self._prompts.prompt(request, sequence), sequence.history, sequence.candidates

    async def _rows(self, llm: Any, prompt: Prompt, history: int, cut: slice) -> tuple[Tensor, int]:
        """Of some candidates (C, D), and how many tokens were reused."""
        from vllm import PoolingParams

        from gr_vllm.worker.pooling import CANDIDATES, TASK

        rows = prompt["prompt_embeds"]
        chosen = rows[history + cut.start : history + cut.stop]
        if len(chosen) < len(rows) - history:
            prompt = {**prompt, "prompt_embeds": torch.cat([rows[:history], chosen])}
        params = PoolingParams(
            task=TASK,
            extra_kwargs={CANDIDATES: len(chosen)},
            # What vLLM finds in its cache is only history, whose outputs nobody asks for.
            skip_reading_prefix_cache=False,
        )
        output = await _last(llm.encode(prompt, params, f"gr-{next(_numbers)}"))
        found: Tensor = output.outputs.data
        assert len(found) == len(chosen), (found.shape, len(chosen))
        return found, output.num_cached_tokens or 0

    @torch.inference_mode()
    def _scores(self, request: EncodedRequest, rows_CD: Tensor) -> Any:
        (scores,) = self._model.outputs(request.task, [request], rows_CD.float())
        return scores.numpy()


class Generation:
    """A beam search over the catalogue's codes: each prefix is a prompt behind the history's."""

    def __init__(self, model: GenerativeModel, prompts: Prompts) -> None:
        self._model = model
        self._prompts = prompts
        self._trie = CodeTrie(model.item_tokens(), model.levels)

    async def answer(self, llm: Any, request: EncodedRequest) -> InferenceResult:
        prompt = self._prompts.prompt(request, self._model.sequence(request))
        search = BeamSearch(self._trie, search_width(self._model.beam_width, request.k))
        reused = 0
        while not search.done:
            scored = await asyncio.gather(
                *(
                    self._extend(llm, prompt, prefix, allowed)
                    for prefix, allowed in zip(
                        search.prefixes.tolist(), search.allowed_by_prefix, strict=True
                    )
                )
            )
            if not search.level:
                reused = scored[0][1]
            search.advance(np.concatenate([values for values, _ in scored]))
        indices, scores = search.finish(request.k)
        return InferenceResult(scores, indices, reused)

    async def _extend(
        self, llm: Any, prompt: Prompt, prefix: Sequence[int], allowed: Any
    ) -> tuple[Any, int]:
        """Log-probabilities of the allowed tokens, in their order."""
        tokens = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *prefix]}
        scored = await _sample(llm, tokens, len(allowed), allowed.tolist())
        order = np.argsort(scored.tokens)
        return np.array(scored.values, np.float64)[order], scored.reused


def _no_row(model: StackModel, task: Task) -> Tensor:
    return torch.zeros(1, model.stack(task).d_model)


def answers(role: str, model: StackModel, prompts: Prompts, max_candidates: int) -> Answers:
    if role == "generation":
        assert isinstance(model, GenerativeModel)
        return Generation(model, prompts)
    if role == "retrieval":
        assert isinstance(model, TokenModel)
        return Retrieval(model, prompts)
    return Ranking(model, prompts, max_candidates)
