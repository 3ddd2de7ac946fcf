"""Models as stacks of HSTU layers: what an engine needs that runs the layers by itself.

A model of the HSTU family is three parts: tokens in (embeddings of behaviours, features and
candidates), a stack of layers whose attention is pointwise, heads out. A `StackModel` opens the
middle part, so that an engine can run it jagged, on cached K and V, with kernels of its own.

Shapes: T tokens, N tokens of the history (prefix features among them), C candidates, D model
width, H heads, K columns of Q and K per head, V columns of U and V per head, G groups of tokens
with norms of their own, W bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gr_core.contracts import EncodedRequest, TorchModel
from gr_core.types import Task

Gate = Literal["u*norm(a)", "u,norm(a),u*norm(a)", "u,a,u*norm(a)", "norm(a*u)"]
"""What a layer's output projection reads of U and the attention's output a."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer: contiguous float32 torch tensors on the CPU; None where it has none."""

    input_norm_weight: Any | None
    """(G, D)."""
    input_norm_bias: Any | None
    """(G, D)."""
    uvqk_weight: Any
    """(2·H·V + 2·H·K, D), rows in the order U, V, Q, K, head after head in each."""
    uvqk_bias: Any | None
    """(2·H·V + 2·H·K,)."""
    attention_norm_weight: Any | None
    """(G, H·V)."""
    attention_norm_bias: Any | None
    """(G, H·V)."""
    output_weight: Any
    """(D, m·H·V), m being 3 for the gates that concatenate."""
    output_bias: Any | None
    """(D,)."""
    position_bias: Any | None = None
    """(2·P - 1,), added to the score of query i and key j at j - i + P - 1."""
    time_bias: Any | None = None
    """(B,), added at min(floor(ln(max(|next_time_i - time_j|, 1)) / 0.301), B - 1)."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Y = X + output(gate(U, a)), a = SiLU(alpha·Q Kᵀ + bias)/divisor ⊙ mask · V, layer by layer.

    U, V, Q, K = uvqk(norm(X)), with SiLU applied to ``projection_silu`` of them. Who sees whom is
    a matter of the tokens, see `TokenSequence`.
    """

    d_model: int
    num_heads: int
    d_qk: int
    d_v: int
    alpha: float
    divisor: float
    norm_eps: float
    projection_silu: Literal["none", "u", "all"]
    gate: Gate
    head_norm: bool
    """Whether the attention's norm takes mean and variance of each head, not of all together."""
    groups: int
    """G; 1 where all tokens share their norms."""
    layers: Sequence[LayerWeights]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one request as the layers see them: those of the history, then candidates.

    Keys are the tokens of the history. Token i sees the keys ``low[i]`` to ``high[i] - 1``, and
    itself. So a candidate sees a range of the history, and never another candidate.
    """

    history: int
    """N, prefix features included."""
    candidates: int
    """C; 0 where the answer is read from the last token of the history."""
    low: npt.NDArray[np.int32]
    """(N + C,)."""
    high: npt.NDArray[np.int32]
    """(N + C,)."""
    content: npt.NDArray[np.uint8]
    """(N, W): with all rows before it and the salt, all that a token's K and V depend on."""
    salt: bytes
    """What the K and V of all tokens depend on besides."""
    reusable: int
    """How many of the first tokens' K and V hold for every sequence with the same salt and the
    same content up to there, whatever follows."""
    groups: npt.NDArray[np.uint8] | None = None
    """(N + C,) group of each token, where the stack has more than one."""
    times: npt.NDArray[np.int64] | None = None
    """(N + C,) seconds, for stacks with a time bias."""
    next_times: npt.NDArray[np.int64] | None = None
    """(N + C,) seconds of what follows each token, for stacks with a time bias."""


@runtime_checkable
class StackModel(TorchModel, Protocol):
    """A model that opens its stack. All methods are thread-safe."""

    def stack(self, task: Task) -> Stack:
        """The layers. Raises `PlanError` where the model is not such a stack."""
        ...

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        """The tokens of a request; cheap, as it runs for each one."""
        ...

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Any:
        """The stack's input, a float32 torch tensor (T, D) on the CPU, without padding.

        Request after request: the tokens of its history from ``starts`` on, then its candidates.
        """
        ...

    def outputs(self, task: Task, requests: Sequence[EncodedRequest], rows: Any) -> Sequence[Any]:
        """From rows (R, D) of the stack's output to what each request asked for, float32 tensors.

        The rows are those of the candidates, request after request; without candidates in the
        sequence, that of the last token of each history, zeros where it is empty. Answers, for
        `Task.RANK`, (C, heads) for each request, for `Task.RETRIEVE` the user's representation
        (d,), to be multiplied with the item table, and for `Task.GENERATE` what the first code is
        predicted from (d,), to be multiplied with the table of `gr_core.tokens.Readout`.
        """
        ...


class StackEnds(Protocol):
    """Both ends of a stack on one device: tokens in, heads out. All methods are thread-safe.

    Neither waits for the device: what they return may still be computed there.
    """

    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Any:
        """As `StackModel.embed`, a float32 torch tensor (T, D) on the device."""
        ...

    def outputs(self, task: Task, requests: Sequence[EncodedRequest], rows: Any) -> Sequence[Any]:
        """As `StackModel.outputs`, from rows (R, D) on the device to tensors there."""
        ...


@runtime_checkable
class PlacedStackModel(StackModel, Protocol):
    """A model whose ends can run beside the layers, so that only ids travel to a device."""

    def ends(self, device: str) -> StackEnds:
        """The ends with their weights copied to a device, e.g. ``cuda:0``.

        They outlive the model, which stays on the CPU. The layers are not among them: `stack` has
        those.
        """
        ...
