"""MTGR (arXiv 2505.18654): user features, long and real-time history, candidates in one stack.

Shapes: B batch, L history (right-padded), C candidates, P user tokens, S tokens of user and
history, D model width, E embedding width, N layers, O heads of the answer, G feature columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.config import MTGRConfig
from gr_hstu.modules.embeddings import (
    FeatureEmbeddings,
    PositionTimeEmbedding,
    item_embedding,
    last_timestamp,
    since_previous,
)
from gr_hstu.modules.heads import MLP
from gr_hstu.modules.masks import (
    MTGRTokens,
    mtgr_candidate_tokens,
    mtgr_history_tokens,
    mtgr_mask,
)
from gr_hstu.modules.mtgr import MTGRStack


class MTGRState(NamedTuple):
    """What scoring candidates needs of U, S and R: K and V of every layer, and the tokens."""

    k_NBSHK: Tensor
    v_NBSHV: Tensor
    group_BS: Tensor
    time_BS: Tensor
    valid_BS: Tensor
    last_timestamp_B: Tensor

    def tokens(self) -> MTGRTokens:
        return MTGRTokens(self.group_BS, self.time_BS, self.valid_BS)


class MTGR(nn.Module):
    """Scores all candidates of a request in one pass, cross features kept.

    `prefill` and `score_candidates` give the same in two steps (M-FALCON).
    """

    item_features: Tensor

    def __init__(self, config: MTGRConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.d_model, config.embedding_dim
        item_columns = 1 + len(config.item_cardinalities)
        contexts_of_candidates = (
            len(config.context_cardinalities) if config.context_placement == "candidate" else 0
        )
        self.items = item_embedding(config.num_items, embedding)
        self.item_side = FeatureEmbeddings(config.item_cardinalities, embedding)
        self.register_buffer(
            "item_features",
            torch.zeros(config.num_items + 1, len(config.item_cardinalities), dtype=torch.int64),
        )
        self.signals = FeatureEmbeddings(config.signal_cardinalities, embedding)
        self.users = FeatureEmbeddings(config.user_cardinalities, embedding)
        self.contexts = FeatureEmbeddings(config.context_cardinalities, embedding)
        self.crosses = FeatureEmbeddings(config.candidate_cardinalities, embedding)
        self.user_projections = nn.ModuleList(
            nn.Linear(embedding, width) for _ in range(config.num_prefix_tokens)
        )
        self.behaviour_mlp = MLP(
            (item_columns + len(self.signals)) * embedding, config.mlp_dim, width, norm=False
        )
        self.candidate_mlp = MLP(
            (item_columns + len(self.crosses) + contexts_of_candidates) * embedding,
            config.mlp_dim,
            width,
            norm=False,
        )
        self.position_time = PositionTimeEmbedding(
            config.position_buckets, config.time_buckets, width
        )
        self.stack = MTGRStack(config)
        self.heads = MLP(width, config.mlp_dim, len(config.heads), norm=False)

    def forward(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor | None,
        user_features: Tensor | None,
        context_features: Tensor | None,
        candidate_items: Tensor,
        candidate_features: Tensor | None,
        candidate_counts: Tensor,
        realtime_counts: Tensor,
    ) -> Tensor:
        """Logits (B, C, O), zeros where padded.

        Takes the tensors of `HSTURanking.forward`, and realtime_counts int64 (B,): how many of
        the last behaviours are R; those before are S.
        """
        history_BSD, history = self._history(
            history_items,
            history_timestamps,
            history_lengths,
            history_signals,
            user_features,
            context_features,
            realtime_counts,
        )
        last_B = last_timestamp(history_timestamps, history_lengths)
        target_BCD = self._candidates(
            last_B, request_time, candidate_items, candidate_features, context_features
        )
        targets = mtgr_candidate_tokens(candidate_items, candidate_counts, request_time)
        tokens = MTGRTokens(
            *(torch.cat(parts, dim=1) for parts in zip(history, targets, strict=True))
        )
        x_BTD = torch.cat([history_BSD, target_BCD], dim=1)
        x_BTD = F.dropout(x_BTD, self.config.input_dropout, self.training)
        x_BTD, _, _ = self.stack(x_BTD, tokens.group_BT, mtgr_mask(tokens, tokens))
        return self._logits(x_BTD[:, history_BSD.shape[1] :], targets)

    def prefill(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        history_signals: Tensor | None,
        user_features: Tensor | None,
        context_features: Tensor | None,
        realtime_counts: Tensor,
    ) -> MTGRState:
        """Runs U, S and R alone. Takes the tensors of `forward`."""
        x_BSD, tokens = self._history(
            history_items,
            history_timestamps,
            history_lengths,
            history_signals,
            user_features,
            context_features,
            realtime_counts,
        )
        _, keys, values = self.stack(x_BSD, tokens.group_BT, mtgr_mask(tokens, tokens))
        last_B = last_timestamp(history_timestamps, history_lengths)
        return MTGRState(torch.stack(keys), torch.stack(values), *tokens, last_B)

    def score_candidates(
        self,
        state: MTGRState,
        request_time: Tensor,
        candidate_items: Tensor,
        candidate_features: Tensor | None,
        candidate_counts: Tensor,
        context_features: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C, O) of candidates after a prefilled history; equal to `forward`'s."""
        x_BCD = self._candidates(
            state.last_timestamp_B,
            request_time,
            candidate_items,
            candidate_features,
            context_features,
        )
        targets = mtgr_candidate_tokens(candidate_items, candidate_counts, request_time)
        keys = MTGRTokens(
            *(torch.cat(parts, dim=1) for parts in zip(state.tokens(), targets, strict=True))
        )
        past = (state.k_NBSHK, state.v_NBSHV)
        x_BCD, _, _ = self.stack(x_BCD, targets.group_BT, mtgr_mask(targets, keys), past)
        return self._logits(x_BCD, targets)

    def _history(
        self,
        items_BL: Tensor,
        timestamps_BL: Tensor,
        lengths_B: Tensor,
        signals_BLG: Tensor | None,
        user_BG: Tensor | None,
        context_BG: Tensor | None,
        realtime_counts_B: Tensor,
    ) -> tuple[Tensor, MTGRTokens]:
        """Input (B, S, D) and tokens of U, S and R."""
        # Position 0 is the candidates'.
        position_L = 1 + torch.arange(items_BL.shape[1], device=items_BL.device)
        x_BLD = self.position_time(
            self.behaviour_mlp(self.behaviours(self.item_content(items_BL), signals_BLG)),
            position_L.expand_as(items_BL),
            self.position_time.buckets(since_previous(timestamps_BL)),
        )
        tokens = mtgr_history_tokens(
            self.config.num_prefix_tokens, timestamps_BL, lengths_B, realtime_counts_B
        )
        users = [
            project(feature)[:, None]
            for project, feature in zip(
                self.user_projections, self.features(user_BG, context_BG), strict=True
            )
        ]
        return torch.cat([*users, x_BLD], dim=1), tokens

    def _candidates(
        self,
        last_timestamp_B: Tensor,
        request_time_B: Tensor,
        items_BC: Tensor,
        crosses_BCG: Tensor | None,
        context_BG: Tensor | None,
    ) -> Tensor:
        """Input of the candidates' tokens (B, C, D)."""
        elapsed_B1 = (request_time_B - last_timestamp_B)[:, None]
        content_BCE = self.item_content(items_BC)
        contexts = context_BG[:, None] if context_BG is not None else None
        encoded_BCD: Tensor = self.position_time(
            self.candidate_mlp(self.candidates(content_BCE, crosses_BCG, contexts)),
            torch.zeros_like(items_BC),
            self.position_time.buckets(elapsed_B1.expand_as(items_BC)),
        )
        return encoded_BCD

    def features(self, user: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """What the projections of U take, each (..., E), from feature ids (..., G)."""
        features = self.users(user) if user is not None else []
        if self.config.context_placement == "prefix" and context is not None:
            features = features + self.contexts(context)
        return features

    def item_content(self, items: Tensor) -> Tensor:
        """Items (...) with their side features, (..., columns · E)."""
        side = self.item_side(self.item_features[items]) if len(self.item_side) else []
        return torch.cat([self.items(items), *side], dim=-1)

    def behaviours(self, item_content: Tensor, signals: Tensor | None) -> Tensor:
        """What the MLP of S and R takes; signals are ids (..., G)."""
        embeddings = self.signals(signals) if signals is not None else []
        return torch.cat([item_content, *embeddings], dim=-1)

    def candidates(
        self, item_content: Tensor, crosses: Tensor | None, context: Tensor | None
    ) -> Tensor:
        """What the MLP of candidates takes; ids (..., G), of contexts they are broadcast."""
        embeddings = self.crosses(crosses) if crosses is not None else []
        if self.config.context_placement == "candidate" and context is not None:
            shape = (*item_content.shape[:-1], -1)
            embeddings = embeddings + [c.expand(shape) for c in self.contexts(context)]
        return torch.cat([item_content, *embeddings], dim=-1)

    def _logits(self, encoded_BCD: Tensor, targets: MTGRTokens) -> Tensor:
        logits_BCO: Tensor = self.heads(encoded_BCD)
        return logits_BCO.masked_fill(~targets.valid_BT[..., None], 0.0)
