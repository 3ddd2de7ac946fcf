"""`MTGR` without padding.

Shapes: P tokens of U, L behaviours (S, then R), N = P + L, G feature columns, W ids of a token,
T tokens of a batch, C candidates of a batch, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.types import Task
from gr_hstu.jagged import rows as jagged_rows
from gr_hstu.jagged.intervals import Int32Array, mtgr_intervals
from gr_hstu.jagged.rows import Arrays, candidate_counts, joined, on_device, on_host, picked
from gr_hstu.models import MTGR
from gr_hstu.modules.masks import CANDIDATE, LONG_HISTORY, REALTIME, USER

_FEWEST_ROWS = 8
"""Libraries multiply a few rows in another way, which rounds differently."""
_VECTORS = 32
"""Numbers that torch's elementwise functions take at once; a rest is rounded differently."""


class JaggedMTGR:
    """A token's ids: the item (or the feature's id, in U), signals, time, and the tie.

    U and S see each other in both directions, so all of U and S is in the salt. A token of R sees
    U, S and what is strictly earlier in R: its K and V depend on these, on itself, and on which of
    the tokens before it have its own time. The tie says so: 1 where the time is that of the token
    of R before. So R may grow, and K and V stay.
    """

    def __init__(self, module: MTGR) -> None:
        self._module = module
        self._device = module.items.weight.device
        self._prefix = module.config.num_prefix_tokens
        self._users = len(module.users)
        self._signals = len(module.signals)
        self._timed = bool(module.config.time_buckets)
        self._time_column = 1 + self._signals
        self._width = self._time_column + self._timed + 1
        self._rows_step = _VECTORS // math.gcd(_VECTORS, module.config.mlp_dim)

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        arrays, prefix = request.arrays, self._prefix
        times_L = arrays["history_timestamps"]
        candidates = len(arrays["candidate_items"])
        realtime = min(int(arrays["realtime_counts"]), len(times_L))
        ids_NW = self._ids(request, realtime)
        n = len(ids_NW)
        low, high = mtgr_intervals(
            prefix, times_L, realtime, int(arrays["request_time"]), candidates
        )
        groups = np.empty(n + candidates, np.uint8)
        groups[:prefix] = USER
        groups[prefix : n - realtime] = LONG_HISTORY
        groups[n - realtime : n] = REALTIME
        groups[n:] = CANDIDATE
        return TokenSequence(
            history=n,
            candidates=candidates,
            low=low,
            high=high,
            content=jagged_rows.to_content(ids_NW),
            salt=jagged_rows.digest(ids_NW[: n - realtime]),
            reusable=n,
            groups=groups,
        )

    def _ids(self, request: EncodedRequest, realtime: int) -> Int32Array:
        arrays, prefix = request.arrays, self._prefix
        items_L, times_L = arrays["history_items"], arrays["history_timestamps"]
        ids_NW = np.empty((prefix + len(items_L), self._width), np.int32)
        if prefix:
            ids_NW[:prefix] = 0
            ids_NW[: self._users, 0] = arrays["user_features"]
            if prefix > self._users:
                ids_NW[self._users : prefix, 0] = arrays["context_features"]
        ids_LW = ids_NW[prefix:]
        ids_LW[:, 0] = items_L
        if self._signals:
            ids_LW[:, 1 : self._time_column] = arrays["history_signals"]
        if self._timed:
            bucket_L = self._module.position_time.buckets(jagged_rows.elapsed_before(times_L))
            assert bucket_L is not None
            ids_LW[:, self._time_column] = bucket_L.numpy()
        ids_LW[:, -1] = 0
        if realtime > 1:
            times_R = times_L[len(times_L) - realtime :]
            ids_LW[1 - realtime :, -1] = times_R[1:] == times_R[:-1]
        return ids_NW

    @torch.inference_mode()
    def embed(
        self,
        requests: Sequence[EncodedRequest],
        sequences: Sequence[TokenSequence],
        starts: Sequence[int],
    ) -> Tensor:
        module, prefix = self._module, self._prefix
        arrays: Arrays = {}
        features = jagged_rows.prefix_rows(sequences, starts, prefix)
        if features is not None:
            arrays["prefix"], wanted, _ = features
            if wanted is not None:
                arrays["wanted"] = wanted
        ids, places = jagged_rows.new_ids(sequences, [max(start, prefix) for start in starts])
        behaviours, counts = len(ids), candidate_counts(requests)
        candidates = sum(counts)
        if behaviours:
            arrays["signals"] = jagged_rows.columns(ids[:, 1 : self._time_column])
        if candidates:
            arrays["crosses"] = joined(requests, "candidate_features")
            if module.config.context_placement == "candidate":
                arrays["contexts"] = jagged_rows.for_each_candidate(
                    requests, "context_features", counts
                )
        if behaviours or candidates:
            # One look-up for behaviours and candidates.
            arrays["items"] = np.concatenate([ids[:, 0], joined(requests, "candidate_items")])
            # Position 0 is the candidates', those of behaviours count from 1, after U.
            positions = [places + (1 - prefix), np.zeros(candidates, np.int32)]
            arrays["positions"] = np.concatenate(positions)
            if self._timed:
                arrays["buckets"] = self._buckets(ids, requests, counts)
        elif features is None:
            return torch.empty(0, module.config.d_model, device=self._device)
        order = jagged_rows.request_by_request(sequences, starts, prefix)
        if order is not None:
            arrays["order"] = order

        there = on_device(arrays, self._device)
        parts: list[Tensor] = []
        if features is not None:
            users_TD = self._users_of(there["prefix"]).flatten(0, 1)
            parts.append(picked(users_TD, there.get("wanted")))
        if behaviours or candidates:
            item_content = module.item_content(there["items"])
            contents: list[Tensor] = []
            if behaviours:
                inputs = module.behaviours(item_content[:behaviours], there["signals"].T)
                contents.append(self._filled_up(module.behaviour_mlp, inputs))
            if candidates:
                inputs = module.candidates(
                    item_content[behaviours:], there["crosses"], there.get("contexts")
                )
                contents.append(self._filled_up(module.candidate_mlp, inputs))
            parts.append(
                module.position_time(torch.cat(contents), there["positions"], there.get("buckets"))
            )
        return picked(torch.cat(parts), there.get("order"))

    def _users_of(self, ids_BP: Tensor) -> Tensor:
        """Tokens of U (B, P, D)."""
        module = self._module
        features = module.features(ids_BP[:, : self._users], ids_BP[:, self._users :])
        projected = map(self._filled_up, module.user_projections, features)
        return torch.stack(list(projected), dim=1)

    def _filled_up(self, compute: Callable[[Tensor], Tensor], x_RE: Tensor) -> Tensor:
        """``compute(x_RE)``, where a row gives the same bits alone and among any others.

        On the CPU; the libraries of other devices choose by more than the number of rows.
        """
        if not on_host(self._device):
            return compute(x_RE)
        count = len(x_RE)
        rows = max(_FEWEST_ROWS, -(-count // self._rows_step) * self._rows_step)
        if rows == count:
            return compute(x_RE)
        return compute(F.pad(x_RE, (0, 0, 0, rows - count)))[:count]

    def _buckets(
        self, ids_TW: Int32Array, requests: Sequence[EncodedRequest], counts: Sequence[int]
    ) -> npt.NDArray[Any]:
        bucket = self._module.position_time.buckets(jagged_rows.elapsed_at_request(requests))
        assert bucket is not None
        of_candidates: npt.NDArray[np.int64] = np.repeat(bucket.numpy(), counts)
        return np.concatenate([ids_TW[:, self._time_column], of_candidates])

    @torch.inference_mode()
    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        counts = candidate_counts(requests)
        answering = jagged_rows.answering_rows(counts)
        if answering is not None:
            there = on_device({"answering": answering}, self._device)
            rows = picked(rows, there["answering"])
        logits: Tensor = self._module.heads(rows)
        return logits.split_with_sizes(counts)
