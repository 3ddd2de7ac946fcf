"""HSTU for retrieval: the research variant, encoding a history to a vector in item space.

Shapes: B batch, L history (right-padded), C candidates, D model width, N catalogue size,
G signal columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig
from gr_hstu.modules.bias import RelativeIndex, relative_index
from gr_hstu.modules.embeddings import FeatureEmbeddings, item_embedding, sum_embeddings
from gr_hstu.modules.heads import l2_normalize
from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.masks import history_tokens, hstu_mask

USER_NORM_EPS = 1e-6


class HSTURetrieval(nn.Module):
    """User and items in one space; the score of an item is a dot product.

    A history has at most `config.max_seq_len` behaviours (the rows of the position table).
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        if config.variant != "research":
            raise ValueError(
                f"HSTURetrieval needs the variant 'research', not {config.variant!r}; "
                "HSTURanking is the model of the variant 'ranking'"
            )
        self.config = config
        self.items = item_embedding(config.num_items, config.d_model)
        self.signals = FeatureEmbeddings(config.signal_cardinalities, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        nn.init.xavier_normal_(self.positions.weight)
        self.stack = HSTUStack(config)

    def forward(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor | None = None,
    ) -> Tensor:
        """The user (B, D), normalized as the configuration says; zeros for an empty history.

        Takes int64 tensors: items (B, L), timestamps (B, L) and request_time (B,) in seconds,
        lengths (B,), signals (B, L, G).
        """
        encoded_BLD = self.encode_all(
            history_items, history_timestamps, history_lengths, request_time, history_signals
        )
        # A zero row in front answers for empty histories.
        encoded_BLD = F.pad(encoded_BLD, (0, 0, 1, 0))
        last_B1D = history_lengths[:, None, None].expand(-1, -1, encoded_BLD.shape[-1])
        return encoded_BLD.gather(1, last_B1D).squeeze(1)

    def encode_all(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor | None = None,
    ) -> Tensor:
        """The user after each behaviour (B, L, D), zeros where padded.

        Position i has seen behaviours 0..i and the *time* of behaviour i + 1 (of the request, for
        the last one), and predicts item i + 1.
        """
        length = history_items.shape[1]
        if self.config.attention_activation == "softmax":
            # Its denominator runs over the padding too, which is therefore as in training.
            padding = (0, self.config.max_seq_len - length)
            position_N = torch.arange(self.config.max_seq_len, device=history_items.device)
            history_items = F.pad(history_items, padding)
            history_timestamps = torch.where(
                position_N == history_lengths[:, None],
                request_time[:, None],
                F.pad(history_timestamps, padding) * (position_N < history_lengths[:, None]),
            )
            if history_signals is not None:
                history_signals = F.pad(history_signals, (0, 0, *padding))
        tokens = history_tokens(0, history_items, history_lengths, contextual=False)
        x_BLD = self.embed(history_items, history_signals)
        x_BLD = F.dropout(x_BLD, self.config.input_dropout, self.training)
        x_BLD = x_BLD.masked_fill(~tokens.valid_BT[..., None], 0.0)
        index = self._relative_index(
            tokens.rank_BT, history_timestamps, history_lengths, request_time
        )
        x_BLD, _, _ = self.stack(x_BLD, hstu_mask(tokens, tokens), index)
        encoded_BLD = self.normalize_user(x_BLD).masked_fill(~tokens.valid_BT[..., None], 0.0)
        return encoded_BLD[:, :length]

    def embed(self, history_items: Tensor, history_signals: Tensor | None) -> Tensor:
        """Scaled item and signal embeddings plus the position's (B, L, D)."""
        positions_L = torch.arange(history_items.shape[1], device=history_items.device)
        return self.placed(history_items, history_signals, positions_L)

    def placed(self, items: Tensor, signals: Tensor | None, position: Tensor) -> Tensor:
        """The stack's input (..., D) from items (...), signals (..., G) and positions."""
        signal_embeddings = self.signals(signals) if signals is not None else []
        x = sum_embeddings(signal_embeddings, self.items(items))
        position_embedding: Tensor = self.positions(position)
        return x * math.sqrt(self.config.d_model) + position_embedding

    def _relative_index(
        self, rank_BL: Tensor, timestamps_BL: Tensor, lengths_B: Tensor, request_time_B: Tensor
    ) -> RelativeIndex | None:
        if not self.config.relative_bias:
            return None
        next_time_BL = F.pad(timestamps_BL, (0, 1))[:, 1:]
        is_last_BL = rank_BL == (lengths_B - 1)[:, None]
        # Ranks are the same for all users: one row of position biases serves the batch.
        return relative_index(
            rank_BL[:1],
            torch.where(is_last_BL, request_time_B[:, None], next_time_BL),
            rank_BL[:1],
            timestamps_BL,
            num_positions=self.config.max_seq_len,
            num_buckets=self.config.time_bias_buckets,
        )

    def normalize_user(self, x: Tensor) -> Tensor:
        """The users (..., D) from the stack's output for the last of their behaviours."""
        if self.config.user_norm == "l2":
            return l2_normalize(x, USER_NORM_EPS)
        return F.layer_norm(x, (x.shape[-1],), eps=USER_NORM_EPS)

    def item_embeddings(self) -> Tensor:
        """The table (N + 1, D) that users are multiplied with. Row 0 is padding, not an item."""
        table = self.items.weight
        return l2_normalize(table) if self.config.item_l2_norm else table

    def score(self, user_BD: Tensor, candidate_items: Tensor) -> Tensor:
        """Dot products (B, C) of users and items (int64 indices (B, C), 0 where padded)."""
        return torch.einsum("bd,bcd->bc", user_BD, self.item_vectors(candidate_items))

    def item_vectors(self, items: Tensor) -> Tensor:
        """Rows (..., D) of `item_embeddings` for indices (...)."""
        vectors: Tensor = self.items(items)
        return l2_normalize(vectors) if self.config.item_l2_norm else vectors
