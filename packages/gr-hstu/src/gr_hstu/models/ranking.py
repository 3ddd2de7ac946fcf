"""HSTU for ranking: the ranking variant (DLRMv3), scoring given candidates for several heads.

Shapes: B batch, L history (right-padded), C candidates, P prefix tokens, S tokens of prefix and
history, D model width, N layers, O heads of the answer, G feature columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_hstu.config import HSTUConfig
from gr_hstu.modules.embeddings import (
    NEVER,
    FeatureEmbeddings,
    PositionTimeEmbedding,
    item_embedding,
    last_timestamp,
    since_previous,
    sum_embeddings,
)
from gr_hstu.modules.heads import MLP
from gr_hstu.modules.hstu import HSTUStack
from gr_hstu.modules.masks import HSTUTokens, candidate_tokens, history_tokens, hstu_mask


class HSTUState(NamedTuple):
    """What scoring candidates needs of a prefix and history: K and V of every layer, and tokens."""

    k_NBSHK: Tensor
    v_NBSHV: Tensor
    rank_BS: Tensor
    valid_BS: Tensor
    history_lengths_B: Tensor
    last_timestamp_B: Tensor

    def tokens(self) -> HSTUTokens:
        return HSTUTokens(self.rank_BS, self.valid_BS, torch.zeros_like(self.valid_BS))


class HSTURanking(nn.Module):
    """Prefix, history and candidates in one sequence; a candidate sees the history and itself.

    `forward` scores in one pass. `prefill` and `score_candidates` give the same in two, so that one
    history serves any number of candidates (M-FALCON).
    """

    item_features: Tensor

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        if config.variant != "ranking":
            raise ValueError(
                f"HSTURanking needs the variant 'ranking', not {config.variant!r}; "
                "HSTURetrieval is the model of the variant 'research'"
            )
        if not config.heads:
            raise ValueError("HSTURanking needs at least one head in HSTUConfig.heads")
        self.config = config
        width = config.d_model
        self.items = item_embedding(config.num_items, width)
        self.item_side = FeatureEmbeddings(config.item_cardinalities, width)
        self.register_buffer(
            "item_features",
            torch.zeros(config.num_items + 1, len(config.item_cardinalities), dtype=torch.int64),
        )
        self.signals = FeatureEmbeddings(config.signal_cardinalities, width)
        self.users = FeatureEmbeddings(config.user_cardinalities, width)
        self.contexts = FeatureEmbeddings(config.context_cardinalities, width)
        self.crosses = FeatureEmbeddings(config.candidate_cardinalities, width)
        # Stands where a behaviour has its signals.
        self.target = nn.Parameter(torch.zeros(width))
        self.position_time = PositionTimeEmbedding(
            config.position_buckets, config.time_buckets, width
        )
        self.stack = HSTUStack(config)
        self.output_norm = nn.LayerNorm(width)
        self.item_mlp = MLP(width, config.mlp_dim, width, norm=True)
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
    ) -> Tensor:
        """Logits (B, C, O), zeros where padded.

        Takes int64 tensors: history items and timestamps (B, L), signals (B, L, G), lengths (B,);
        request_time (B,) in seconds as the timestamps; user and context features (B, G); candidate
        items (B, C), 0 where padded, their cross features (B, C, G) and counts (B,). Features of
        which the configuration has none may be None.
        """
        history_BSD, history = self._history(
            history_items,
            history_timestamps,
            history_lengths,
            request_time,
            history_signals,
            user_features,
            context_features,
        )
        last_B = last_timestamp(history_timestamps, history_lengths)
        target_BCD, item_BCD = self._candidates(
            last_B,
            history_lengths,
            request_time,
            candidate_items,
            candidate_features,
            context_features,
        )
        targets = self._candidate_tokens(candidate_items, candidate_counts, history_lengths)
        tokens = HSTUTokens(
            *(torch.cat(parts, dim=1) for parts in zip(history, targets, strict=True))
        )
        x_BTD = torch.cat([history_BSD, target_BCD], dim=1)
        x_BTD = F.dropout(x_BTD, self.config.input_dropout, self.training)
        x_BTD, _, _ = self.stack(x_BTD, self._mask(tokens, tokens))
        return self._logits(x_BTD[:, history_BSD.shape[1] :], item_BCD, targets)

    def prefill(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor | None,
        user_features: Tensor | None,
        context_features: Tensor | None,
    ) -> HSTUState:
        """Runs prefix and history alone. Takes the tensors of `forward`."""
        x_BSD, tokens = self._history(
            history_items,
            history_timestamps,
            history_lengths,
            request_time,
            history_signals,
            user_features,
            context_features,
        )
        _, keys, values = self.stack(x_BSD, self._mask(tokens, tokens))
        return HSTUState(
            torch.stack(keys),
            torch.stack(values),
            tokens.rank_BT,
            tokens.valid_BT,
            history_lengths,
            last_timestamp(history_timestamps, history_lengths),
        )

    def score_candidates(
        self,
        state: HSTUState,
        request_time: Tensor,
        candidate_items: Tensor,
        candidate_features: Tensor | None,
        candidate_counts: Tensor,
        context_features: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C, O) of candidates after a prefilled history; equal to `forward`'s."""
        x_BCD, item_BCD = self._candidates(
            state.last_timestamp_B,
            state.history_lengths_B,
            request_time,
            candidate_items,
            candidate_features,
            context_features,
        )
        targets = self._candidate_tokens(candidate_items, candidate_counts, state.history_lengths_B)
        keys = HSTUTokens(
            *(torch.cat(parts, dim=1) for parts in zip(state.tokens(), targets, strict=True))
        )
        past = (state.k_NBSHK, state.v_NBSHV)
        x_BCD, _, _ = self.stack(x_BCD, self._mask(targets, keys), past=past)
        return self._logits(x_BCD, item_BCD, targets)

    def _history(
        self,
        items_BL: Tensor,
        timestamps_BL: Tensor,
        lengths_B: Tensor,
        request_time_B: Tensor,
        signals_BLG: Tensor | None,
        user_BG: Tensor | None,
        context_BG: Tensor | None,
    ) -> tuple[Tensor, HSTUTokens]:
        """Input (B, S, D) and tokens of the prefix and the history."""
        config = self.config
        prefix = config.num_prefix_tokens
        features = self.features(user_BG, context_BG)
        behaviours_BLD = self.behaviours(self.item_content(items_BL), signals_BLG)
        x_BSD = torch.cat([*(f[:, None] for f in features), behaviours_BLD], dim=1)

        length = items_BL.shape[1]
        position_L = torch.arange(length, device=items_BL.device)
        prefix_BP = torch.arange(prefix, device=items_BL.device).expand(items_BL.shape[0], -1)
        # Row `prefix` of the position table is the candidates'.
        if config.position_from == "start":
            position_BL = (prefix + 1 + position_L).expand_as(items_BL)
        else:
            position_BL = (prefix + lengths_B[:, None] - position_L[None, :]).clamp(min=0)
        if config.time_from == "previous":
            elapsed_BL = since_previous(timestamps_BL)
        else:
            elapsed_BL = request_time_B[:, None] - timestamps_BL
        elapsed_BS = torch.cat([torch.full_like(prefix_BP, NEVER), elapsed_BL], dim=1)
        x_BSD = self.placed(
            x_BSD,
            torch.cat([prefix_BP, position_BL], dim=1),
            self.position_time.buckets(elapsed_BS),
        )
        contextual = config.contextual_mask
        return x_BSD, history_tokens(prefix, items_BL, lengths_B, contextual=contextual)

    def _candidates(
        self,
        last_timestamp_B: Tensor,
        lengths_B: Tensor,
        request_time_B: Tensor,
        items_BC: Tensor,
        crosses_BCG: Tensor | None,
        context_BG: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Input of the candidates' tokens, and of the item MLP, both (B, C, D)."""
        config = self.config
        item_BCD = self.candidates(self.item_content(items_BC), crosses_BCG)
        elapsed_B = torch.zeros_like(request_time_B)
        if config.time_from == "previous":
            elapsed_B = request_time_B - last_timestamp_B
        token_BCD = self.placed(
            self.targets(item_BCD, context_BG[:, None] if context_BG is not None else None),
            torch.full_like(items_BC, config.num_prefix_tokens),
            self.position_time.buckets(elapsed_B[:, None].expand_as(items_BC)),
        )
        return token_BCD, item_BCD

    def features(self, user: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """Content of the prefix tokens, each (..., D), from feature ids (..., G)."""
        features = self.users(user) if user is not None else []
        if self.config.context_placement == "prefix" and context is not None:
            features = features + self.contexts(context)
        return features

    def item_content(self, items: Tensor) -> Tensor:
        """Items (...) with their side features, (..., D)."""
        side = self.item_side(self.item_features[items]) if len(self.item_side) else []
        return sum_embeddings(side, self.items(items))

    def behaviours(self, item_content: Tensor, signals: Tensor | None) -> Tensor:
        """Content of behaviours (..., D); signals are ids (..., G)."""
        return sum_embeddings(self.signals(signals) if signals is not None else [], item_content)

    def candidates(self, item_content: Tensor, crosses: Tensor | None) -> Tensor:
        """What is known of candidates (..., D); cross features are ids (..., G)."""
        return sum_embeddings(self.crosses(crosses) if crosses is not None else [], item_content)

    def targets(self, candidates: Tensor, context: Tensor | None) -> Tensor:
        """Content of the candidates' tokens (..., D); ids (..., G) of contexts are broadcast."""
        tokens = candidates + self.target
        if self.config.context_placement == "candidate" and context is not None:
            tokens = sum_embeddings(self.contexts(context), tokens)
        return tokens

    def placed(self, content: Tensor, position: Tensor, bucket: Tensor | None) -> Tensor:
        """The stack's input (..., D): scaled content, position and time."""
        encoded: Tensor = self.position_time(
            content * math.sqrt(self.config.d_model), position, bucket
        )
        return encoded

    def logits(self, encoded: Tensor, item: Tensor) -> Tensor:
        """(..., O) from the stack's output for `targets`, and the item MLP's for `candidates`."""
        logits: Tensor = self.heads(self.output_norm(encoded) * item)
        return logits

    def _candidate_tokens(
        self, items_BC: Tensor, counts_B: Tensor, lengths_B: Tensor
    ) -> HSTUTokens:
        return candidate_tokens(
            self.config.num_prefix_tokens,
            items_BC,
            counts_B,
            lengths_B,
            contextual=self.config.contextual_mask,
        )

    def _mask(self, query: HSTUTokens, key: HSTUTokens) -> Tensor:
        return hstu_mask(
            query,
            key,
            window=self.config.max_attn_len,
            contextual=self.config.contextual_mask,
        )

    def _logits(self, encoded_BCD: Tensor, item_BCD: Tensor, targets: HSTUTokens) -> Tensor:
        logits_BCO = self.logits(encoded_BCD, self.item_mlp(item_BCD))
        return logits_BCO.masked_fill(~targets.valid_BT[..., None], 0.0)
