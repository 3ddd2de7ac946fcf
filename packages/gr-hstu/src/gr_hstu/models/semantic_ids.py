"""HSTU that generates semantic ids: the retrieval model over tokens instead of items.

Shapes: R rows, H items and N tokens of a history (right-padded), P tokens of a prefix, L levels,
S codes of a level, D model width, I items.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_core.generation import Tokens
from gr_hstu.config import SemanticIdConfig
from gr_hstu.models.retrieval import HSTURetrieval


class HSTUSemanticIds(nn.Module):
    """Predicts a code from all tokens before it: first the history's, then the item's own.

    The decoder is an `HSTURetrieval` whose items are the tokens. ``item_codes`` (I + 1, L) int32
    are the codes of the items, counted from 0 at each level; row 0 is padding.
    """

    def __init__(self, config: SemanticIdConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = HSTURetrieval(config.decoder())
        self.item_codes: Tensor
        codes = torch.zeros((config.num_items + 1, len(config.code_sizes)), dtype=torch.int32)
        self.register_buffer("item_codes", codes)

    def forward(self, history_tokens: Tensor, history_lengths: Tensor, prefixes: Tensor) -> Tensor:
        """Log-probabilities (R, S) float32 of the codes that may follow, all S of level P.

        Takes int64 tensors: tokens of histories (R, N), their lengths (R,), and the tokens of
        prefixes (R, P) that come behind them, P less than L.
        """
        level = prefixes.shape[1]
        tokens_RT = F.pad(history_tokens, (0, level))
        place_RP = history_lengths[:, None] + torch.arange(level, device=tokens_RT.device)
        tokens_RT = tokens_RT.scatter(1, place_RP, prefixes)
        lengths_R = history_lengths + level
        # Without a time bias, times are read by nobody.
        states_RD = self.decoder(tokens_RT, tokens_RT, lengths_R, lengths_R)
        return self.log_probs(states_RD, level)

    def states(self, tokens_RT: Tensor, lengths_R: Tensor) -> Tensor:
        """What follows each token is predicted from: (R, T, D), for `log_probs`."""
        return self.decoder.encode_all(tokens_RT, tokens_RT, lengths_R, lengths_R)

    def log_probs(self, states: Tensor, level: int) -> Tensor:
        """Log-probabilities (..., S) float32 of the codes of a level, from states (..., D)."""
        tokens = self.config.levels[level]
        table_SD = self.decoder.item_embeddings()[tokens.start : tokens.stop]
        logits = (states @ table_SD.T).float() / self.config.temperature
        return logits.log_softmax(dim=-1)

    def history_tokens(self, items_RH: Tensor) -> Tensor:
        """Tokens (R, 1 + H·L) int64 of histories of item indices, right-padded with 0: (R, H)."""
        table = torch.from_numpy(self.item_tokens()).long().to(items_RH.device)
        return F.pad(table[items_RH].flatten(1), (1, 0), value=self.config.first_token)

    def item_tokens(self) -> Tokens:
        """Tokens of the items, (I + 1, L) int32; row 0 is padding."""
        return tokens_of(self.config, self.item_codes.cpu().numpy())


def tokens_of(config: SemanticIdConfig, codes_IL: Tokens) -> Tokens:
    """Codes, counted from 0 at each level, as tokens; row 0 stays zeros."""
    tokens = codes_IL + np.array([level.start for level in config.levels], np.int32)
    tokens[0] = 0
    return tokens
