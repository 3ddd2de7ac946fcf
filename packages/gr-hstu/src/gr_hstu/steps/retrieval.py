"""`HSTURetrieval` in steps.

Shapes: B batch, W ids of a token, T tokens given, P tokens cached, S = P + T keys, C candidates,
D model width, M layers, I rows of a table of biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core.contracts import ArraySpec, EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.steps import CANDIDATE, PAST, PAST_LENGTHS, SCORES, TOKEN, USER, Step
from gr_core.types import Task
from gr_hstu.models import HSTURetrieval
from gr_hstu.modules.bias import RelativeBias, RelativeIndex, relative_index
from gr_hstu.modules.hstu import HSTULayer
from gr_hstu.steps import tokens
from gr_hstu.steps.tokens import Past

LENGTHS, TIMES, NEXT_TIMES, PAST_TIMES = "lengths", "times", "next_times", "past_times"


class RetrievalSteps:
    """Ids of a token are those of `gr_hstu.jagged.retrieval` but for the times.

    ``lengths`` are the numbers of tokens given. The user's representation answers for both tasks:
    for `Task.RANK` it is multiplied with the candidates.
    """

    def __init__(self, module: HSTURetrieval) -> None:
        config = module.config
        self._module = module
        self._width = 1 + len(module.signals)
        self._timed = config.relative_bias
        self._kv = (config.num_layers, config.num_heads, config.d_qk, config.d_v)

    def prefill(self, task: Task) -> Step:
        answers = task is Task.RETRIEVE
        inputs = [tokens.jagged(tokens.IDS, "int32", TOKEN, self._width)]
        # K and V of the first layer depend on no other token.
        if answers or self._kv[0] > 1:
            inputs += [*tokens.interval_specs(), *self._times()]
        outputs = tokens.kv_specs(*self._kv)
        if answers:
            inputs.append(ArraySpec(LENGTHS, "int32"))
            outputs = (self._user(), *outputs)
        return Step(_Prefill(self._module).eval(), tuple(inputs), outputs)

    def decode(self, task: Task) -> Step:
        inputs = [
            *tokens.past_specs(*self._kv),
            tokens.jagged(tokens.IDS, "int32", TOKEN, self._width),
            *tokens.interval_specs(),
            ArraySpec(LENGTHS, "int32"),
            *self._times(),
        ]
        if self._timed:
            inputs.append(tokens.jagged(PAST_TIMES, "int64", PAST))
        answer = self._user()
        if task is Task.RANK:
            inputs.append(tokens.jagged(tokens.CANDIDATE_ITEMS, "int64", CANDIDATE))
            answer = ArraySpec(SCORES, "float32", (CANDIDATE, 1))
        outputs = (answer, *tokens.kv_specs(*self._kv))
        return Step(_Decode(self._module).eval(), tuple(inputs), outputs)

    def _times(self) -> tuple[ArraySpec, ...]:
        names = (TIMES, NEXT_TIMES) if self._timed else ()
        return tuple(tokens.jagged(name, "int64", TOKEN) for name in names)

    def _user(self) -> ArraySpec:
        return ArraySpec(USER, "float32", (self._module.config.d_model,))

    def arrays(
        self, request: EncodedRequest, sequence: TokenSequence, start: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {
            PAST_LENGTHS: np.array(start, np.int32),
            LENGTHS: np.array(sequence.history - start, np.int32),
            tokens.IDS: tokens.step_ids(sequence, start, self._width),
            tokens.LOW: sequence.low[start:],
            tokens.HIGH: sequence.high[start:],
        }
        if self._timed:
            assert sequence.times is not None
            assert sequence.next_times is not None
            arrays[TIMES] = sequence.times[start:]
            arrays[NEXT_TIMES] = sequence.next_times[start:]
            arrays[PAST_TIMES] = sequence.times[:start]
        if request.task is Task.RANK:
            arrays[tokens.CANDIDATE_ITEMS] = request.arrays["candidate_items"]
        return arrays


class _Encoder(nn.Module):
    """From ids to the stack's output, K and V."""

    position_bias_IM: Tensor
    time_bias_IM: Tensor

    def __init__(self, model: HSTURetrieval) -> None:
        super().__init__()
        self.model = model
        if model.config.relative_bias:
            layers = cast("Iterable[HSTULayer]", model.stack.layers)
            biases = [cast("RelativeBias", layer.relative_bias) for layer in layers]
            positions: list[Tensor] = [bias.position_weight for bias in biases]
            times: list[Tensor] = [bias.time_weight for bias in biases]
            self.register_buffer("position_bias_IM", torch.stack(positions, dim=1))
            self.register_buffer("time_bias_IM", torch.stack(times, dim=1))

    def forward(
        self,
        ids_BTW: Tensor,
        low_BT: Tensor | None,
        high_BT: Tensor | None,
        times_BT: Tensor | None,
        next_times_BT: Tensor | None,
        past: Past | None,
        past_times_BP: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Y (B, T, D), K (B, M, T, H, K), V (B, M, T, H, V)."""
        model, config = self.model, self.model.config
        place_BT = tokens.token_places(ids_BTW, past)
        sight = tokens.history_sight(place_BT, low_BT, high_BT, past, config.divisor)
        # Padded tokens may stand beyond the last position.
        position_BT = place_BT.clamp(max=config.max_seq_len - 1)
        bias_MBTS = None
        if times_BT is not None and next_times_BT is not None:
            key_times_BS = times_BT
            if past_times_BP is not None:
                key_times_BS = torch.cat([past_times_BP, times_BT], dim=1)
            index = relative_index(
                position_BT,
                next_times_BT,
                tokens.key_places(place_BT, past).clamp(min=0, max=config.max_seq_len - 1),
                key_times_BS,
                num_positions=config.max_seq_len,
                num_buckets=config.time_bias_buckets,
            )
            bias_MBTS = self.biases(index)
        x_BTD = model.placed(ids_BTW[..., 0], ids_BTW[..., 1:], position_BT)
        return tokens.run_hstu(model.stack, x_BTD, sight, past, bias_MBTS)

    def biases(self, index: RelativeIndex) -> Tensor:
        """`RelativeBias` of all layers (M, B, T, S), each pair being looked up once for all."""
        bias_BTSM = F.embedding(index.position_BTS, self.position_bias_IM)
        bias_BTSM = bias_BTSM + F.embedding(index.time_BTS, self.time_bias_IM)
        return bias_BTSM.permute(3, 0, 1, 2)

    def user(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """The users (B, D) after the last tokens, zeros without any."""
        last_B11 = (lengths_B.long() - 1).clamp(min=0)[:, None, None]
        last_BD = x_BTD.gather(1, last_B11.expand(-1, 1, x_BTD.shape[-1])).squeeze(1)
        return torch.where(lengths_B[:, None] > 0, self.model.normalize_user(last_BD), 0.0)


class _Prefill(nn.Module):
    def __init__(self, model: HSTURetrieval) -> None:
        super().__init__()
        self.encoder = _Encoder(model)

    def forward(
        self,
        ids: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
        times: Tensor | None = None,
        next_times: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        x_BTD, keys, values = self.encoder(ids, low, high, times, next_times, None, None)
        if lengths is None:
            return keys, values
        return self.encoder.user(x_BTD, lengths), keys, values


class _Decode(nn.Module):
    def __init__(self, model: HSTURetrieval) -> None:
        super().__init__()
        self.model = model
        self.encoder = _Encoder(model)

    def forward(
        self,
        past_keys: Tensor,
        past_values: Tensor,
        past_lengths: Tensor,
        ids: Tensor,
        low: Tensor,
        high: Tensor,
        lengths: Tensor,
        times: Tensor | None = None,
        next_times: Tensor | None = None,
        past_times: Tensor | None = None,
        candidate_items: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        past = Past(past_keys, past_values, past_lengths)
        x_BTD, keys, values = self.encoder(ids, low, high, times, next_times, past, past_times)
        answer = self.encoder.user(x_BTD, lengths)
        if candidate_items is not None:
            answer = self.model.item_vectors(candidate_items) @ answer[..., None]
        return answer, keys, values
