"""`HSTURetrieval` in steps.

Shapes: B batch, W ids of a token, T tokens given, P tokens cached, S = P + T keys, C candidates,
R rows, D model width, M layers, I rows of a table of biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
from gr_hstu.steps.layers import Answer, Layers
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
        # Of the last layer only K and V are read where nothing answers.
        if answers or self._kv[0] > 1:
            inputs += [*tokens.interval_specs(), *self._times()]
        outputs = tokens.kv_specs(*self._kv)
        if answers:
            inputs.append(ArraySpec(LENGTHS, "int32"))
            outputs = (self._user(), *outputs)
        return Step(_Prefill(self._module, answers=answers).eval(), tuple(inputs), outputs)

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


class _Biases(nn.Module):
    """`RelativeBias` of layers (M, B, R, S), each pair being looked up once for all."""

    position_IM: Tensor
    time_IM: Tensor

    def __init__(self, layers: Sequence[HSTULayer]) -> None:
        super().__init__()
        biases = [cast("RelativeBias", layer.relative_bias) for layer in layers]
        positions: list[Tensor] = [bias.position_weight for bias in biases]
        times: list[Tensor] = [bias.time_weight for bias in biases]
        self.register_buffer("position_IM", torch.stack(positions, dim=1))
        self.register_buffer("time_IM", torch.stack(times, dim=1))

    def forward(self, index: RelativeIndex) -> Tensor:
        bias_BRSM = F.embedding(index.position_BTS, self.position_IM)
        bias_BRSM = bias_BRSM + F.embedding(index.time_BTS, self.time_IM)
        return bias_BRSM.permute(3, 0, 1, 2)


class _Encoder(nn.Module):
    """From ids to the user, K and V."""

    def __init__(self, model: HSTURetrieval, *, answers: bool) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.layers = Layers(
            model.stack, alpha=config.scale, divisor=config.divisor, answers=answers
        )
        self.first_biases = self.last_bias = None
        if config.relative_bias:
            first = list(cast("Iterable[HSTULayer]", self.layers.first))
            self.first_biases = _Biases(first) if first else None
            self.last_bias = _Biases([self.layers.last]) if answers else None

    def forward(
        self,
        ids_BTW: Tensor,
        low_BT: Tensor | None,
        high_BT: Tensor | None,
        times_BT: Tensor | None,
        next_times_BT: Tensor | None,
        lengths_B: Tensor | None,
        past: Past | None = None,
        past_times_BP: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The users (B, D) if there are lengths, K (B, M, T, H, K), V (B, M, T, H, V)."""
        model, config = self.model, self.model.config
        place_BT = tokens.token_places(ids_BTW, past)
        key_BS = tokens.key_places(place_BT, past)
        key_times_BS = times_BT
        if times_BT is not None and past_times_BP is not None:
            key_times_BS = torch.cat([past_times_BP, times_BT], dim=1)
        # Padded tokens may stand beyond the last position, padded keys before the first.
        most = config.max_seq_len - 1
        key_position_BS = key_BS.clamp(min=0, max=most)

        def related(
            place_BR: Tensor, rows: Callable[[Tensor], Tensor], biases: _Biases | None
        ) -> tuple[Tensor, Tensor | None]:
            """Whom some of the tokens see, and biases (M, B, R, S)."""
            assert low_BT is not None
            assert high_BT is not None
            sight_BRS = tokens.history_sight(
                place_BR, rows(low_BT), rows(high_BT), key_BS, config.divisor
            )
            if biases is None or key_times_BS is None or next_times_BT is None:
                return sight_BRS, None
            index = relative_index(
                place_BR.clamp(max=most),
                rows(next_times_BT),
                key_position_BS,
                key_times_BS,
                num_positions=config.max_seq_len,
                num_buckets=config.time_bias_buckets,
            )
            return sight_BRS, biases(index)

        sight_BTS = bias_MBTS = answer = None
        if len(self.layers.first):
            sight_BTS, bias_MBTS = related(place_BT, lambda all_BT: all_BT, self.first_biases)
        if lengths_B is not None:
            last_B1 = (lengths_B - 1).clamp(min=0)[:, None]
            rows = partial(_at, last_B1.long())
            sight_B1S, bias_MB1S = related(place_BT[:, :1] + last_B1, rows, self.last_bias)
            answer = Answer(rows, sight_B1S, None if bias_MB1S is None else bias_MB1S[0])
        x_BTD = model.placed(ids_BTW[..., 0], ids_BTW[..., 1:], place_BT.clamp(max=most))
        x_BRD, keys, values = self.layers(x_BTD, sight_BTS, past, answer, bias_MBRS=bias_MBTS)
        if lengths_B is None:
            return None, keys, values
        user_BD = model.normalize_user(x_BRD.squeeze(1))
        return torch.where(lengths_B[:, None] > 0, user_BD, 0.0), keys, values


def _at(place_B1: Tensor, rows_BT: Tensor) -> Tensor:
    """One row (B, 1, ...) of each of the batch (B, T, ...)."""
    columns = rows_BT.shape[2:]
    index = place_B1.reshape(-1, 1, *(1 for _ in columns)).expand(-1, 1, *columns)
    return rows_BT.gather(1, index)


class _Prefill(nn.Module):
    def __init__(self, model: HSTURetrieval, *, answers: bool) -> None:
        super().__init__()
        self.encoder = _Encoder(model, answers=answers)

    def forward(
        self,
        ids: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
        times: Tensor | None = None,
        next_times: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        user, keys, values = self.encoder(ids, low, high, times, next_times, lengths)
        return (keys, values) if user is None else (user, keys, values)


class _Decode(nn.Module):
    def __init__(self, model: HSTURetrieval) -> None:
        super().__init__()
        self.model = model
        self.encoder = _Encoder(model, answers=True)

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
        answer, keys, values = self.encoder(
            ids, low, high, times, next_times, lengths, past, past_times
        )
        if candidate_items is not None:
            answer = self.model.item_vectors(candidate_items) @ answer[..., None]
        return answer, keys, values
