"""Prompts of vLLM from requests of the platform, by the kind of token that a checkpoint takes.

``ids``: a token is one id of a table. ``columns``: it is several ids, and perhaps times; the worker
sums up the rows of its tables. ``rows``: its embedding itself, made here, with who sees whom.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gr_core.contracts import EncodedRequest
from gr_core.stack import StackModel, TokenSequence
from gr_core.tokens import TokenModel
from gr_vllm.checkpoint import Checkpoint
from gr_vllm.rows import NONCE_WORDS, RowLayout

Prompt = dict[str, Any]
"""What vLLM calls a rendered input: ``type``, the tokens, and ``cache_salt`` where there is one."""


class Prompts:
    """Makes the prompts of one checkpoint. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint, model: StackModel) -> None:
        self._kind = checkpoint.tokens
        self._layout = RowLayout.of(checkpoint)
        self._model = model
        self._token_ids: Callable[[TokenSequence], npt.NDArray[np.int32]] | None = None
        if self._kind != "rows":
            assert isinstance(model, TokenModel)  # too slow a question for every request
            self._token_ids = model.token_ids
        self._table_rows = np.array(checkpoint.tables, np.int64)
        self._dtype: torch.dtype = getattr(torch, checkpoint.dtype)

    def prompt(self, request: EncodedRequest, sequence: TokenSequence) -> Prompt:
        """For a sequence of at least one token.

        Raises `ValueError` for ids that the model has no row for, which vLLM itself would not
        notice.
        """
        prompt: Prompt
        if self._kind == "ids":
            ids = self._ids(sequence)[:, 0].tolist()
            prompt = {"type": "token", "prompt_token_ids": ids}
        elif self._kind == "columns":
            prompt = {"type": "embeds", "prompt_embeds": self._columns(sequence)}
        else:
            prompt = {"type": "embeds", "prompt_embeds": self._rows(request, sequence)}
        if sequence.salt:
            prompt["cache_salt"] = sequence.salt.hex()
        return prompt

    def _ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        assert self._token_ids is not None
        ids_NW = self._token_ids(sequence)
        wrong_NW = (ids_NW < 0) | (ids_NW >= self._table_rows)
        if wrong_NW.any():
            token, table = np.argwhere(wrong_NW)[0].tolist()
            raise ValueError(
                f"token {token} of the history has the id {ids_NW[token, table]} in table {table}, "
                f"expected 0 to {self._table_rows[table] - 1}"
            )
        return ids_NW

    def _columns(self, sequence: TokenSequence) -> Tensor:
        words_NA = np.empty((sequence.history, self._layout.words), np.int32)
        words_NA[:, self._layout.ids] = self._ids(sequence)
        self._put_times(words_NA, sequence)
        return self._layout.join(None, torch.from_numpy(words_NA), self._dtype)

    def _rows(self, request: EncodedRequest, sequence: TokenSequence) -> Tensor:
        layout = self._layout
        tokens = sequence.history + sequence.candidates
        words_NA = np.zeros((tokens, layout.words), np.int32)
        words_NA[:, layout.interval] = np.stack([sequence.low, sequence.high], 1)
        if layout.group is not None:
            assert sequence.groups is not None
            words_NA[:, layout.group] = sequence.groups
        self._put_times(words_NA, sequence)
        # Beyond `reusable`, K and V may depend on later tokens, too: they may only be found again
        # by the very same history.
        words_NA[sequence.reusable : sequence.history, layout.nonce] = _words(
            hashlib.blake2b(sequence.content.tobytes(), digest_size=4 * NONCE_WORDS).digest()
        )
        # The outputs of candidates are the answer, so their blocks may never be found.
        words_NA[sequence.history :, layout.nonce] = _words(os.urandom(4 * NONCE_WORDS))
        return layout.join(
            self._embedded(request, sequence), torch.from_numpy(words_NA), self._dtype
        )

    @torch.inference_mode()
    def _embedded(self, request: EncodedRequest, sequence: TokenSequence) -> Tensor:
        try:
            x_ND: Tensor = self._model.embed([request], [sequence], [0]).to(self._dtype)
        except IndexError as error:
            raise ValueError(f"a token has an id that the model has no row for: {error}") from error
        if not torch.isfinite(x_ND).all():
            token = int((~torch.isfinite(x_ND)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"token {token} has an embedding that is not finite in "
                f"{str(self._dtype).removeprefix('torch.')}"
            )
        return x_ND

    def _put_times(self, words_NA: npt.NDArray[np.int32], sequence: TokenSequence) -> None:
        """Seconds since the oldest behaviour, which histories that may share K and V share."""
        if self._layout.times.start == self._layout.times.stop:
            return
        assert sequence.times is not None
        assert sequence.next_times is not None
        times = np.stack([sequence.times, sequence.next_times], 1) - sequence.times[:1]
        words_NA[:, self._layout.times] = times.clip(*_INT32)


_INT32 = (np.iinfo(np.int32).min, np.iinfo(np.int32).max)


def _words(digest: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(digest, np.int32)
