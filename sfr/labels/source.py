"""What the sources of smoothed targets are asked before a step, by `recall`, and told after it, by `observe`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SUMS_WITHIN = 0.05  # what half precision leaves of the sums of a thousand classes


class Batch(NamedTuple):
    """One training step as the label term sees it, a row for each position: N = B, or B times the pixels of an image.

    Args:
        log_probabilities: shape (N, K), float32 (float64 for float64 logits).
        labels: class indices (N,), 0 where the label is ignored, or soft targets (N, K).
        kept: which labels count, (N,); None for soft targets, all of which do.
        images: B.
        numbers: numbers of the images in the training set, (B,), if they were given.
    """

    log_probabilities: Tensor
    labels: Tensor
    kept: Tensor | None
    images: int
    numbers: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, ignore_index: int, numbers: Tensor | None) -> Batch:
        """Return the step with these logits (B, K, ...) and targets, class indices (B, ...) or soft (B, K, ...)."""
        log_probabilities = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        rows = log_probabilities.movedim(1, -1).reshape(-1, logits.shape[1])
        if target.is_floating_point():
            return cls(rows, target.movedim(1, -1).reshape(rows.shape), None, len(logits), numbers)
        labels = target.flatten()
        kept = labels != ignore_index
        return cls(rows, labels.where(kept, 0), kept, len(logits), numbers)

    def detached(self) -> Batch:
        """Return the step without its autograd graph."""
        return self._replace(log_probabilities=self.log_probabilities.detach())


def check_sound(name: str, value: Tensor, *, axes: int, sums: tuple[float, float] | None = None) -> None:
    """Raise a ``ValueError`` if statistics that a state holds cannot come from a training.

    Args:
        name: what they are called there.
        value: not empty.
        axes: how many they have.
        sums: between what the rows sum to.
    """
    sound = value.ndim == axes and bool(value.amin() >= 0) and bool(value.amax() < torch.inf)  # NaN is neither
    if sound and sums is not None:
        totals = value.sum(dim=1, dtype=torch.promote_types(value.dtype, torch.float32))
        sound = bool(totals.amin() >= sums[0] - SUMS_WITHIN) and bool(totals.amax() <= sums[1] + SUMS_WITHIN)
    if not sound:
        raise ValueError(f"the label statistics are damaged: {name!r} holds what no training leaves there")
