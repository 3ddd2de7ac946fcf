"""Losses of retrieval (one value a target, (T,)) and of ranking (a scalar).

Shapes: T targets of a batch, D width, V = 1 + items, M negatives, C candidates, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1e9  # logit of an item that is not a negative


def full_softmax(query_TD: Tensor, item_VD: Tensor, target_T: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over all items; row 0, padding, is left out."""
    logits_TV = query_TD @ item_VD[1:].T / temperature
    return F.cross_entropy(logits_TV, target_T - 1, reduction="none")


def sampled_softmax(
    query_TD: Tensor, item_VD: Tensor, target_T: Tensor, temperature: float, negatives: int
) -> Tensor:
    """Cross-entropy against ``negatives`` items drawn uniformly for each target."""
    shape = (len(target_T), negatives)
    sample_TM = torch.randint(1, len(item_VD), shape, device=target_T.device)
    positive_T1 = (query_TD * item_VD[target_T]).sum(-1, keepdim=True)
    negative_TM = torch.einsum("td,tmd->tm", query_TD, item_VD[sample_TM])
    negative_TM = negative_TM.masked_fill(sample_TM == target_T[:, None], IGNORED)
    logits = torch.cat([positive_T1, negative_TM], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(target_T), reduction="none")


def shared_softmax(
    query_TD: Tensor, item_VD: Tensor, target_T: Tensor, temperature: float, negatives: int
) -> Tensor:
    """As `sampled_softmax`, but one draw of negatives serves all targets of the batch.

    That makes it a matrix product instead of a gather for every target, so thousands of negatives
    cost less than hundreds of own ones.
    """
    sample_M = 1 + torch.randperm(len(item_VD) - 1, device=target_T.device)[:negatives]
    positive_T1 = (query_TD * item_VD[target_T]).sum(-1, keepdim=True)
    negative_TM = query_TD @ item_VD[sample_M].T
    negative_TM = negative_TM.masked_fill(sample_M == target_T[:, None], IGNORED)
    logits = torch.cat([positive_T1, negative_TM], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(target_T), reduction="none")


def in_batch_softmax(
    query_TD: Tensor,
    item_VD: Tensor,
    target_T: Tensor,
    temperature: float,
    log_frequency_V: Tensor,
) -> Tensor:
    """Cross-entropy against the batch's other targets, corrected for how often each is one.

    Popular items are negatives more often; subtracting ``log_frequency_V`` (V,), the log of their
    share of the training targets, makes the scores comparable with the full softmax (Yi et al.,
    RecSys 2019).
    """
    logits_TT = query_TD @ item_VD[target_T].T / temperature - log_frequency_V[target_T]
    same_TT = target_T[:, None] == target_T[None, :]
    same_TT.fill_diagonal_(False)
    labels_T = torch.arange(len(target_T), device=target_T.device)
    return F.cross_entropy(logits_TT.masked_fill(same_TT, IGNORED), labels_T, reduction="none")


def multi_task_bce(logits_BCH: Tensor, label_BCH: Tensor, weight_H: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of each head over its observed labels, summed over heads.

    Labels are nan where the outcome is not observed; these add neither loss nor gradient.
    """
    observed_BCH = torch.isfinite(label_BCH)
    label = torch.where(observed_BCH, label_BCH, 0.0)
    loss_BCH = F.binary_cross_entropy_with_logits(logits_BCH, label, reduction="none")
    heads = logits_BCH.shape[-1]
    total_H = torch.where(observed_BCH, loss_BCH, 0.0).reshape(-1, heads).sum(0)
    mean_H = total_H / observed_BCH.reshape(-1, heads).sum(0).clamp(min=1)
    return mean_H.sum() if weight_H is None else (mean_H * weight_H).sum()


def within_user_softmax(logits_BH: Tensor, label_BH: Tensor, user_B: Tensor) -> Tensor:
    """Each positive against the negatives of the same user in the batch, summed over heads.

    Divided by the observed labels of the head, as `multi_task_bce` is, so that a head of rare
    positives weighs in both alike.

    Cross-entropy across users mostly learns who likes much, and the order of one user's own
    impressions little; this is the listwise half of JRC (Sheng et al., KDD 2023).
    """
    same_BB = user_B[:, None] == user_B[None, :]
    positive_BH, negative_BH = label_BH == 1, label_BH == 0
    # [positive, negative, head]
    margin_BBH = logits_BH[None, :, :] - logits_BH[:, None, :]
    counted_BBH = same_BB[..., None] & negative_BH[None, :, :]
    worse_BH = torch.logsumexp(margin_BBH.masked_fill(~counted_BBH, IGNORED), dim=1)
    paired_BH = positive_BH & counted_BBH.any(dim=1)
    loss_BH = torch.where(paired_BH, F.softplus(worse_BH), 0.0)
    return (loss_BH.sum(0) / torch.isfinite(label_BH).sum(0).clamp(min=1)).sum()
