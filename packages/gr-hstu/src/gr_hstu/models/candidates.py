"""M-FALCON: many candidates in micro-batches against one prefilled history.

Shapes: B batch, C candidates, G feature columns, O heads of the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_hstu.models.mtgr import MTGR, MTGRState
from gr_hstu.models.ranking import HSTURanking, HSTUState


def score_in_chunks(
    model: HSTURanking | MTGR,
    state: HSTUState | MTGRState,
    request_time: Tensor,
    candidate_items: Tensor,
    candidate_features: Tensor | None,
    candidate_counts: Tensor,
    context_features: Tensor | None = None,
    *,
    chunk: int,
) -> Tensor:
    """Logits (B, C, O), `chunk` candidates at a time; equal to one pass over all of them.

    Memory of the attention is bounded by `chunk`, not by the number of candidates.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1 candidate")
    logits = []
    for start in range(0, candidate_items.shape[1], chunk):
        part = slice(start, start + chunk)
        logits.append(
            model.score_candidates(
                state,  # type: ignore[arg-type]
                request_time,
                candidate_items[:, part],
                candidate_features[:, part] if candidate_features is not None else None,
                (candidate_counts - start).clamp(0, chunk),
                context_features,
            )
        )
    return torch.cat(logits, dim=1)
