"""Random stacks and requests of every kind, memory for blocks, and the equations as loops.

Shapes: T = N + C tokens, N of the history and C candidates, D model width, H heads, K columns of Q
and K per head, V columns of U and V per head, G groups, W = H·(K + V).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.stack import Gate, LayerWeights, Stack
from gr_kernels.ops.hstu_stack.interface import BLOCK_TOKENS, HSTUStack, Rows, Segment

GATES: tuple[Gate, ...] = ("u*norm(a)", "u,norm(a),u*norm(a)", "u,a,u*norm(a)", "norm(a*u)")


def random_stack(
    seed: int = 0,
    *,
    layers: int = 2,
    d_model: int = 24,
    num_heads: int = 2,
    d_qk: int = 16,
    d_v: int = 16,
    gate: Gate = "u,a,u*norm(a)",
    projection_silu: str = "u",
    head_norm: bool = False,
    groups: int = 1,
    biases: bool = True,
    affine: bool = True,
    positions: int = 0,
    time_buckets: int = 0,
    divisor: float = 20.0,
) -> Stack:
    """Weights such that every part matters: attention, gate and residual are of one magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale + around

    f, k = num_heads * d_v, num_heads * d_qk
    wide = f * (3 if gate.count(",") else 1)
    return Stack(
        d_model=d_model,
        num_heads=num_heads,
        d_qk=d_qk,
        d_v=d_v,
        alpha=d_qk**-0.5,
        divisor=divisor,
        norm_eps=1e-6,
        projection_silu=projection_silu,  # type: ignore[arg-type]
        gate=gate,
        head_norm=head_norm,
        groups=groups,
        layers=[
            LayerWeights(
                input_norm_weight=normal(groups, d_model, scale=0.3, around=1) if affine else None,
                input_norm_bias=normal(groups, d_model, scale=0.3) if affine else None,
                uvqk_weight=normal(2 * f + 2 * k, d_model, scale=d_model**-0.5),
                uvqk_bias=normal(2 * f + 2 * k, scale=0.3) if biases else None,
                attention_norm_weight=normal(groups, f, scale=0.3, around=1) if affine else None,
                attention_norm_bias=normal(groups, f, scale=0.3) if affine else None,
                output_weight=normal(d_model, wide, scale=wide**-0.5),
                output_bias=normal(d_model, scale=0.3) if biases else None,
                position_bias=normal(2 * positions - 1) if positions else None,
                time_bias=normal(time_buckets) if time_buckets else None,
            )
            for _ in range(layers)
        ],
    )


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens of a history, then of candidates, as the stack sees them."""

    x_TD: Tensor
    """float64."""
    history: int
    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    groups: npt.NDArray[np.uint8] | None
    times: npt.NDArray[np.int64] | None
    next_times: npt.NDArray[np.int64] | None

    @property
    def candidates(self) -> int:
        return len(self.low) - self.history

    def segment(
        self, blocks: npt.NDArray[np.uintp], start: int, stop: int, rows: Rows = Rows.ALL
    ) -> Segment:
        """The tokens ``start`` to ``stop - 1``, those before them being in the blocks."""
        n = self.history
        cached, keys = min(start, n), min(stop, n)
        times = None
        if self.times is not None:
            times = np.concatenate([self.times[:keys], self.times[max(start, n) : stop]])
        return Segment(
            blocks=blocks,
            cached=cached,
            new=keys - cached,
            candidates=max(0, stop - max(start, n)),
            low=self.low[start:stop],
            high=self.high[start:stop],
            groups=None if self.groups is None else self.groups[start:stop],
            times=times,
            next_times=None if self.next_times is None else self.next_times[start:stop],
            rows=rows,
        )

    def cuts(self) -> list[int]:
        """Where the tokens may be split: no token before sees one from there on."""
        n = self.history
        return [
            at
            for at in range(1, n + self.candidates)
            if at >= n or int(self.high[:at].max(initial=0)) <= at
        ]


def random_request(
    stack: Stack, seed: int, history: int, candidates: int, *, kind: str = "causal"
) -> Request:
    """A request whose masks are of the ``kind``: causal, window, prefix or arbitrary."""
    rng = np.random.default_rng(seed)
    total = history + candidates
    position = np.minimum(np.arange(total), history)
    low = np.zeros(total, np.int64)
    high = position.copy()
    if kind == "window":
        low = np.maximum(position - int(rng.integers(1, 50)), 0)
    elif kind == "prefix":
        prefix = min(int(rng.integers(1, 4)), history)
        high[:prefix] = history
    elif kind == "arbitrary":
        low = rng.integers(0, history + 1, total)
        high = rng.integers(0, history + 1, total)
    else:
        assert kind == "causal"
    has_times = stack.layers[0].time_bias is not None
    times = np.sort(rng.integers(0, 10**7, total)) + 1_600_000_000
    return Request(
        x_TD=torch.from_numpy(rng.normal(size=(total, stack.d_model))),
        history=history,
        low=low.astype(np.int32),
        high=high.astype(np.int32),
        groups=rng.integers(0, stack.groups, total, np.uint8) if stack.groups > 1 else None,
        times=times if has_times else None,
        next_times=times + rng.integers(0, 10**5, total) if has_times else None,
    )


class Blocks:
    """Memory for blocks, every byte of it 0xFF: NaN in each format. It lives as long as this."""

    def __init__(self, stack: HSTUStack) -> None:
        self._bytes = -(-stack.block_bytes // 64) * 64
        self._memory: list[npt.NDArray[np.uint8]] = []

    def of(self, tokens: int) -> npt.NDArray[np.uintp]:
        """Addresses of blocks for so many tokens, in no order."""
        count = -(-tokens // BLOCK_TOKENS)
        memory = np.full(count * self._bytes + 64, 0xFF, np.uint8)
        self._memory.append(memory)
        first = -(-memory.ctypes.data // 64) * 64
        order = np.random.default_rng(len(self._memory)).permutation(count)
        return (first + order * self._bytes).astype(np.uintp)


def run_whole(
    stack: HSTUStack, request: Request, dtype: torch.dtype = torch.float32, rows: Rows = Rows.ALL
) -> Tensor:
    """All rows of a request computed at once, (T, D)."""
    x_TD = request.x_TD.to(dtype, copy=True)
    blocks = Blocks(stack)
    segment = request.segment(blocks.of(request.history), 0, len(x_TD), rows)
    stack.run(x_TD, [segment])
    return x_TD


def equations(stack: Stack, request: Request) -> Tensor:
    """The stack's output (T, D) float64 as a textbook would compute it, token after token."""
    n, total = request.history, len(request.low)
    x = request.x_TD.numpy().copy()
    seen = [sorted({*range(int(request.low[i]), int(request.high[i])), i}) for i in range(total)]
    for weights in stack.layers:
        x = np.stack(_layer(stack, weights, request, x, seen, n)) if total else x
    return torch.from_numpy(x)


def _layer(
    stack: Stack,
    weights: LayerWeights,
    request: Request,
    x: npt.NDArray[np.float64],
    seen: Sequence[Sequence[int]],
    n: int,
) -> list[npt.NDArray[np.float64]]:
    heads, d_qk, d_v = stack.num_heads, stack.d_qk, stack.d_v
    f, k = heads * d_v, heads * d_qk
    group = np.zeros(len(x), int) if request.groups is None else request.groups
    tokens = []
    for i in range(len(x)):
        normed = _norm(
            x[i], weights.input_norm_weight, weights.input_norm_bias, group[i], 1, stack.norm_eps
        )
        projected = _array(weights.uvqk_weight) @ normed
        if weights.uvqk_bias is not None:
            projected = projected + _array(weights.uvqk_bias)
        if stack.projection_silu == "all":
            projected = _silu(projected)
        u, v, q, key = np.split(projected, np.cumsum([f, f, k]))
        if stack.projection_silu == "u":
            u = _silu(u)
        tokens.append((u, v.reshape(heads, d_v), q.reshape(heads, d_qk), key.reshape(heads, d_qk)))
    rows = []
    for i, (u, _, q, _) in enumerate(tokens):
        a = np.zeros((heads, d_v))
        for j in seen[i]:
            _, v, _, key = tokens[j]
            for h in range(heads):
                score = stack.alpha * (q[h] @ key[h]) + _bias(weights, request, i, j, n)
                a[h] += _silu(score) / stack.divisor * v[h]
        rows.append(_output(stack, weights, x[i], u, a.reshape(-1), group[i]))
    return rows


def _output(
    stack: Stack,
    weights: LayerWeights,
    x: npt.NDArray[np.float64],
    u: npt.NDArray[np.float64],
    a: npt.NDArray[np.float64],
    group: int,
) -> npt.NDArray[np.float64]:
    def norm(value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return _norm(
            value,
            weights.attention_norm_weight,
            weights.attention_norm_bias,
            group,
            stack.num_heads if stack.head_norm else 1,
            stack.norm_eps,
        )

    gated = {
        "u*norm(a)": lambda: u * norm(a),
        "u,norm(a),u*norm(a)": lambda: np.concatenate([u, norm(a), u * norm(a)]),
        "u,a,u*norm(a)": lambda: np.concatenate([u, a, u * norm(a)]),
        "norm(a*u)": lambda: norm(a * u),
    }[stack.gate]()
    output = _array(weights.output_weight) @ gated
    if weights.output_bias is not None:
        output = output + _array(weights.output_bias)
    return x + output


def _bias(weights: LayerWeights, request: Request, i: int, j: int, n: int) -> float:
    total = 0.0
    if weights.position_bias is not None:
        positions = (len(weights.position_bias) + 1) // 2
        total += float(weights.position_bias[min(j, n) - min(i, n) + positions - 1])
    if weights.time_bias is not None:
        assert request.times is not None
        assert request.next_times is not None
        # In float32, like the public code: at the edge of a bucket rounding decides.
        elapsed = torch.tensor(max(abs(int(request.next_times[i] - request.times[j])), 1)).float()
        bucket = int(elapsed.log() / 0.301)
        total += float(weights.time_bias[min(bucket, len(weights.time_bias) - 1)])
    return total


def _norm(
    x: npt.NDArray[np.float64],
    weight: Tensor | None,
    bias: Tensor | None,
    group: int,
    parts: int,
    eps: float,
) -> npt.NDArray[np.float64]:
    normed = np.concatenate(
        [(part - part.mean()) / math.sqrt(part.var() + eps) for part in np.split(x, parts)]
    )
    if weight is not None:
        normed = normed * _array(weight)[group]
    if bias is not None:
        normed = normed + _array(bias)[group]
    return normed


def _silu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def _array(tensor: Tensor) -> npt.NDArray[np.float64]:
    return tensor.double().numpy()
