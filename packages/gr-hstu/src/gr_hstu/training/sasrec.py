"""SASRec (Kang and McAuley, 2018), the Transformer baseline, trained by the same loop.

Pre-norm causal blocks, learned positions, tied item embeddings. It has HSTU's interface for
retrieval, so that losses, batches and evaluator are shared.

Shapes: B batch, L behaviours, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SASRec(nn.Module):
    """Scores are dot products of the last state with the items' embeddings, 1..num_items."""

    temperature = 1.0

    def __init__(
        self,
        num_items: int,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        max_seq_len: int = 50,
        dropout: float = 0.5,
        signal_cardinalities: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.item = nn.Embedding(num_items + 1, d_model, padding_idx=0)
        self.position = nn.Embedding(max_seq_len, d_model)
        self.signals = nn.ModuleList(nn.Embedding(n, d_model) for n in signal_cardinalities)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            d_model,
            num_heads,
            dim_feedforward=4 * d_model,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        for table in (self.item, self.position, *self.signals):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0].zero_()

    def encode_all(
        self,
        history_items: Tensor,
        history_timestamps: Tensor,
        history_lengths: Tensor,
        request_time: Tensor,
        history_signals: Tensor | None = None,
    ) -> Tensor:
        """States after each behaviour (B, L, D); times are not read."""
        length = history_items.shape[1]
        x_BLD = self.item(history_items) + self.position.weight[:length]
        for i, table in enumerate(self.signals):
            assert history_signals is not None
            x_BLD = x_BLD + table(history_signals[..., i])
        # Right padding lies after every behaviour, where causal attention never looks.
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x_BLD.device)
        return self.blocks(self.dropout(x_BLD), mask=mask, is_causal=True)

    def item_embeddings(self) -> Tensor:
        """(1 + items, D); row 0 is padding."""
        return self.item.weight
