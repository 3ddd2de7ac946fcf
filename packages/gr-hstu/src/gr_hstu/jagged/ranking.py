"""`HSTURanking` without padding.

Shapes: P prefix tokens, L behaviours, N = P + L, G feature columns, W ids of a token, T tokens of a
batch, C candidates of a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import TokenSequence
from gr_core.types import Task
from gr_hstu.jagged import rows as jagged_rows
from gr_hstu.jagged.intervals import Int32Array, hstu_intervals
from gr_hstu.jagged.rows import Arrays, candidate_counts, joined, on_device, on_host, picked
from gr_hstu.models import HSTURanking
from gr_hstu.modules.embeddings import NEVER

MAX_ITEM_TABLE_BYTES = 256 * 2**20
"""Of what the item MLP makes of all items, which is most of what the outputs cost."""
_ITEMS_AT_ONCE = 4096


class JaggedRanking:
    """A token's ids: the item (or the feature's id, in the prefix), signals, position and time.

    The position is among them where it is counted from the end, else it is the row's own. The time
    is its bucket, so what is counted until the request stays as it is until the bucket changes.
    """

    def __init__(self, module: HSTURanking) -> None:
        config = module.config
        self._module = module
        self._device = module.items.weight.device
        self._prefix = config.num_prefix_tokens
        self._users = len(module.users)
        self._signals = len(module.signals)
        self._last_position = config.position_buckets - 1
        self._from_end = bool(config.position_buckets) and config.position_from == "end"
        self._timed = bool(config.time_buckets)
        self._since_previous = config.time_from == "previous"
        # All tokens see the prefix, and it sees all of them.
        self._bidirectional = config.contextual_mask and self._prefix > 0
        self._width = 1 + self._signals + self._timed + self._from_end
        self._time_column = 1 + self._signals
        never = module.position_time.buckets(torch.tensor(NEVER))
        self._never = 0 if never is None else int(never)
        if not on_host(self._device):
            # Made ahead: what one stream makes, another would not wait for.
            _ = self._item_table

    def sequence(self, request: EncodedRequest) -> TokenSequence:
        config = self._module.config
        prefix, candidates = self._prefix, len(request.arrays["candidate_items"])
        ids_NW = self._ids(request)
        n = len(ids_NW)
        low, high = hstu_intervals(
            prefix,
            n - prefix,
            candidates,
            window=config.max_attn_len,
            contextual=config.contextual_mask,
        )
        return TokenSequence(
            history=n,
            candidates=candidates,
            low=low,
            high=high,
            content=jagged_rows.to_content(ids_NW),
            salt=jagged_rows.digest(ids_NW) if self._bidirectional else b"",
            reusable=n,
        )

    def _ids(self, request: EncodedRequest) -> Int32Array:
        arrays, prefix = request.arrays, self._prefix
        items_L = arrays["history_items"]
        length = len(items_L)
        ids_NW = np.empty((prefix + length, self._width), np.int32)
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
            times_L = arrays["history_timestamps"]
            if self._since_previous:
                elapsed_L = jagged_rows.elapsed_before(times_L)
            else:
                elapsed_L = torch.from_numpy(arrays["request_time"] - times_L)
            bucket_L = self._module.position_time.buckets(elapsed_L)
            assert bucket_L is not None
            ids_LW[:, self._time_column] = bucket_L.numpy()
            ids_NW[:prefix, self._time_column] = self._never
        if self._from_end:
            position_L = np.arange(prefix + length, prefix, -1)
            ids_LW[:, -1] = np.minimum(position_L, self._last_position)
            ids_NW[:prefix, -1] = np.arange(prefix)
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
        positions: list[npt.NDArray[Any]] = []
        buckets: list[npt.NDArray[Any]] = []
        features = jagged_rows.prefix_rows(sequences, starts, prefix)
        if features is not None:
            arrays["prefix"], wanted, prefix_places = features
            if wanted is not None:
                arrays["wanted"] = wanted
            positions.append(prefix_places)
            buckets.append(np.full(len(prefix_places), self._never))

        ids, places = jagged_rows.new_ids(sequences, [max(start, prefix) for start in starts])
        arrays["signals"] = jagged_rows.columns(ids[:, 1 : self._time_column])
        # Row `prefix` of the position table is the candidates'.
        positions.append(ids[:, -1] if self._from_end else places + 1)
        if self._timed:
            buckets.append(ids[:, self._time_column])

        counts = candidate_counts(requests)
        # One look-up for behaviours and candidates.
        arrays["items"] = np.concatenate([ids[:, 0], joined(requests, "candidate_items")])
        arrays["crosses"] = joined(requests, "candidate_features")
        if module.config.context_placement == "candidate":
            arrays["contexts"] = jagged_rows.for_each_candidate(
                requests, "context_features", counts
            )
        positions.append(np.full(sum(counts), prefix))
        arrays["positions"] = np.concatenate(positions)
        if self._timed:
            buckets.append(self._candidate_buckets(requests, counts))
            arrays["buckets"] = np.concatenate(buckets)
        order = jagged_rows.request_by_request(sequences, starts, prefix)
        if order is not None:
            arrays["order"] = order

        there = on_device(arrays, self._device)
        contents: list[Tensor] = []
        if features is not None:
            ids_BP = there["prefix"]
            embeddings = module.features(ids_BP[:, : self._users], ids_BP[:, self._users :])
            content_TD = torch.stack(embeddings, dim=1).flatten(0, 1)
            contents.append(picked(content_TD, there.get("wanted")))
        item_content = module.item_content(there["items"])
        contents.append(module.behaviours(item_content[: len(ids)], there["signals"].T))
        candidates_CD = module.candidates(item_content[len(ids) :], there["crosses"])
        contents.append(module.targets(candidates_CD, there.get("contexts")))
        x_TD = module.placed(torch.cat(contents), there["positions"], there.get("buckets"))
        return picked(x_TD, there.get("order"))

    def _candidate_buckets(
        self, requests: Sequence[EncodedRequest], counts: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        if not self._since_previous:
            return np.zeros(sum(counts), np.int64)
        elapsed = jagged_rows.elapsed_at_request(requests)
        bucket = self._module.position_time.buckets(elapsed)
        assert bucket is not None
        return np.repeat(bucket.numpy(), counts)

    @torch.inference_mode()
    def outputs(
        self, task: Task, requests: Sequence[EncodedRequest], rows: Tensor
    ) -> Sequence[Tensor]:
        counts = candidate_counts(requests)
        arrays: Arrays = {"items": joined(requests, "candidate_items")}
        if self._item_table is None:
            arrays["crosses"] = joined(requests, "candidate_features")
        answering = jagged_rows.answering_rows(counts)
        if answering is not None:
            arrays["answering"] = answering
        there = on_device(arrays, self._device)
        encoded_CD = picked(rows, there.get("answering"))
        logits_CO = self._module.logits(encoded_CD, self._item_outputs(there))
        return logits_CO.split_with_sizes(counts)

    def _item_outputs(self, there: Mapping[str, Tensor]) -> Tensor:
        """What the item MLP makes of the candidates, (C, D)."""
        if self._item_table is not None:
            return self._item_table.index_select(0, there["items"])
        module = self._module
        item_CD: Tensor = module.item_mlp(
            module.candidates(module.item_content(there["items"]), there["crosses"])
        )
        return item_CD

    @cached_property
    def _item_table(self) -> Tensor | None:
        """What the item MLP makes of each item, (items + 1, D).

        None where that depends on the request too, or would be too large.
        """
        module, config = self._module, self._module.config
        rows = config.num_items + 1
        if len(module.crosses) or 4 * rows * config.d_model > MAX_ITEM_TABLE_BYTES:
            return None
        table_ID = torch.empty(rows, config.d_model, device=self._device)
        with torch.inference_mode():
            for start in range(0, rows, _ITEMS_AT_ONCE):
                stop = min(start + _ITEMS_AT_ONCE, rows)
                items = torch.arange(start, stop, device=self._device)
                content = module.candidates(module.item_content(items), None)
                table_ID[start:stop] = module.item_mlp(content)
        if table_ID.is_cuda:
            torch.cuda.synchronize(self._device)
        return table_ID
