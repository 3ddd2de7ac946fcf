"""The public code's outputs, and HSTU attention against loops over pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gr_hstu.config import HSTUConfig
from gr_hstu.importers import meta_ranking, meta_research
from gr_hstu.models import HSTURetrieval
from gr_hstu.modules.attention import hstu_attention
from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.masks import HSTUTokens, candidate_tokens, history_tokens, hstu_mask

REFERENCE = Path(__file__).parents[4] / "shared" / "reference"
TOLERANCE = 1e-5

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference outputs (../shared/reference) are not here"
)


@needs_reference
def test_research_checkpoint_gives_the_public_outputs() -> None:
    imported = meta_research.import_checkpoint(REFERENCE / "research_bias.ckpt", num_heads=3)
    model = HSTURetrieval(imported.config).eval()
    model.load_state_dict(imported.state_dict)
    expected = np.load(REFERENCE / "research_bias.npz")
    inputs = {name: torch.from_numpy(expected[name]) for name in ("ids", "timestamps", "lengths")}
    with torch.no_grad():
        user_BD = model(
            inputs["ids"],
            inputs["timestamps"],
            inputs["lengths"],
            torch.from_numpy(expected["request_time"]),
        )
        scores_BN = user_BD @ model.item_embeddings()[1:].T
        all_ids = torch.arange(1, 401).expand(len(user_BD), -1)
        torch.testing.assert_close(model.score(user_BD, all_ids), scores_BN)

    assert imported.item_count == 400
    assert imported.max_history == 40
    np.testing.assert_allclose(user_BD, expected["user"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores_BN, expected["scores"], rtol=0, atol=TOLERANCE)
    top = scores_BN.topk(20)
    np.testing.assert_array_equal(top.indices + 1, expected["top_ids"])
    np.testing.assert_allclose(top.values, expected["top_scores"], rtol=0, atol=TOLERANCE)


@needs_reference
def test_ranking_stack_gives_the_public_outputs() -> None:
    imported = meta_ranking.import_checkpoint(
        REFERENCE / "ranking.pt", max_seq_len=256, num_heads=4
    )
    stack = HSTUStack(imported.config).eval()
    stack.load_state_dict(imported.state_dict)
    expected = np.load(REFERENCE / "ranking.npz")
    history_B, targets_B = (torch.from_numpy(expected[name]) for name in ("history", "targets"))
    # From the jagged layout (all users in a row) to ours (padded history, padded candidates).
    longest, most = int(history_B.max()), int(targets_B.max())
    places = [
        list(range(n)) + list(range(longest, longest + t))
        for n, t in zip(history_B.tolist(), targets_B.tolist(), strict=True)
    ]
    x_BTD = torch.zeros(len(places), longest + most, 48)
    jagged = torch.from_numpy(expected["x"]).split([len(p) for p in places])
    for row, place, x in zip(x_BTD, places, jagged, strict=True):
        row[place] = x
    ids = torch.zeros(len(places), longest + most, dtype=torch.int64)
    history = history_tokens(0, ids[:, :longest], history_B, contextual=False)
    targets = candidate_tokens(0, ids[:, longest:], targets_B, history_B, contextual=False)
    tokens = HSTUTokens(*(torch.cat(parts, 1) for parts in zip(history, targets, strict=True)))
    with torch.no_grad():
        y_BTD, _, _ = stack(x_BTD, hstu_mask(tokens, tokens))
    found = torch.cat([row[place] for row, place in zip(y_BTD, places, strict=True)])
    np.testing.assert_allclose(found, expected["y"], rtol=0, atol=TOLERANCE)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_against_loops(with_bias: bool) -> None:
    torch.manual_seed(0)
    batch, queries, keys, heads, qk, v = 2, 3, 5, 2, 4, 3
    q, k = torch.randn(batch, queries, heads, qk), torch.randn(batch, keys, heads, qk)
    values = torch.randn(batch, keys, heads, v)
    mask = torch.rand(batch, queries, keys) < 0.6
    bias = torch.randn(batch, queries, keys) if with_bias else None
    found = hstu_attention(q, k, values, mask, alpha=0.7, divisor=9, bias_BTS=bias)
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                total = [0.0] * v
                for s in range(keys):
                    if not mask[b, t, s]:
                        continue
                    dot = sum(float(q[b, t, h, i]) * float(k[b, s, h, i]) for i in range(qk))
                    score = dot * 0.7 + (float(bias[b, t, s]) if bias is not None else 0.0)
                    for i in range(v):
                        total[i] += silu(score) / 9 * float(values[b, s, h, i])
                torch.testing.assert_close(
                    found[b, t, h], torch.tensor(total), rtol=1e-5, atol=1e-6
                )


def naive_normalize(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return [(value - mean) / math.sqrt(variance + 1e-6) for value in x]


def test_research_model_against_loops() -> None:
    """One history through the published equations, written in scalars."""
    torch.manual_seed(1)
    config = HSTUConfig(
        variant="research",
        num_items=9,
        d_model=4,
        num_layers=2,
        num_heads=2,
        d_qk=3,
        d_v=2,
        max_seq_len=8,
    )
    model = HSTURetrieval(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    items, times, request = [3, 9, 1, 3], [1000, 1010, 5000, 90_000], 90_400
    with torch.no_grad():
        found = model.encode_all(
            torch.tensor([items]), torch.tensor([times]), torch.tensor([4]), torch.tensor([request])
        )[0]

    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    x = [
        [
            2 * weights["items.weight"][item][i] + weights["positions.weight"][position][i]
            for i in range(4)
        ]
        for position, item in enumerate(items)
    ]
    following = [*times[1:], request]
    for layer in range(2):
        name = f"stack.layers.{layer}."
        projected = [
            [
                silu(sum(w * value for w, value in zip(row, naive_normalize(token), strict=True)))
                for row in weights[name + "uvqk.weight"]
            ]
            for token in x
        ]
        outputs = []
        for i, token in enumerate(x):
            attended = []
            for head in range(2):
                q = projected[i][8 + 3 * head : 11 + 3 * head]
                total = [0.0, 0.0]
                for j in range(i + 1):
                    k = projected[j][14 + 3 * head : 17 + 3 * head]
                    v = projected[j][4 + 2 * head : 6 + 2 * head]
                    bucket = int(math.log(max(abs(following[i] - times[j]), 1)) / 0.301)
                    bias = (
                        weights[name + "relative_bias.position_weight"][8 - 1 + j - i]
                        + weights[name + "relative_bias.time_weight"][min(bucket, 128)]
                    )
                    weight = silu(sum(a * b for a, b in zip(q, k, strict=True)) + bias) / 8
                    total = [t + weight * value for t, value in zip(total, v, strict=True)]
                attended += total
            gated = [
                u * a for u, a in zip(projected[i][:4], naive_normalize(attended), strict=True)
            ]
            outputs.append(
                [
                    sum(w * value for w, value in zip(row, gated, strict=True)) + bias + residual
                    for row, bias, residual in zip(
                        weights[name + "output.weight"],
                        weights[name + "output.bias"],
                        token,
                        strict=True,
                    )
                ]
            )
        x = outputs
    expected = torch.tensor(x)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
