"""Options of the engine: each wrong one is explained; exporter and engine share one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gr_core.errors import PlanError
from gr_vllm.checkpoint import FORMAT_VERSION, Checkpoint, Layers
from gr_vllm.engine.engine import EXPORT_OPTIONS
from gr_vllm.engine.options import Sizes, VllmOptions
from gr_vllm.engine.start import arguments, variables
from gr_vllm.export.exporter import ENGINE_OPTIONS
from gr_vllm.export.options import ExportSettings
from gr_vllm.worker.kernels import PAGE_TOKENS, paged_attention

RETRIEVAL = Checkpoint(
    format_version=FORMAT_VERSION,
    role="retrieval",
    tokens="ids",
    name="small",
    version="1",
    identity="00",
    dtype="float32",
    quantization="none",
    layers=Layers(
        d_model=16,
        num_layers=2,
        num_heads=4,
        d_qk=4,
        d_v=6,
        alpha=0.5,
        divisor=32.0,
        norm_eps=1e-6,
        projection_silu="all",
        gate="u*norm(a)",
        head_norm=False,
        groups=1,
        norms=False,
        projection_bias=True,
        output_bias=True,
        positions=0,
        time_buckets=0,
    ),
    tables=(61,),
    places=32,
    answers=61,
    readout_norm="l2",
    readout_eps=1e-6,
    levels=(),
    max_history=100,
    causal=True,
)
RANKING = replace(RETRIEVAL, role="ranking", tokens="rows", tables=(), answers=0)
GENERATION = replace(RETRIEVAL, role="generation", levels=((1, 20), (20, 40), (40, 61)))


def sizes(checkpoint: Checkpoint = RETRIEVAL, device: str = "cpu", **options: Any) -> Sizes:
    return Sizes.of(VllmOptions.of(options), checkpoint, device)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tensor_parallel": 2}, "has no option 'tensor_parallel'; there are: .*tensor_parallel_s"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; expected a whole number from 1"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size is 1.5; expected a whole number"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True; expected a whole number"),
        ({"max_model_len": -1}, "max_model_len is -1; expected a whole number from 0 on"),
        ({"max_model_len": "2k"}, "max_model_len is '2k'; expected a whole number"),
        ({"max_candidates": 0}, "max_candidates is 0; expected a whole number from 1 on"),
        ({"max_num_batched_tokens": 31}, "max_num_batched_tokens is 31; .* from 32 on"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; expected a whole number from 1 on"),
        (
            {"max_num_batched_tokens": 64, "max_num_seqs": 65},
            "max_num_batched_tokens is 64; expected at least max_num_seqs, 65",
        ),
        ({"kv_cache_bytes": "1 GiB"}, "kv_cache_bytes is '1 GiB'; expected a whole number"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0; expected a part above 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1; .* at most 1"),
        ({"gpu_memory_utilization": "all"}, "gpu_memory_utilization is 'all'; expected a part"),
        ({"prefix_caching": 1}, "prefix_caching is 1; expected true or false"),
        ({"restart": "no"}, "restart is 'no'; expected true or false"),
    ],
)
def test_wrong_ones(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^engine vllm.*{message}"):
        VllmOptions.of(extra, foreign=EXPORT_OPTIONS)


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (
            RETRIEVAL,
            {"tensor_parallel_size": 3},
            "tensor_parallel_size is 3; expected a divisor of the 4 heads of small",
        ),
        (RETRIEVAL, {"max_model_len": 100}, "max_model_len is 100; expected at least 101"),
        (GENERATION, {"max_model_len": 103}, "max_model_len is 103; expected at least 104"),
        (
            RANKING,
            {"max_model_len": 300, "max_candidates": 200},
            "max_model_len is 300; expected at least 301.*max_candidates makes it smaller",
        ),
        (RETRIEVAL, {"kv_cache_bytes": 1}, "kv_cache_bytes is 1; expected at least [0-9]+, for"),
    ],
)
def test_those_that_do_not_fit_the_model(
    checkpoint: Checkpoint, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=f"^engine vllm: option {message}"):
        sizes(checkpoint, **options)


def test_what_they_come_to() -> None:
    assert sizes().max_model_len == 101
    assert sizes(GENERATION).max_model_len == 104
    assert sizes(RANKING, max_candidates=50).max_model_len == 151
    assert sizes(max_model_len=512).max_model_len == 512
    assert sizes().kv_cache_bytes == 2**30
    assert sizes(device="cuda").kv_cache_bytes == 0  # what gpu_memory_utilization leaves
    assert sizes(device="cuda", kv_cache_bytes=2**28).kv_cache_bytes == 2**28


def test_what_sees_later_tokens_is_not_computed_in_chunks() -> None:
    few = {"max_num_batched_tokens": 32, "max_num_seqs": 8}
    assert sizes(RANKING, **few).chunked
    assert sizes(RANKING, **few).max_num_batched_tokens == 32
    whole = sizes(replace(RANKING, causal=False), max_candidates=50, **few)
    assert not whole.chunked
    assert whole.max_num_batched_tokens == 151


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_least_kv_cache_is_one_prompt(ranks: int) -> None:
    layers = RETRIEVAL.layers
    kernel = paged_attention(
        layers.num_heads // ranks,
        layers.d_qk,
        layers.d_v,
        torch.float32,
        layers.alpha,
        layers.divisor,
        "cpu",
    )
    pages = -(-101 // PAGE_TOKENS) + 1  # one is vLLM's own
    least = pages * layers.num_layers * kernel.page_bytes
    assert sizes(kv_cache_bytes=least, tensor_parallel_size=ranks).kv_cache_bytes == least
    with pytest.raises(
        PlanError, match=f"kv_cache_bytes is {least - 1}; expected at least {least}"
    ):
        sizes(kv_cache_bytes=least - 1, tensor_parallel_size=ranks)


def test_a_chain_has_one_table_of_options() -> None:
    """Each takes the other's, and says of a wrong name what both know."""
    table = {"quantization": "int8", "max_num_seqs": 7}
    assert VllmOptions.of(table, foreign=EXPORT_OPTIONS).max_num_seqs == 7
    assert ExportSettings.of(table, foreign=ENGINE_OPTIONS).quantization == "int8"
    messages = []
    for kind, foreign in ((VllmOptions, EXPORT_OPTIONS), (ExportSettings, ENGINE_OPTIONS)):
        with pytest.raises(PlanError, match="has no option 'quantisation'") as error:
            kind.of({"quantisation": "int8"}, foreign=foreign)
        messages.append(str(error.value).partition("there are: ")[2])
    assert messages[0] == messages[1]
    assert "quantization" in messages[0]


def said_to_vllm(checkpoint: Checkpoint, device: str, **options: Any) -> dict[str, Any]:
    own = VllmOptions.of(options)
    return arguments(Path("exported"), checkpoint, own, Sizes.of(own, checkpoint, device), device)


def test_what_vllm_is_told() -> None:
    found = said_to_vllm(RETRIEVAL, "cpu", max_num_seqs=7, prefix_caching=False)
    assert (found["runner"], found["dtype"], found["enable_prompt_embeds"]) == (
        "generate",
        "float32",
        False,
    )
    assert (found["max_num_seqs"], found["enable_prefix_caching"]) == (7, False)
    assert found["kv_cache_memory_bytes"] == 2**30
    assert "gpu_memory_utilization" not in found
    assert said_to_vllm(RANKING, "cpu")["runner"] == "pooling"


def test_what_vllm_is_told_of_gpus() -> None:
    found = said_to_vllm(RETRIEVAL, "cuda", gpu_memory_utilization=0.5)
    assert found["gpu_memory_utilization"] == 0.5
    assert not {"kv_cache_memory_bytes", "device_ids", "distributed_executor_backend"} & set(found)
    assert said_to_vllm(RETRIEVAL, "cuda:1")["device_ids"] == [1]
    assert said_to_vllm(RETRIEVAL, "cuda:2", tensor_parallel_size=2)["device_ids"] == [2, 3]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the configuration, else those of the environment, else all cores but one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    assert variables("cpu", 0, 1)["OMP_NUM_THREADS"] == "8"
    assert variables("cpu", 0, 4)["OMP_NUM_THREADS"] == "2"
    assert variables("cpu", 3, 1)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in variables("cpu", 0, 1)
    assert variables("cpu", 3, 1)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in variables("cuda", 3, 1)
