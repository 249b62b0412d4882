"""Does a network learn one batch by heart with the two lines as it does without: a hundred steps of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr

STEPS, LAST = 100, 10
RATE = 1e-3  # of AdamW


def memorise(plain: nn.Module, inputs: Tensor, target: Tensor, logits_of: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Train two copies of a network on one batch by AdamW, gradients clipped to norm 1, one of them with sfr.

    Args:
        plain: the network; it is left as it is.
        inputs: one batch of images (B, 3, H, W) or clips.
        target: class indices (B,).
        logits_of: takes the logits (B, K) out of the network's output.

    Returns:
        The accuracy of both over the last ten steps; the share of the feature term in the first and in the last loss;
        and its largest and last value.
    """
    model = sfr.SFRWrapper(copy.deepcopy(plain))
    criterion = sfr.SFRLoss(model, gate="none")  # the term in full from the first step, which is the harder case
    terms, shares = [], []

    def with_sfr(logits: Tensor) -> Tensor:
        loss: Tensor = criterion(logits, target)
        terms.append(criterion.last.feature.item())
        shares.append(criterion.last.share.item())
        return loss

    accuracy = fit(model, inputs, target, lambda output: with_sfr(logits_of(output)), logits_of)
    without = fit(
        copy.deepcopy(plain), inputs, target, lambda output: F.cross_entropy(logits_of(output), target), logits_of
    )
    return {
        "plain_accuracy": round(without, 4),
        "sfr_accuracy": round(accuracy, 4),
        "first_share": round(shares[0], 5),
        "last_share": round(shares[-1], 5),
        "largest_term": round(max(terms), 5),
        "last_term": round(terms[-1], 5),
    }


def fit(
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    loss_of: Callable[[Any], Tensor],
    logits_of: Callable[[Any], Tensor],
) -> float:
    """Take the steps; return the accuracy of the last ten, in training mode."""
    torch.manual_seed(0)  # both draw the same dropout
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    right = []
    for _ in range(STEPS):
        output = model(inputs)
        loss_of(output).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right.append((logits_of(output).argmax(dim=1) == target).float().mean().item())
    return sum(right[-LAST:]) / LAST
