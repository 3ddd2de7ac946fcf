"""Weights as integers: what is read back is within half a step, in the format that is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr_vllm.quantization import GROUP, Quantization, dequantize, quantize, shapes

NAMES = {torch.float32: "F32", torch.int8: "I8", torch.int32: "I32"}
ALL: tuple[Quantization, ...] = ("none", "int8", "awq", "gptq")


def random_weight(seed: int, outputs: int, inputs: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) + offset
    # Rows of very different sizes, one of zeros.
    weight *= torch.logspace(-3, 3, outputs)[:, None]
    weight[0] = 0
    return weight


def step(quantization: Quantization, weight: torch.Tensor) -> torch.Tensor:
    """The distance between numbers that can be said, for each entry of a weight."""
    if quantization == "int8":
        return (weight.abs().amax(1, keepdim=True) / 127).expand_as(weight)
    groups = weight.reshape(len(weight), -1, GROUP)
    if quantization == "awq":
        size = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
        return (size / 15)[..., None].expand_as(groups).reshape(weight.shape)
    return (groups.abs().amax(2) / 7)[..., None].expand_as(groups).reshape(weight.shape)


@given(
    quantization=st.sampled_from(ALL),
    seed=st.integers(0, 99),
    outputs=st.sampled_from([32, 64, 96]),
    inputs=st.sampled_from([32, 128]),
    offset=st.sampled_from([0.0, 2.0, -5.0]),
)
def test_within_half_a_step(
    quantization: Quantization, seed: int, outputs: int, inputs: int, offset: float
):
    weight = random_weight(seed, outputs, inputs, offset)
    tensors = quantize(quantization, weight)
    found = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    assert found == shapes(quantization, outputs, inputs)
    again = dequantize(quantization, tensors)
    assert again.shape == weight.shape
    if quantization == "none":
        assert torch.equal(again, weight)
        return
    # In AWQ, the place of zero is rounded too.
    allowed = (1.0 if quantization == "awq" else 0.5) * step(quantization, weight)
    assert ((again - weight).abs() <= allowed * 1.001 + 1e-9).all()
    assert (again[0] == 0).all()


@pytest.mark.parametrize("quantization", ["awq", "gptq"])
def test_the_order_of_the_bits_is_the_formats(quantization: Quantization):
    """By the formats' own words: AWQ interleaves 8 outputs, GPTQ stacks 8 inputs."""
    whole = torch.arange(32 * 32).view(32, 32) % 16  # (inputs, outputs)
    scale = 0.5
    zero = 8
    weight = ((whole - zero) * scale).T
    # Each group must have both ends, so that the scale comes out as it is here.
    weight[:, 0], weight[:, 1] = -8 * scale, 7 * scale
    whole[0], whole[1] = 0, 15
    if quantization == "gptq":
        weight = weight.clamp(min=-7 * scale)
        whole = whole.clamp(min=1)
    tensors = quantize(quantization, weight)
    torch.testing.assert_close(tensors["scales"], torch.full((1, 32), scale))
    packed = tensors["qweight"].long() & 0xFFFFFFFF
    if quantization == "awq":
        for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            nibble = (packed >> (4 * place)) & 15
            assert torch.equal(nibble, whole[:, column::8])
        assert (tensors["qzeros"] == (0x88888888 - 2**32)).all()
    else:
        for place in range(8):
            assert torch.equal((packed >> (4 * place)) & 15, whole[place::8])
        assert (tensors["qzeros"] == 0x77777777).all()
